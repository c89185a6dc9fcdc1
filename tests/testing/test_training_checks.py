"""Planted faults of a stranger's presets, hook and state, which the checks must find."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import pytest
import torch
from torch import nn

from distill_bench.method import (
    Batch,
    Loss,
    Method,
    Nets,
    NotNegative,
    Preset,
    Scales,
    renoise,
    toward,
)
from distill_bench.testing import checks
from distill_bench.testing.runs import Runs


@dataclass(frozen=True)
class Plain(Method):
    """A method with a preset, a buffer and no hook."""

    paper: ClassVar[str] = "none"
    presets: ClassVar[Mapping[str, Preset]] = {
        "half": Preset("none", {"method.scale": 0.5, "fake_score_updates": 1, "nfe": 4})
    }
    persistent: ClassVar[bool] = True

    scale: Annotated[NotNegative, Scales("kl")] = 1.0

    def modules(self, feature_width: int) -> Mapping[str, nn.Module]:
        module = nn.Module()
        module.register_buffer("gap", torch.ones(2), persistent=self.persistent)
        return {"average": module}

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        x0 = nets.rollout(batch)
        scores = renoise(nets, batch, x0.detach(), through_fake_score=False)
        gap = scores.x0_fake - scores.x0_teacher
        average = nets.modules["average"].gap
        average.lerp_(gap.abs().mean().expand(2), 0.5)
        return Loss({"kl": self.scale * toward(x0, gap / average[0])}, x0)


class Loud(Plain):
    """A preset whose gradient is not finite."""

    presets: ClassVar[Mapping[str, Preset]] = {"loud": Preset("none", {"method.scale": 1e39})}


class Impossible(Plain):
    """A preset that cannot be trained."""

    presets: ClassVar[Mapping[str, Preset]] = {"graph": Preset("none", {"reuse_rollout": "graph"})}


class Forgetful(Plain):
    """A buffer that no checkpoint has."""

    persistent: ClassVar[bool] = False


class Attribute(Plain):
    """State in an attribute."""

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        self.__dict__["updates"] = self.__dict__.get("updates", 0) + 1
        loss = super().student_loss(nets, batch)
        return Loss({"kl": self.__dict__["updates"] * loss.terms["kl"]}, loss.x0)


class Undeclared(Plain):
    """A hook that moves the student towards the fake score, without mixes_weights."""

    def after_student_update(self, networks: Mapping[str, nn.Module]) -> None:
        for p, q in zip(
            *(networks[r].parameters() for r in ("student", "fake_score")), strict=True
        ):
            p.lerp_(q, 0.1)


class Decay(Plain):
    """A hook that mixes no weights."""

    def after_student_update(self, networks: Mapping[str, nn.Module]) -> None:
        for parameter in networks["student"].parameters():
            parameter.mul_(0.99)


class Declared(Undeclared):
    """A hook that mixes weights, as declared."""

    mixes_weights: ClassVar[bool] = True


class InVain(Decay):
    """mixes_weights without reason."""

    mixes_weights: ClassVar[bool] = True


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("training")


@pytest.mark.parametrize(
    ("method", "check", "says"),
    [
        (Loud, checks.check_presets, "preset loud: training: Collapsed: the gradient of the stud"),
        (Impossible, checks.check_presets, "ConfigError: "),
        (Forgetful, checks.check_resume, "the buffer average.gap of modules is lost when a run is"),
        (Attribute, checks.check_resume, "a run stopped after each update (state belongs into buf"),
        (Undeclared, checks.check_hook, "after_student_update mixes the weights of student with"),
        (InVain, checks.check_hook, "mixes_weights is set, but after_student_update mixes no w"),
    ],
)
def test_a_fault_is_found(method, check, says, folder):
    message = re.escape(f"{method.__name__}: {check.__name__}: {says}")
    with pytest.raises(AssertionError, match=message):
        check(Runs(method, folder, f"{method.__name__}-{check.__name__}"))


@pytest.mark.parametrize(
    ("method", "check"),
    [
        (Plain, checks.check_presets),
        (Plain, checks.check_resume),
        (Declared, checks.check_hook),
        (Decay, checks.check_hook),
    ],
)
def test_a_method_without_a_fault_passes(method, check, folder):
    check(Runs(method, folder, f"{method.__name__}-{check.__name__}"))
