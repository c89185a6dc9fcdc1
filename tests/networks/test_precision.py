"""Weights in bfloat16 with float32 masters."""

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from network_variants import SHARED_GRAPH, largest_difference
from runs import weights
from torch import nn

from distill_bench.method import Batch, Loss, Method, Nets
from distill_bench.store.files import read_jsonl
from distill_bench.train.loop import train, update
from distill_bench.train.setup import build_from

LOW = {"precision": "bfloat16", "weights": "bfloat16"}
TRAINED = ("student", "fake_score")


def test_bfloat16_weights_have_float32_masters_that_small_updates_reach(make_run):
    """Adam steps by 1e-6 (twice for the fake score), far below bfloat16's spacing at 0.1."""
    rates = {"student_lr": 1e-6, "fake_score_lr": 1e-6}
    run = make_run("low", student_updates=1, **rates, **LOW)
    trainer = build_from(run)
    before = {
        role: {k: p.detach().clone() for k, p in trainer.trained[role].named_parameters()}
        for role in TRAINED
    }
    net = dict(trainer.networks["student"].named_parameters())
    teacher = trainer.nets.unguided_teacher.net
    assert net["blocks.0.attn1.to_q.weight"].dtype == torch.bfloat16
    assert net["blocks.0.ffn.net.2.weight"].dtype == torch.bfloat16
    assert net["blocks.0.norm2.weight"].dtype == torch.float32
    assert net["scale_shift_table"].dtype == torch.float32
    assert teacher.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    train(run)
    saved = weights(run)
    for role in TRAINED:
        after = {name: saved[f"{role}.{name}"] for name in before[role]}
        assert {value.dtype for value in after.values()} == {torch.float32}
        moves = [(after[name] - before[role][name]).abs().flatten() for name in after]
        moved = torch.cat(moves)
        assert moved.max() < 3e-6, role
        assert (moved > 0).float().mean() > 0.9, role


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"method": "sgmd", "reuse_rollout": True},
        {"method": SHARED_GRAPH},
        {"method": SHARED_GRAPH, "gradient_checkpointing": True, "accumulation": 2},
    ],
)
def test_bfloat16_weights_train_like_autocast_up_to_rounding(fields, make_run):
    lines = {}
    for dtype in ("float32", "bfloat16"):
        run = make_run(dtype, precision="bfloat16", weights=dtype, **fields)
        train(run)
        lines[dtype] = read_jsonl(run / "train.jsonl")
    for autocast, low in zip(lines["float32"], lines["bfloat16"], strict=True):
        assert low["fake_score_loss"] == pytest.approx(autocast["fake_score_loss"], rel=0.02)
        assert low["x0_std"] == pytest.approx(autocast["x0_std"], rel=0.02)


@pytest.mark.slow
def test_a_run_in_bfloat16_resumes_with_the_same_bits(make_run):
    fields = LOW | {"gradient_checkpointing": True, "accumulation": 2}
    whole, resumed = make_run("whole", **fields), make_run("resumed", **fields)
    train(whole)
    assert train(resumed, stop=lambda: True)["status"] == "stopped"
    train(resumed)
    assert largest_difference(whole, resumed) == 0


def test_after_each_phase_its_network_is_its_rounded_masters(make_run):
    trainer = build_from(make_run("low", student_lr=1e-2, fake_score_lr=1e-2, **LOW))
    for role, phase in zip(
        TRAINED, (trainer.update_student, trainer.update_fake_score), strict=True
    ):
        net = dict(trainer.networks[role].named_parameters())
        before = {name: p.detach().clone() for name, p in net.items()}
        phase(*([0] if role == "fake_score" else []))
        for name, master in trainer.trained[role].named_parameters():
            assert torch.equal(net[name], master.to(net[name].dtype))
        assert not any(torch.equal(p, before[name]) for name, p in net.items() if p.ndim > 1)


def test_the_students_step_leaves_the_graph_that_the_fake_score_shares(make_run):
    """Even equal values written into the fake score's weights would end that graph."""
    trainer = build_from(make_run("graph", method=SHARED_GRAPH, **LOW))
    before = [p.detach().clone() for p in trainer.trained["fake_score"].parameters()]
    update(trainer)
    after = trainer.trained["fake_score"].parameters()
    assert not any(torch.equal(p, q) for p, q in zip(before, after, strict=True) if p.ndim > 1)


@dataclass(frozen=True)
class Doubling(Method):
    """A method whose hook doubles the student's first weight."""

    paper = "none"
    shares_graph = True

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        x0 = nets.rollout(batch)
        return Loss({"size": x0.square().mean()}, x0)

    def after_student_update(self, networks: Mapping[str, nn.Module]) -> None:
        next(networks["student"].parameters()).mul_(2)


@pytest.mark.parametrize("reuse", [False, True, "graph"])
def test_a_hook_that_changes_masters_changes_the_network(reuse, make_run):
    trainer = build_from(make_run("run", method=f"{__file__}:Doubling", reuse_rollout=reuse, **LOW))
    trainer.update_student()
    master = next(trainer.trained["student"].parameters())
    expected = 2 * master.detach()
    trainer.after_student_update()
    assert torch.equal(master, expected)
    net = next(trainer.networks["student"].parameters())
    assert torch.equal(net, expected.to(net.dtype))


def test_a_hook_that_changes_weights_changes_the_masters(make_run):
    """IDA moves the fake score towards the student after each student update."""
    trainer = build_from(make_run("ida", method="ida", **LOW))
    trainer.update_student()
    student, fake_score = (dict(trainer.trained[role].named_parameters()) for role in TRAINED)
    expected = {name: torch.lerp(p, student[name], 0.03) for name, p in fake_score.items()}
    trainer.after_student_update()
    net = dict(trainer.networks["fake_score"].named_parameters())
    for name, value in expected.items():
        torch.testing.assert_close(fake_score[name], value)
        assert torch.equal(net[name], value.to(net[name].dtype))
