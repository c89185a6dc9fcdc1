"""Consistency models: their target, the pseudo-Huber distance and the highest level."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from method_setting import DATA, DRAWS, B, Role, setting
from torch import Tensor

from distill_bench.draws import Draws
from distill_bench.methods.consistency import Consistency


@pytest.mark.parametrize("target", ["average", "student"])
def test_a_consistency_model_follows_its_target_and_no_other_role(target):
    method = Consistency(target=target)
    nets, batch, _ = setting(method)
    loss = method.student_loss(nets, batch)
    assert loss.terms.keys() == {"consistency"}
    without = dataclasses.replace(nets, fake_score=None, unguided_teacher=None)
    if target == "student":
        without = dataclasses.replace(without, target=None)
    assert method.student_loss(without, batch).total == loss.total
    other = dataclasses.replace(nets, target=Role(2))
    assert (method.student_loss(other, batch).total == loss.total) == (target == "student")


@pytest.mark.parametrize("target", ["average", "student"])
def test_no_gradient_passes_through_the_target(target):
    """The derivative by the weight w of a student w tanh(x), whose target is held fixed."""
    w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    method = Consistency(steps=5, weight="one", target=target)
    nets, batch, _ = setting(method)
    seen = []

    def predict(x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        seen.append(x_t.detach())
        return w * torch.tanh(x_t)

    nets = dataclasses.replace(nets, student=predict, target=predict)
    method.student_loss(nets, batch).total.backward()
    lower, upper = (torch.tanh(x_t) for x_t in seen)
    error = w.detach() * (upper - lower)
    assert float(w.grad) == pytest.approx(float((error * upper).mean()), rel=1e-9)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("weight", ["inverse_step", "one"])
def test_the_pseudo_huber_distance_is_per_sample_over_its_own_step(weight, samples):
    """(sqrt(|error|^2 + c^2) - c) / d with c = 0.00054 sqrt(d), over s - r if asked for."""
    method = Consistency(steps=7, distance="pseudo_huber", weight=weight)
    nets, batch, _ = setting(method)
    batch = dataclasses.replace(
        batch,
        text=batch.text[:samples],
        draws=dataclasses.replace(DRAWS, indices=range(samples)),
        extras={
            "real_latents": lambda _: {"x0": DATA["x0"][:samples], "text": batch.text[:samples]}
        },
    )
    seen = []

    def kept(role: Role) -> Callable[..., Tensor]:
        def predict(x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
            seen.append((sigma, role(x_t, sigma, text)))
            return seen[-1][1]

        return predict

    nets = dataclasses.replace(nets, student=kept(nets.student), target=kept(nets.target))
    loss = method.student_loss(nets, batch).total
    (r, target), (s, x0) = seen
    d = 4
    c = 0.00054 * d**0.5
    distance = [(float((e**2).sum() + c**2) ** 0.5 - c) / d for e in x0 - target]
    if weight == "inverse_step":
        distance = [value / step for value, step in zip(distance, (s - r).tolist(), strict=True)]
    assert float(loss) == pytest.approx(sum(distance) / samples, rel=1e-9)


def test_a_given_draw_of_one_has_the_highest_level_of_a_consistency_model():
    """Real draws are below 1; those of `testing.student_gradient` may be 1."""

    class One(Draws):
        def uniform(self, purpose: str) -> Tensor:
            return torch.ones(B)

    levels, method = [], Consistency(steps=18)
    nets, batch, _ = setting(method)
    draws = One(5, 0, "student", range(B), torch.device("cpu"))
    student = nets.student

    def recorded(x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        levels.append(sigma)
        return student(x_t, sigma, text)

    nets = dataclasses.replace(nets, student=recorded)
    object.__setattr__(batch, "draws", draws)
    method.student_loss(nets, batch)
    assert levels[0].tolist() == [1.0] * B
