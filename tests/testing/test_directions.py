"""Planted faults in the direction of a stranger's hyper-parameters, which the check must find."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import pytest
from torch import nn

from distill_bench.discriminator import Head, renoised_features, student_gan_loss
from distill_bench.method import (
    Batch,
    Count,
    Depth,
    Equals,
    Loss,
    Lowers,
    Method,
    Nets,
    NoDirection,
    NotNegative,
    Positive,
    Raises,
    Share,
    dmd_normaliser,
    renoise,
    toward,
)
from distill_bench.noise import teacher_sigmas
from distill_bench.rollout import euler
from distill_bench.testing import __main__ as command
from distill_bench.testing import checks
from distill_bench.testing.hyperparameter_checks import undirected
from distill_bench.testing.runs import Runs


@dataclass(frozen=True)
class Terms(Method):
    """A method whose numbers act on its losses, with one fault at a time."""

    paper: ClassVar[str] = "none"
    fault: ClassVar[str] = "none"

    alpha: Annotated[float, Lowers("pull", linear=True)] = 1.0
    epsilon: Annotated[NotNegative, Lowers("gradient/kl")] = 0.1
    steps: Annotated[Count, Raises("evaluations/teacher", linear=True)] = 2

    @property
    def differentiated_roles(self) -> frozenset[str]:
        return frozenset({"fake_score"})

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        x0 = nets.rollout(batch)
        scores = renoise(nets, batch, x0, through_fake_score=True)
        gap, n = scores.x0_fake - scores.x0_teacher, dmd_normaliser(x0, scores.x0_teacher)
        steps = 2 if self.fault == "no steps" else self.steps
        sigmas = teacher_sigmas(steps, 1.0).to(x0)
        x_a = euler(nets.teacher, batch.noise("walk"), sigmas, batch.text)
        alpha = {
            "sign": -self.alpha,
            "square": self.alpha**2,
            "wrong term": 1.0,
        }.get(self.fault, self.alpha)
        weight = self.alpha if self.fault in ("wrong term", "two terms") else 1.0
        kl = toward(x0, gap.detach() / (n + (0 if self.fault == "no epsilon" else self.epsilon)))
        return Loss({"kl": weight * kl, "pull": (gap * (x_a - x0 - alpha * gap)).mean()}, x0)


@dataclass(frozen=True)
class Others(Method):
    """A method whose numbers act on a hook, a rate and a depth, with one fault at a time."""

    paper: ClassVar[str] = "none"
    fault: ClassVar[str] = "none"

    keep: Annotated[Share, Lowers("moves/fake_score", linear=True)] = 0.9
    head_lr: Annotated[Positive, Equals("rate/head")] = 1e-4
    share: Depth = 0.5

    @property
    def differentiated_roles(self) -> frozenset[str]:
        return frozenset({"unguided_teacher"})

    def modules(self, feature_width: int) -> Mapping[str, nn.Module]:
        return {"head": Head(feature_width)}

    def learning_rates(self) -> Mapping[str, float]:
        return {"head": 2 * self.head_lr if self.fault == "twice the rate" else self.head_lr}

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        x0, depth = nets.rollout(batch), self.share**2 if self.fault == "depth" else self.share
        features = renoised_features(nets.unguided_teacher, batch, x0, batch.text, "gan", depth)
        return Loss({"gan": student_gan_loss(nets.modules["head"](features))}, x0)

    def after_student_update(self, networks: Mapping[str, nn.Module]) -> None:
        moved, other = networks["fake_score"], networks["student"]
        if self.fault == "reversed pull":
            moved, other = other, moved
        keep = 1 - self.keep if self.fault == "share of the other" else self.keep
        for parameter, target in zip(moved.parameters(), other.parameters(), strict=True):
            parameter.lerp_(target, 1 - keep)


@dataclass(frozen=True)
class Unmarked(Terms):
    """A number without a mark."""

    alpha: float = 1.0


@dataclass(frozen=True)
class Misspelt(Terms):
    """A mark that names no quantity."""

    alpha: Annotated[float, Lowers("pul", linear=True)] = 1.0


@dataclass(frozen=True)
class Excused(Terms):
    """A number with a reason in place of a direction."""

    alpha: Annotated[float, NoDirection("it bends the path")] = 1.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("directions")


def check_with(method: type[Method], fault: str, folder, monkeypatch) -> None:
    monkeypatch.setattr(method, "fault", fault)
    prefix = re.sub(r"\W+", "-", f"{method.__name__}-{fault}")
    checks.check_hyperparameters(Runs(method, folder, prefix))


@pytest.mark.parametrize(
    ("method", "fault", "says"),
    [
        (Terms, "sign", "alpha lowers pull, but from 0.5 to 1 pull goes from"),
        (Terms, "square", "alpha lowers pull linearly, but at 0.5, 1, 2, 10, 100 pull is"),
        (Terms, "wrong term", "alpha names pull, but it also changes student/kl; name the term kl"),
        (Terms, "two terms", "alpha names pull, but it also changes student/kl; name the term kl"),
        (Terms, "no epsilon", "the field epsilon changes no loss"),
        (Terms, "no steps", "the field steps changes no loss"),
        (Others, "reversed pull", "keep lowers moves/fake_score, but no value changes all"),
        (Others, "share of the other", "keep lowers moves/fake_score, but from"),
        (Others, "twice the rate", "head_lr equals rate/head, but at 5e-05 rate/head is 0.0001"),
        (Others, "depth", "share equals depth, but at 0.05 depth is 0.0025"),
        (Unmarked, "none", "the number alpha states no direction; mark it by Scales, Equals, R"),
        (Misspelt, "none", "alpha lowers pul, but no value changes all of these; distill_bench/fi"),
    ],
)
def test_a_number_that_acts_otherwise_than_stated_is_found(
    method, fault, says, folder, monkeypatch
):
    message = re.escape(f"{method.__name__}: check_hyperparameters: {says}")
    with pytest.raises(AssertionError, match=message):
        check_with(method, fault, folder, monkeypatch)


def test_a_mark_names_its_quantities_and_is_linear_only_if_it_says_so():
    for kind, sign in ((Raises, 1), (Lowers, -1)):
        plain, linear = kind("kl", "gradient/kl"), kind("kl", linear=True)
        assert (plain.quantities, plain.linear) == (("kl", "gradient/kl"), False)
        assert (linear.quantities, linear.linear) == (("kl",), True)
        assert plain.sign * sign > 0


@pytest.mark.parametrize("method", [Terms, Others])
def test_numbers_that_act_as_stated_pass(method, folder, monkeypatch):
    check_with(method, "none", folder, monkeypatch)


def test_the_report_gives_the_reason_of_a_number_without_a_direction(capsys, monkeypatch):
    assert undirected(Excused) == {"alpha": "it bends the path"}
    monkeypatch.setattr(command, "CHECKS", ())
    assert command.main([f"{__name__}:Excused", "--no-ranks"]) == 0
    assert "alpha states no direction: it bends the path" in capsys.readouterr().out
