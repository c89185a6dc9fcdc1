"""Sampling of the student and of the teacher's ODE, step by step."""

import pytest
import torch
from torch import Tensor

from distill_bench.noise import Stepping, student_sigmas, teacher_sigmas, velocity_to_x0
from distill_bench.rollout import euler, rollout

SHAPE = (2, 1, 2, 1, 1)
SIGMAS = torch.tensor([1.0, 0.8, 0.5, 0.3], dtype=torch.float64)
TEXT = torch.tensor([0.3, -0.7], dtype=torch.float64).reshape(2, 1, 1)


class Student:
    """A network whose velocity depends on x_t, sigma and text; it records its noise levels."""

    def __init__(self) -> None:
        self.scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        self.levels: list[list[float]] = []

    def velocity(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        self.levels.append(sigma.tolist())
        return self.scale * x_t * (1 + sigma.reshape(-1, 1, 1, 1, 1)) + text[..., None, None]

    def __call__(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        return velocity_to_x0(self.velocity(x_t, sigma, text), x_t, sigma)


@pytest.fixture
def noises() -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return list(torch.randn(4, *SHAPE, generator=draw, dtype=torch.float64))


def by_hand(student: Student, noises: list[Tensor], stepping: Stepping) -> tuple[Tensor, Tensor]:
    """x_t of the last step, and the prediction there."""
    x_t = noises[0]
    for i in range(len(noises)):
        sigma = SIGMAS[i]
        velocity = student.velocity(x_t, sigma.expand(2), TEXT)
        x0, eps = x_t - sigma * velocity, x_t + (1 - sigma) * velocity
        if i + 1 == len(noises):
            return x_t.detach(), x0
        lower = SIGMAS[i + 1]
        share = {"renoise": 1.0, "ode": 0.0}.get(stepping, stepping)
        x_t = (1 - lower) * x0 + lower * ((1 - share**2) ** 0.5 * eps + share * noises[i + 1])
    raise AssertionError


@pytest.mark.parametrize("stepping", ["renoise", "ode", 0.6])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_each_step_predicts_and_moves_to_the_next_level(steps, stepping, noises):
    student, by_hands = Student(), Student()
    x0 = rollout(student, noises[:steps], SIGMAS, TEXT, stepping)
    _, expected = by_hand(by_hands, noises[:steps], stepping)
    torch.testing.assert_close(x0, expected)
    assert student.levels == by_hands.levels
    assert not x0.requires_grad


@pytest.mark.parametrize("stepping", ["renoise", "ode"])
def test_only_the_last_step_keeps_its_graph(stepping, noises):
    student = Student()
    x0 = rollout(student, noises[:3], SIGMAS, TEXT, stepping, graph=True)
    x_t, _ = by_hand(student, noises[:3], stepping)
    (slope,) = torch.autograd.grad(x0.sum(), student.scale)
    torch.testing.assert_close(slope, (-SIGMAS[2] * x_t * (1 + SIGMAS[2])).sum())


@pytest.mark.parametrize("stepping", ["renoise", "ode", 0.6])
def test_samples_that_end_at_different_steps_go_together_until_they_end(stepping):
    draw = torch.Generator().manual_seed(0)
    noises = list(torch.randn(4, 5, *SHAPE[1:], generator=draw, dtype=torch.float64))
    text = torch.linspace(-1, 1, 5, dtype=torch.float64).reshape(5, 1, 1)
    going = [5, 4, 4, 2]  # samples that make each step
    student = Student()
    ragged = [noise[:count] for noise, count in zip(noises, going, strict=True)]
    x0 = rollout(student, ragged, SIGMAS, text, stepping)
    assert [len(levels) for levels in student.levels] == going
    for i, steps in enumerate((4, 4, 3, 3, 1)):
        one = slice(i, i + 1)
        own = [noise[one] for noise in noises[:steps]]
        expected = rollout(Student(), own, SIGMAS, text[one], stepping)
        torch.testing.assert_close(x0[one], expected)


def test_the_teachers_euler_steps_follow_its_velocity_at_the_upper_level(noises):
    student, sigmas = Student(), torch.tensor([1.0, 0.6, 0.0], dtype=torch.float64)
    x_t = noises[0]
    for high, low in ((1.0, 0.6), (0.6, 0.0)):
        level = torch.full((2,), high, dtype=torch.float64)
        x_t = x_t + (low - high) * student.velocity(x_t, level, TEXT)
    x0 = euler(student, noises[0], sigmas, TEXT)
    torch.testing.assert_close(x0, x_t)
    assert not x0.requires_grad


def test_euler_steps_of_a_known_clip_end_in_it(noises):
    """Every trajectory is a straight line, so any number of steps is exact."""
    clip = noises[1]
    for steps in (1, 5):
        sigmas = teacher_sigmas(steps, 3.0).double()
        assert len(sigmas) == steps + 1
        torch.testing.assert_close(euler(lambda *_: clip, noises[0], sigmas, TEXT), clip)


def test_levels_are_evenly_spaced_before_the_shift():
    def unshifted(sigma: Tensor, shift: float) -> Tensor:
        return sigma / (shift - (shift - 1) * sigma)

    for shift in (0.5, 1.0, 4.0):
        even = torch.tensor([1.0, 0.75, 0.5, 0.25])
        torch.testing.assert_close(unshifted(student_sigmas(4, shift), shift), even)
        even = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
        torch.testing.assert_close(unshifted(teacher_sigmas(4, shift), shift), even)
