"""How the networks of a run are held: what changes no number, what saves memory, and what each is refused with."""

import functools
import json
import weakref
from pathlib import Path

import pytest
import torch
from runs import weights
from safetensors.torch import load_file
from torch import nn

from distill_bench.config.errors import ConfigError
from distill_bench.config.identity import run_id
from distill_bench.config.resolve import resolve
from distill_bench.config.schema import AdapterConfig
from distill_bench.config.yaml_files import parse_yaml
from distill_bench.networks.adapters import activate, add_adapter, merge_adapter
from distill_bench.networks.denoiser import Denoiser
from distill_bench.networks.ledger import Ledger
from distill_bench.networks.offload import Streamed, place
from distill_bench.networks.pipeline import load_transformer
from distill_bench.networks.recompute import checkpointed
from distill_bench.sample.run import sample
from distill_bench.testing import checks, tiny
from distill_bench.testing.runs import Runs
from distill_bench.train import checkpoint
from distill_bench.train.loop import train
from distill_bench.train.records import Records
from distill_bench.train.setup import build_from

ADAPTER = {"rank": 2, "alpha": 4.0, "targets": ["to_q", "to_v", "ffn.net.2"]}
SHARED_GRAPH = {"name": "sgmd", "preset": "paper"}
ON_FEATURES = {"name": "dmd2", "preset": "paper"}


@pytest.fixture
def make_run(make_run, tmp_path: Path):
    """Runs beside a folder of real clips."""
    tiny.tiny_clips(tmp_path / "clips")
    return functools.partial(make_run, data=str(tmp_path / "clips"))


def furthest(run: Path, other: Path) -> float:
    """The largest difference of any weight at the end of two runs."""
    first, second = weights(run), weights(other)
    assert first.keys() == second.keys()
    return max(float((first[k] - second[k]).abs().max()) for k in first if first[k].numel())


def test_how_a_run_is_held_is_in_its_id_only_where_it_changes_the_numbers():
    plain = run_id(resolve({"method": "dmd2"}))
    assert plain == "dmd2-s0-5c88f7749f83"  # made before there was any of these keys
    for same in (
        {"gradient_checkpointing": True},
        {"guidance_forwards": "sequential"},
        {"teacher_offload": True},
        {"sharding": True},
    ):
        assert run_id(resolve({"method": "dmd2"} | same)) == plain
    others = [
        {"adapter": {}},
        {"adapter": {"rank": 4}},
        {"precision": "bfloat16"},
        {"precision": "bfloat16", "weights": "bfloat16"},
        {"compile": True},
    ]
    assert len({plain, *(run_id(resolve({"method": "dmd2"} | other)) for other in others)}) == 6


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"weights": "bfloat16"}, "weights 'bfloat16' needs precision 'bfloat16', not 'float32'"),
        ({"adapter": {"rank": 0}}, "adapter.rank = 0"),
        ({"adapter": {"ranks": 4}}, "unknown key 'adapter.ranks' .did you mean 'rank'"),
        ({"adapter": {}, "sharding": True}, "sharding with adapter"),
        ({"adapter": {}, "teacher_offload": True}, "teacher_offload with adapter"),
        ({"compile": True, "sharding": True}, "compile with sharding"),
        ({"compile": True, "method": SHARED_GRAPH}, "compile with reuse_rollout 'graph'"),
        ({"adapter": {}, "method": "ida"}, "adapter: ida averages weights"),
        (
            {"adapter": {}, "teacher": "gaussian"},
            "adapter needs a transformer, which the teacher 'gaussian' does not have",
        ),
        ({"sharding": True, "method": SHARED_GRAPH}, "sharding with reuse_rollout 'graph'"),
    ],
)
def test_what_cannot_be_had_is_refused_in_one_line(fields, says):
    with pytest.raises(ConfigError, match=says) as error:
        resolve({"method": "dmd2"} | fields)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dmd2", ON_FEATURES, SHARED_GRAPH, "sid"], ids=str)
def test_gradient_checkpointing_changes_neither_numbers_nor_the_ledger(method, make_run):
    """The forwards that a backward makes again are the machine's, not the method's: a run costs the same by its ledger."""
    plain, saving = (
        make_run(f"{on}", method=method, gradient_checkpointing=on) for on in (False, True)
    )
    cost, again = train(plain)["cost"], train(saving)["cost"]
    assert furthest(plain, saving) == 0
    assert cost == again


def test_gradient_checkpointing_runs_each_block_once_more_a_backward(make_run):
    """methods.md 1.12: +1F per network backward."""
    counted = {}
    for on in (False, True):
        trainer, calls = (
            build_from(
                make_run(f"{on}", gradient_checkpointing=on, exit_step="last", guidance_scale=1.0)
            ),
            [],
        )
        for role in ("student", "fake_score"):
            trainer.networks[role].blocks[0].register_forward_pre_hook(
                lambda *_, role=role, calls=calls: calls.append(role)
            )
        trainer.update_student()
        trainer.update_fake_score(0)
        counted[on] = {role: calls.count(role) for role in ("student", "fake_score")}
    assert counted[False] == {"student": 4, "fake_score": 2}
    assert counted[True] == {"student": 5, "fake_score": 3}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dmd2", "sid", ON_FEATURES], ids=str)
def test_sequential_guidance_and_an_offloaded_teacher_change_no_number(method, make_run):
    plain = make_run("plain", method=method, precision="float64")
    other = make_run(
        "other",
        method=method,
        precision="float64",
        guidance_forwards="sequential",
        teacher_offload=True,
    )
    cost = train(plain)["cost"]
    assert train(other)["cost"] == cost
    assert furthest(plain, other) < 1e-9


def test_sequential_guidance_is_batched_guidance_in_float32(make_run):
    trainer = build_from(make_run("run"))
    batch = trainer.batch("student")
    x_t, sigma = batch.noise("x"), batch.sigma("s")
    batched = trainer.nets.teacher(x_t, sigma, batch.text)
    trainer.nets.teacher.batched = False
    torch.testing.assert_close(
        trainer.nets.teacher(x_t, sigma, batch.text), batched, rtol=1e-6, atol=1e-6
    )


def test_the_blocks_of_an_offloaded_teacher_are_on_the_device_one_at_a_time(tiny_wan):
    """With checkpointing a block's copy is gone after its forward and comes again in the backward."""
    x, sigma, text = (
        torch.randn(1, 4, 2, 2, 2, requires_grad=True),
        torch.tensor([0.5]),
        torch.randn(1, 8, 16),
    )

    def gradient(net: nn.Module) -> torch.Tensor:
        net.enable_gradient_checkpointing(checkpointed)
        return torch.autograd.grad(
            Denoiser(net, "teacher", Ledger(1))(x, sigma, text).square().sum(), x
        )[0]

    plain, net = (load_transformer(tiny_wan).requires_grad_(False) for _ in range(2))
    net = place(net, torch.device("cpu"), offload=True)
    copies, most = weakref.WeakSet(), 0
    for block in net.blocks:
        assert isinstance(block, Streamed)

        def seen(inner: nn.Module, _inputs: tuple) -> None:
            nonlocal most
            copies.add(inner.ffn.net[2].weight)
            most = max(most, len(copies))

        block.block.register_forward_pre_hook(seen)
    # memory at another address may be summed in another order
    torch.testing.assert_close(gradient(net), gradient(plain), rtol=1e-5, atol=1e-6)
    assert len(net.blocks) > 1 and most == 1
    fetched = Streamed(nn.Linear(2, 2), torch.device("meta"))
    assert (
        fetched(torch.zeros(1, 2, device="meta")).device.type == "meta"
        and fetched.block.weight.device.type == "cpu"
    )


@pytest.mark.slow
def test_compiled_blocks_change_the_rounding_alone(make_run):
    """Of a method whose discriminator stops a forward half-way; compiled once for all roles, so one method is enough."""
    plain, compiled = (
        make_run(str(on), method=ON_FEATURES, compile=on, student_updates=1, fake_score_updates=1)
        for on in (False, True)
    )
    assert train(plain)["cost"] == train(compiled)["cost"]
    assert 0 < furthest(plain, compiled) < 1e-5


# --- bfloat16 ---


def test_bfloat16_weights_have_float32_masters_that_small_updates_reach(make_run):
    run = make_run(
        "low",
        precision="bfloat16",
        weights="bfloat16",
        student_lr=1e-6,
        fake_score_lr=1e-6,
        student_updates=1,
    )
    trainer = build_from(run)
    started = {
        role: {k: p.detach().clone() for k, p in trainer.trained[role].named_parameters()}
        for role in ("student", "fake_score")
    }
    net = dict(trainer.networks["student"].named_parameters())
    assert (
        net["blocks.0.attn1.to_q.weight"].dtype
        == net["blocks.0.ffn.net.2.weight"].dtype
        == torch.bfloat16
    )
    assert net["blocks.0.norm2.weight"].dtype == net["scale_shift_table"].dtype == torch.float32
    assert trainer.nets.unguided_teacher.net.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    train(run)
    saved = weights(run)
    for role, before in started.items():
        after = {k: saved[f"{role}.{k}"] for k in before}
        assert all(v.dtype == torch.float32 for v in after.values())
        moved = torch.cat([(after[k] - before[k]).abs().flatten() for k in before])
        # Adam's first step is the learning rate, 1e-6 (the fake score makes two): far below what bfloat16 resolves at 0.1
        assert moved.max() < 3e-6 and (moved > 0).float().mean() > 0.9, role


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"method": "sgmd", "reuse_rollout": True},
        {"method": {"name": "sgmd", "preset": "paper"}},
        {
            "method": {"name": "sgmd", "preset": "paper"},
            "gradient_checkpointing": True,
            "accumulation": 2,
        },
    ],
)
def test_bfloat16_weights_train_as_autocast_does_to_its_precision(fields, make_run):
    lines = {}
    for name in ("float32", "bfloat16"):
        train(run := make_run(name, precision="bfloat16", weights=name, **fields))
        lines[name] = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    for one, other in zip(lines["float32"], lines["bfloat16"], strict=True):
        assert other["fake_score_loss"] == pytest.approx(one["fake_score_loss"], rel=0.02)
        assert other["x0_std"] == pytest.approx(one["x0_std"], rel=0.02)


@pytest.mark.slow
def test_a_run_in_bfloat16_resumes_in_the_same_bits(make_run):
    fields = {
        "precision": "bfloat16",
        "weights": "bfloat16",
        "gradient_checkpointing": True,
        "accumulation": 2,
    }
    whole, parts = make_run("whole", **fields), make_run("parts", **fields)
    train(whole)
    assert train(parts, stop=lambda: True)["status"] == "stopped"
    train(parts)
    assert furthest(whole, parts) == 0


def test_a_hook_that_moves_weights_moves_the_masters(make_run):
    run = make_run("ida", method="ida", precision="bfloat16", weights="bfloat16")
    trainer = build_from(run)
    trainer.update_student()
    student, fake_score = (
        dict(trainer.trained[role].named_parameters()) for role in ("student", "fake_score")
    )
    expected = {k: torch.lerp(p, student[k], 0.03) for k, p in fake_score.items()}
    trainer.after_student_update()
    net = dict(trainer.networks["fake_score"].named_parameters())
    for name, value in expected.items():
        torch.testing.assert_close(fake_score[name], value)
        assert torch.equal(net[name], value.to(net[name].dtype))


# --- adapters ---


def test_all_roles_share_one_base_and_train_their_own_adapters_alone(make_run):
    trainer = build_from(make_run("lora", adapter=ADAPTER, method="sgmd"))
    nets = [
        trainer.networks["student"],
        trainer.networks["fake_score"],
        trainer.nets.unguided_teacher.net,
    ]
    assert len({id(net.net) for net in nets}) == 1
    # per block q and v of self- and cross-attention (24 x 24) and the second layer of the feed-forward (32 x 24), rank 2
    expected = 2 * (4 * 2 * (24 + 24) + 2 * (32 + 24))
    for role in ("student", "fake_score"):
        assert sum(p.numel() for p in trainer.networks[role].parameters()) == expected
        assert (
            sum(
                p.numel()
                for group in trainer.optimisers[role].param_groups
                for p in group["params"]
            )
            == expected
        )


def test_the_teacher_is_the_base_whatever_the_adapters_are(make_run, tiny_wan):
    trainer = build_from(make_run("lora", adapter=ADAPTER, student_lr=0.1))
    batch = trainer.batch("student")
    inputs = batch.noise("x"), batch.sigma("s"), batch.text
    for _ in range(2):
        trainer.update_student()
        trainer.update_fake_score(0)
    with torch.no_grad():
        alone = Denoiser(load_transformer(tiny_wan), "teacher", Ledger(1))(*inputs)
        assert torch.equal(trainer.nets.unguided_teacher(*inputs), alone)
        student, fake_score = trainer.nets.student(*inputs), trainer.nets.fake_score(*inputs)
        assert not torch.allclose(student, alone) and not torch.allclose(student, fake_score)
        activate(trainer.networks["student"].net, ["student"])
        merged = merge_adapter(trainer.networks["student"].net)
        assert "lora" not in " ".join(merged.state_dict())
        torch.testing.assert_close(
            Denoiser(merged, "student", Ledger(1))(*inputs), student, rtol=1e-5, atol=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_run_of_adapters_saves_them_alone_and_resumes_in_the_same_bits(checkpointed, make_run):
    fields = {"adapter": ADAPTER, "gradient_checkpointing": checkpointed, "student_lr": 1e-2}
    whole, parts = make_run("whole", **fields), make_run("parts", **fields)
    train(whole)
    assert train(parts, stop=lambda: True)["status"] == "stopped"
    train(parts)
    assert furthest(whole, parts) == 0
    saved = weights(whole)
    assert all("lora_" in name for name in saved)
    assert {name.split(".")[0] for name in saved} == {"student", "fake_score", "ema"}
    kept = load_file(checkpoint.students(whole)[2])
    assert {name: tuple(v.shape) for name, v in kept.items() if "blocks.0.ffn" in name} == {
        "blocks.0.ffn.net.2.lora_A.weight": (2, 32),
        "blocks.0.ffn.net.2.lora_B.weight": (24, 2),
    }
    moved = {k: (saved[f"student.{k}"] - saved[f"ema.{k}"]).abs().max() for k in kept}
    assert all(torch.equal(kept[k], saved[f"ema.{k}"]) for k in kept) and max(moved.values()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dmd2", ON_FEATURES, SHARED_GRAPH, "sid"], ids=str)
def test_checkpointing_runs_a_block_again_with_the_adapter_that_it_had(method, make_run):
    fields = {"method": method, "adapter": ADAPTER, "student_lr": 1e-2, "fake_score_lr": 1e-2}
    plain, saving = (make_run(f"{on}", gradient_checkpointing=on, **fields) for on in (False, True))
    train(plain)
    train(saving)
    assert furthest(plain, saving) == 0


def test_the_samples_are_of_the_adapted_student(make_run, tiny_wan):
    import numpy as np

    run = make_run(
        "lora", adapter=ADAPTER, student_lr=0.05, student_updates=4, ema=None, evaluations=2
    )
    train(run)
    first, last = (np.load(folder / "clips.npy") for folder in sample(run))
    assert (first != last).any()
    net = load_transformer(tiny_wan)
    checkpoint.load_student(
        checkpoint.students(run)[4],
        net,
        resolve(parse_yaml((run / "run.yaml").read_text())).adapter,
    )
    trainer = build_from(run)
    Records(trainer, run).resume()
    batch = trainer.batch("student")
    inputs = batch.noise("x"), batch.sigma("s"), batch.text
    with torch.no_grad():
        assert torch.equal(
            Denoiser(net, "student", Ledger(1))(*inputs), trainer.nets.student(*inputs)
        )


def test_an_adapter_for_unknown_layers_is_refused_with_the_known_ones(tiny_wan):
    """`config` checks targets by the names in the weight files; a pipeline's outline has no weights."""
    message = "adapter.targets: no linear layer matches 'query'; available suffixes: .*to_q"
    with pytest.raises(ConfigError, match=message):
        add_adapter(load_transformer(tiny_wan), "student", AdapterConfig(targets=("query",)), 0)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sgmd", ON_FEATURES, "f_distill", "consistency"], ids=str)
def test_methods_conform_with_adapters(method, tmp_path_factory):
    runs = Runs(
        method, tmp_path_factory.getbasetemp() / "adapters", f"{method}", {"adapter": ADAPTER}
    )
    for check in (c for c in checks.CHECKS if c is not checks.check_presets):
        check(runs)
