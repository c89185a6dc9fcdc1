"""One phase of an update: it steps its roles once, or stops before any weight moves."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
import torch

from distill_bench.method import Batch, Loss, Method, Nets
from distill_bench.testing.runs import Runs
from distill_bench.train.loop import update
from distill_bench.train.phase import Collapsed


@dataclass(frozen=True)
class Scaled(Method):
    """A method whose samples are the student's, times a factor."""

    paper = "none"
    factor: float = 1.0

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        x0 = self.factor * nets.rollout(batch)
        return Loss({"size": x0.square().mean()}, x0)


@dataclass(frozen=True)
class Faulty(Method):
    """A method whose loss is not a number, or does not depend on the student."""

    paper: ClassVar[str] = "none"
    fault: Literal["value", "slope", "detached", "no term"] = "value"

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        x0 = nets.rollout(batch)
        size = x0.square().mean()
        terms = {
            "value": {"size": size, "odd": float("nan") * size},
            "slope": {"size": size, "odd": (size - size.detach()).sqrt()},
            "detached": {"size": size.detach()},
            "no term": {},
        }
        return Loss(terms[self.fault], x0)


def weights(run) -> list[torch.Tensor]:
    return [p.detach().clone() for net in run.networks.values() for p in net.parameters()]


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (
            "value",
            Collapsed,
            r"the student is nan .not finite: student_loss, odd.$",
        ),
        ("slope", Collapsed, "the gradient of the student is (nan|inf)$"),
        (
            "detached",
            ValueError,
            r"Faulty: the student loss \(size\) has no gradient",
        ),
        ("no term", ValueError, r"Faulty: the student loss \(\) has no gradient"),
    ],
)
def test_a_loss_that_can_not_be_followed_moves_no_weight(fault, error, message, tmp_path):
    method = {"name": f"{__file__}:Faulty", "fault": fault}
    run = Runs(method, tmp_path).build(teacher="gaussian", data=None)
    before = weights(run)
    with pytest.raises(error, match=message):
        run.update_student()
    assert all(map(torch.equal, weights(run), before))


def test_a_gradient_of_one_optimiser_that_is_not_finite_stops_them_all(tmp_path):
    """The discriminator on the teacher's features has a rate, and thus an optimiser, of its own."""
    method = {"name": "dmd2", "gan": "teacher", "discriminator_lr": 1e-2}
    run = Runs(method, tmp_path).build(teacher="gaussian", data=None)
    assert list(run.fake_score.optimisers) == ["fake_score", "head"]
    next(run.networks["modules"]["head"].parameters()).data.fill_(float("inf"))
    before = weights(run)
    with pytest.raises(Collapsed, match="the gradient of the head is nan"):
        run.update_fake_score(0)
    assert all(map(torch.equal, weights(run), before))


def test_the_spread_of_samples_is_that_of_all_ranks(tmp_path):
    """From the means of x0 and x0^2 over the ranks: halves at 0 and 2 have standard deviation 1."""
    run = Runs("dmd2", tmp_path).build(teacher="gaussian", data=None)
    other = type(run.processes)(run.processes.device)
    other.means = lambda scalars: (
        dict(scalars)
        | {
            "x0_mean": torch.tensor(1.0),
            "x0_std": torch.tensor(2.0),
        }
    )
    scalars = dataclasses.replace(run.student, processes=other).step(run.student_losses([]))
    assert float(scalars["x0_std"]) == 1
    assert "x0_mean" not in scalars


@pytest.mark.parametrize("grad_clip", [1e-3, 1e6])
def test_gradients_are_averaged_clipped_and_freed(grad_clip, tmp_path):
    """Another rank with equal gradients would halve their sum: here each is halved."""
    run = Runs("dmd2", tmp_path).build(teacher="gaussian", data=None, grad_clip=grad_clip)
    parameters = list(run.networks["student"].parameters())
    run.student.backward(run.student_losses([]))
    expected = [0.5 * p.grad for p in parameters]
    run.student.zero_grad()
    norm = float(torch.cat([g.flatten() for g in expected]).norm())
    processes, stepped = type(run.processes)(run.processes.device), []

    def halve(parameters):
        for p in parameters:
            p.grad.mul_(0.5)

    processes.average_gradients = halve
    run.optimisers["student"].register_step_pre_hook(
        lambda *_: stepped.extend(p.grad.clone() for p in parameters)
    )
    phase = dataclasses.replace(run.student, processes=processes)
    scalars = phase.step(run.student_losses([]))
    assert scalars["student_grad_norm"] == pytest.approx(norm, rel=1e-5)
    scale = min(1.0, grad_clip / norm)
    for gradient, whole in zip(stepped, expected, strict=True):
        torch.testing.assert_close(gradient, scale * whole, rtol=2e-3, atol=1e-9)
    assert all(p.grad is None for p in parameters)


def test_hook_and_average_come_between_the_students_step_and_the_fake_scores(tmp_path):
    run, order = Runs("dmd2", tmp_path).build(teacher="gaussian", data=None), []
    for name, optimiser in run.optimisers.items():
        optimiser.register_step_post_hook(lambda *_, name=name: order.append(name))
    hook = run.after_student_update

    def recorded() -> None:
        order.append("hook")
        hook()

    run.after_student_update = recorded
    update(run)
    assert order == ["student", "hook", "fake_score", "fake_score"]


def test_each_micro_batch_goes_backward_before_the_next_is_made(tmp_path):
    """Memory holds one graph at a time."""
    run = Runs("dmd2", tmp_path).build(teacher="gaussian", data=None, accumulation=2)
    order = []

    def differentiate(total: torch.Tensor) -> None:
        order.append("backward")
        total.backward()

    def losses():
        for loss in run.student_losses([]):
            order.append("loss")
            yield loss

    dataclasses.replace(run.student, differentiate=differentiate).backward(losses())
    assert order == ["loss", "backward"] * 2


def test_a_step_frees_the_gradients_of_every_optimiser_of_its_phase(tmp_path):
    method = {"name": "dmd2", "gan": "teacher", "discriminator_lr": 1e-2}
    run = Runs(method, tmp_path).build(teacher="gaussian", data=None)
    assert len(run.fake_score.optimisers) == 2
    run.update_student()
    run.update_fake_score(0)
    assert all(p.grad is None for net in run.networks.values() for p in net.parameters())


@pytest.mark.parametrize(
    ("std", "collapses"), [(1.0, False), (0.019, True), (0.021, False), (49, False), (51, True)]
)
def test_samples_far_from_unit_variance_stop_the_run(std, collapses, tmp_path):
    """Below a standard deviation of 0.02 and above 50."""
    plain = Runs({"name": f"{__file__}:Scaled"}, tmp_path, "1").build(teacher="gaussian", data=None)
    plain.update_student()
    method = {"name": f"{__file__}:Scaled", "factor": std / float(plain.scalars["x0_std"])}
    run = Runs(method, tmp_path).build(teacher="gaussian", data=None)
    before = [p.detach().clone() for p in run.networks["student"].parameters()]
    if collapses:
        with pytest.raises(Collapsed, match=f"samples have standard deviation {std}"):
            run.update_student()
    else:
        run.update_student()
    moved = [
        not torch.equal(p, first)
        for p, first in zip(run.networks["student"].parameters(), before, strict=True)
    ]
    assert any(moved) != collapses
