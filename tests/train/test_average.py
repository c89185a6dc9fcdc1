"""The student's moving average: its weights, its prediction, and its place in an update."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from distill_bench.method import Batch, Loss, Method, Nets
from distill_bench.networks.denoiser import Denoiser
from distill_bench.testing.runs import Runs
from distill_bench.train.average import MovingAverage, NoAverage
from distill_bench.train.loop import update


@pytest.mark.parametrize("own_network", [False, True])
def test_the_average_follows_the_student_by_one_minus_its_decay(own_network):
    """After n updates at constant weights, decay^n of the start is left."""
    student, other = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        for net in (student, other):
            net.weight.fill_(1.0)
    average = MovingAverage(student, other if own_network else student, 0.9, own_network)
    with torch.no_grad():
        student.weight.copy_(torch.tensor([[3.0, 1.0]]))
    for count in (1, 2, 3):
        average.update()
        left = 0.9**count
        expected = torch.tensor([[3 - 2 * left, 1.0]])
        torch.testing.assert_close(average.sampled()["weight"], expected)
    assert student.weight.tolist() == [[3.0, 1.0]]
    assert average.laid_over is (None if own_network else average.weights)
    if own_network:
        torch.testing.assert_close(other.weight.detach(), expected)


def test_without_an_average_the_student_itself_is_sampled():
    student = nn.Linear(2, 1)
    average = NoAverage(student, student)
    average.update()
    assert average.weights == {}
    for name, parameter in student.named_parameters():
        assert average.sampled()[name] is parameter


def test_without_an_average_the_target_predicts_as_the_student(tmp_path):
    run = Runs("dmd2", tmp_path).build(teacher="gaussian", data=None, ema=None)
    run.update_student()
    batch = run.batch("student")
    inputs = batch.noise("x"), batch.sigma("s"), batch.text
    assert torch.equal(run.nets.target(*inputs), run.nets.student(*inputs))


@pytest.mark.parametrize("reuse_rollout", [False, True, "graph"])
def test_the_average_follows_also_a_student_whose_samples_are_reused(reuse_rollout, tmp_path):
    fields = {"teacher": "gaussian", "data": None, "ema": 0.75, "reuse_rollout": reuse_rollout}
    run = Runs("sgmd", tmp_path).build(**fields)
    start = {name: p.detach().clone() for name, p in run.trained["student"].named_parameters()}
    update(run)
    for name, p in run.trained["student"].named_parameters():
        assert not torch.equal(p, start[name])
        expected = 0.75 * start[name] + 0.25 * p.detach()
        torch.testing.assert_close(run.average.sampled()[name], expected)


@dataclass(frozen=True)
class Doubling(Method):
    """A method whose hook doubles the student's first weight after each update."""

    paper = "none"

    learnt: ClassVar[list[Tensor]] = []  # the fake score's samples

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        x0 = nets.rollout(batch)
        return Loss({"size": x0.square().mean()}, x0)

    def fake_score_loss(self, nets: Nets, batch: Batch, x0: Tensor) -> Loss:
        self.learnt.append(x0)
        return super().fake_score_loss(nets, batch, x0)

    def after_student_update(self, networks) -> None:
        next(networks["student"].parameters()).mul_(2)


def test_the_average_includes_the_hook_and_the_target_predicts_with_it(tmp_path):
    fields = {"teacher": "gaussian", "data": None, "ema": 0.75, "student_lr": 0.1}
    run = Runs(f"{__file__}:Doubling", tmp_path).build(**fields)
    parameter = next(run.networks["student"].parameters())
    start = parameter.detach().clone()
    run.update_student()
    stepped = parameter.detach().clone()
    run.after_student_update()
    assert torch.equal(parameter.detach(), 2 * stepped)
    name, average = next(iter(run.average.sampled().items()))
    torch.testing.assert_close(average, 0.75 * start + 0.25 * 2 * stepped)
    batch = run.batch("student")
    inputs = batch.noise("x"), batch.sigma("s"), batch.text
    averaged = run.pipeline.student()
    averaged.load_state_dict(dict(run.average.sampled()))
    with torch.no_grad():
        expected = Denoiser(averaged, "student", run.ledger)(*inputs)
        torch.testing.assert_close(run.nets.target(*inputs), expected)
        assert not torch.allclose(run.nets.student(*inputs), expected)
    assert name == "blocks.0.weight"


def test_the_fake_score_learns_from_the_student_after_its_hook(tmp_path):
    fields = {"teacher": "gaussian", "data": None, "ema": 0.75, "student_lr": 0.1}
    run = Runs(f"{__file__}:Doubling", tmp_path).build(**fields, fake_score_updates=1)
    run.method.learnt.clear()
    update(run)
    run.student_updates = 0  # the draws of the update
    with torch.no_grad():
        expected = run.nets.rollout(run.batch("fake_score/0"))
    (learnt,) = run.method.learnt
    assert torch.equal(learnt, expected)
