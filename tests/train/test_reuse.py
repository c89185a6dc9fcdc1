"""Samples that the fake score learns from: new rollouts, the student's samples, or its graph."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from distill_bench.method import Batch, Loss, Method, Nets
from distill_bench.testing.runs import Runs
from distill_bench.train.loop import update
from distill_bench.train.run import Run

GAUSSIAN = {"teacher": "gaussian", "data": None, "precision": "float64"}
SGMD = {"name": "sgmd", "residual_weight": 0.3}


def build(tmp_path, method=SGMD, **fields) -> Run:
    return Runs(method, tmp_path).build(**GAUSSIAN | fields)


def gradients(run: Run, role: str) -> list[Tensor]:
    return [p.grad for p in run.networks[role].parameters()]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_shared_graph_gives_each_role_the_gradients_of_its_own_terms(accumulation, tmp_path):
    """Those of one forward whose terms are differentiated apart, before either role moves."""
    run = build(tmp_path, reuse_rollout="graph", accumulation=accumulation)
    student, fake = (list(run.networks[role].parameters()) for role in ("student", "fake_score"))
    for net in (run.networks["student"], run.networks["fake_score"]):
        net.requires_grad_(True)
    losses = [
        run.method.student_loss(run.nets, run.batch("student", micro))
        for micro in range(accumulation)
    ]
    total, own = (
        sum(sum(terms.values()) for terms in part) / accumulation
        for part in zip(*((loss.terms, loss.fake_score_terms) for loss in losses), strict=True)
    )
    of_student = list(torch.autograd.grad(total, student, retain_graph=True))
    of_fake_score = list(torch.autograd.grad(own, fake))
    kept = []
    scalars = run.student.backward(run.student_losses(kept))
    assert scalars["student_loss"] == pytest.approx(total.item())
    torch.testing.assert_close(gradients(run, "student"), of_student)
    assert gradients(run, "fake_score") == [None] * len(fake)
    assert len(kept) == accumulation
    scalars = run.fake_score.backward(run.fake_score_losses(0, kept))
    assert scalars["denoise"] == pytest.approx(own.item())
    torch.testing.assert_close(gradients(run, "fake_score"), of_fake_score)
    torch.testing.assert_close(gradients(run, "student"), of_student)


def test_weights_in_bfloat16_leave_a_kept_graph_as_its_forward_found_it(tmp_path):
    """Masters are copied into the student alone between the phases, and the graph goes backward."""
    run = Runs({"name": "sgmd", "preset": "paper"}, tmp_path).build(
        fake_score_updates=1, precision="bfloat16", weights="bfloat16", reuse_rollout="graph"
    )
    masters = dict(run.trained["fake_score"].named_parameters())
    before = {name: p.clone() for name, p in masters.items()}
    for _ in range(2):
        update(run)  # the backward refuses weights that were written since the forward
    assert not any(torch.equal(p, before[name]) for name, p in masters.items())
    for name, p in run.networks["fake_score"].named_parameters():
        assert torch.equal(p, masters[name].to(p.dtype))


@pytest.mark.parametrize("reuse", ["graph", True])
def test_only_the_first_fake_score_update_reuses_samples(reuse, tmp_path):
    """The others make rollouts of their own, with draws of their own."""
    run = build(tmp_path, reuse_rollout=reuse, fake_score_updates=3)
    phases, make = [], run.nets.rollout

    def rollout(batch: Batch) -> Tensor:
        phases.append((batch.draws.phase, torch.is_grad_enabled()))
        return make(batch)

    object.__setattr__(run.nets, "rollout", rollout)
    update(run)
    assert phases == [("student", True), ("fake_score/1", False), ("fake_score/2", False)]


@pytest.mark.parametrize("reuse", [False, "graph"])
def test_batched_rollouts_are_those_of_each_update_in_fewer_forwards(reuse, tmp_path):
    """On a video network, with gradients accumulated over two micro-batches."""
    samples, student_forwards, costs = [], [], []
    for way in ("sequential", "batched"):
        run = Runs(SGMD, tmp_path, way).build(
            precision="float64",
            nfe=3,
            stepping=0.5,
            accumulation=2,
            fake_score_updates=4,
            reuse_rollout=reuse,
            fake_score_rollouts=way,
        )
        learnt, passes = [], []
        loss, count = run.method.fake_score_loss, run.ledger.add

        def recorded(nets, batch, x0, loss=loss, learnt=learnt):
            learnt.append((x0, batch.text, batch.noise("n")))
            return loss(nets, batch, x0)

        def add(role, kind, samples, count=count, passes=passes):
            passes.append((role, kind))
            count(role, kind, samples)

        object.__setattr__(run.method, "fake_score_loss", recorded)
        run.ledger.add = add
        update(run)
        samples.append(learnt)
        student_forwards.append(passes.count(("student", "forward")))
        costs.append(run.ledger.forward_equivalents())
    assert len(samples[0]) == (6 if reuse else 8)
    torch.testing.assert_close(*samples, rtol=0, atol=1e-10)
    assert costs[0] == pytest.approx(costs[1], rel=1e-12)
    batches = [run.batches.batch(0, f"fake_score/{i}", 0) for i in range(bool(reuse), 4)]
    steps = [run.student_input.exit_step.step(batch) + 1 for batch in batches]
    assert len(set(steps)) > 1
    assert student_forwards[0] - student_forwards[1] == 2 * (sum(steps) - max(steps))


@pytest.mark.parametrize("reuse", [False, True, "graph"])
def test_the_fake_score_of_a_reused_graph_is_frozen_outside_its_own_pass(reuse, tmp_path):
    run = build(tmp_path, reuse_rollout=reuse)

    def trains(role: str) -> bool:
        return all(p.requires_grad for p in run.networks[role].parameters())

    for loss in run.student_losses([]):
        assert loss.x0.requires_grad
        break
    run.update_student()
    assert trains("student")
    assert not trains("fake_score")
    run.update_fake_score(0)
    assert trains("fake_score")
    assert not trains("student")


@pytest.mark.parametrize("reuse", [False, True, "graph"])
def test_samples_are_freed_once_they_are_reused(reuse, tmp_path):
    run = build(tmp_path, reuse_rollout=reuse)
    kept = run.update_student()
    assert (kept != [None]) == bool(reuse)
    updates = run.fake_score_samples(kept)
    first, count = next(updates), len(kept)
    assert (first is kept) == bool(reuse)
    list(updates)
    assert len(kept) == (0 if reuse else count)


def test_a_backward_through_a_shared_graph_computes_only_the_gradients_of_its_phase(tmp_path):
    run = build(tmp_path, reuse_rollout="graph")
    computed = set()
    for role, net in run.networks.items():
        for p in net.parameters():
            p.requires_grad_(True).register_hook(lambda _, role=role: computed.add(role))
    kept = []
    run.student.backward(run.student_losses(kept))
    assert computed == {"student"}
    run.fake_score.backward(run.fake_score_losses(0, kept))
    assert computed == {"student", "fake_score"}


@dataclass(frozen=True)
class Halving(Method):
    """A method whose hook halves the student's weights."""

    paper: ClassVar[str] = "none"
    shares_graph: ClassVar[bool] = True

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        x0 = nets.rollout(batch)
        return Loss({"size": x0.square().mean()}, x0)

    def after_student_update(self, networks: Mapping[str, nn.Module]) -> None:
        for p in networks["student"].parameters():
            p.mul_(0.5)


@pytest.mark.parametrize("reuse", [False, True, "graph"])
def test_a_network_has_the_weights_that_a_methods_hook_left_in_its_masters(reuse, tmp_path):
    method = {"name": f"{__file__}:Halving"}
    fields = {"precision": "bfloat16", "weights": "bfloat16", "reuse_rollout": reuse}
    run = Runs(method, tmp_path).build(**fields)
    run.update_student()
    before = {name: p.clone() for name, p in run.trained["student"].named_parameters()}
    run.after_student_update()
    for name, p in run.networks["student"].named_parameters():
        assert torch.equal(p, (0.5 * before[name]).to(p.dtype))


def test_values_of_the_log_stay_until_newer_ones(tmp_path):
    run = build(tmp_path)
    update(run)
    names = run.scalars.keys()
    assert {"student_loss", "fake_score_loss"} <= names
    run.update_student()
    assert run.scalars.keys() == names


@dataclass(frozen=True)
class Sized(Method):
    """A method that may share its graph and does not, and may keep its samples to itself."""

    paper: ClassVar[str] = "none"
    shares_graph: ClassVar[bool] = True
    gives_samples: bool = True

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        x0 = nets.rollout(batch)
        return Loss({"size": x0.square().mean()}, x0 if self.gives_samples else None)


SIZED = {"name": f"{__file__}:Sized"}


@pytest.mark.parametrize("reuse", ["graph", True])
def test_a_method_without_samples_can_not_reuse_them(reuse, tmp_path):
    method = SIZED | {"gives_samples": False}
    with pytest.raises(ValueError, match="Sized: .* no samples to reuse"):
        build(tmp_path, method, reuse_rollout=reuse).update_student()
    run = build(tmp_path / "fresh", method)
    assert run.update_student() == [None]


@pytest.mark.parametrize(("method", "reuse"), [(SGMD, True), (SIZED, "graph")])
def test_reused_samples_are_those_of_the_student_with_their_text_and_no_graph(
    method, reuse, tmp_path
):
    run = build(tmp_path, method, reuse_rollout=reuse, accumulation=2)
    kept = []
    losses = list(run.student_losses(kept))
    for micro, (loss, samples) in enumerate(zip(losses, kept, strict=True)):
        assert torch.equal(samples.x0, loss.x0)
        assert not samples.x0.requires_grad
        assert torch.equal(samples.text, run.batch("student", micro).text)
    own = run.method.fake_score_loss
    seen = []

    def recorded(nets: Nets, batch: Batch, x0: Tensor) -> Loss:
        seen.append((batch, x0))
        return own(nets, batch, x0)

    object.__setattr__(run.method, "fake_score_loss", recorded)
    run.update_fake_score(0, kept)
    for micro, ((batch, x0), samples) in enumerate(zip(seen, kept, strict=True)):
        assert x0 is samples.x0
        assert batch.text is samples.text
        expected = run.batch("fake_score/0", micro)
        assert torch.equal(batch.noise("n"), expected.noise("n"))
        assert not torch.equal(batch.text, expected.text)
