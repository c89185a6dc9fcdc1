"""Planted faults of a stranger's method, and of a run's settings, that the checks must find."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar
from unittest import mock

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

from distill_bench.discriminator import (
    Head,
    discriminator_loss,
    renoised_features,
    student_gan_loss,
)
from distill_bench.draws import Draws
from distill_bench.method import (
    Batch,
    Loss,
    Method,
    Nets,
    NotNegative,
    Scales,
    renoise,
    toward,
    velocity_loss,
)
from distill_bench.testing import checks
from distill_bench.testing.runs import Runs
from distill_bench.train.average import MovingAverage

FAULTS = Field(examples=["none", "labels"])


@dataclass(frozen=True)
class Stranger(Method):
    """A method with a discriminator on the teacher's features, and one fault at a time."""

    paper: ClassVar[str] = "none"

    fault: Annotated[str, FAULTS] = "none"
    gan_weight: Annotated[NotNegative, Scales("gan")] = 0.1
    unused: float = 1.0

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"real_latents"})

    @property
    def differentiated_roles(self) -> frozenset[str]:
        return frozenset({"unguided_teacher"})

    def modules(self, feature_width: int) -> Mapping[str, nn.Module]:
        return {"head": Head(feature_width)}

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        x0 = nets.rollout(batch)
        scores = renoise(nets, batch, x0.detach(), through_fake_score=False)
        if self.fault == "noise of the rollout":
            batch.noise("rollout/0")
        if self.fault == "level of the noise":
            batch.sigma("renoise/noise")
        if self.fault == "more integers":
            batch.draws.integers("own", 3)
            batch.draws.shared_integer("shared", 3)
        logits = self._logits(nets, batch, x0, batch.text, "gan")
        gan = student_gan_loss(-logits if self.fault == "student" else logits)
        weight = self.gan_weight**2 if self.fault == "squared weight" else self.gan_weight
        x0_teacher = scores.x0_teacher
        if self.fault == "unguided teacher":
            x0_teacher = nets.unguided_teacher(scores.x_t, scores.sigma, batch.text).detach()
        kl = toward(x0, scores.x0_fake - x0_teacher)
        if self.fault == "two terms":
            kl = self.gan_weight * kl
        return Loss({"kl": kl, "gan": weight * gan}, x0)

    def fake_score_loss(self, nets: Nets, batch: Batch, x0: Tensor) -> Loss:
        data = batch.extra("real_latents")
        fake = self._logits(nets, batch, x0, batch.text, "gan")
        text = batch.text if self.fault == "prompts for data" else data["text"]
        real = self._logits(nets, batch, data["x0"], text, "gan_real")
        if self.fault == "labels":
            fake, real = real, fake
        if self.fault == "detached":
            real = real.detach()
        loss = discriminator_loss(fake, -real if self.fault == "data" else real)
        text = {
            "null text": nets.null_text.expand_as(batch.text),
            "data's texts": data["text"],
            "other sample's prompt": batch.text.roll(1, 0),
        }.get(self.fault, batch.text)
        if self.fault == "own levels":
            batch = dataclasses.replace(batch, score_shift=1.0)
        if self.fault == "own bounds":
            batch = dataclasses.replace(batch, sigma_max=1.0)
        denoise = velocity_loss(nets.fake_score, batch, x0, text)
        return Loss({"denoise": denoise, "discriminator": loss})

    def _logits(self, nets: Nets, batch: Batch, x0: Tensor, text: Tensor, purpose: str) -> Tensor:
        role = nets.unguided_teacher
        return nets.modules["head"](renoised_features(role, batch, x0, text, purpose, 1.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("settings")


@pytest.fixture
def runs_of(folder, request):
    def make(fault: str) -> Runs:
        prefix = re.sub(r"\W+", "-", request.node.name)
        return Runs({"name": f"{__file__}:Stranger", "fault": fault}, folder, prefix)

    return make


@pytest.mark.parametrize(
    ("fault", "check", "says"),
    [
        ("labels", checks.check_discriminator, "the student's loss does not oppose that"),
        ("data", checks.check_discriminator, "samples in opposite directions"),
        ("detached", checks.check_discriminator, "samples in opposite directions .slopes -?0 and"),
        ("student", checks.check_discriminator, "the student's loss does not oppose that"),
        ("noise of the rollout", checks.check_draws, "draws 'rollout/0', the rollout's own noise"),
        ("squared weight", checks.check_hyperparameters, "does not multiply student/gan by 2"),
        ("two terms", checks.check_hyperparameters, "does not multiply student/kl by 1"),
        ("none", checks.check_hyperparameters, "the field unused changes no loss"),
        ("null text", checks.check_inputs, "fake_score sees samples with the null text alone"),
        ("data's texts", checks.check_inputs, "fake_score sees samples with the texts of extra"),
        ("other sample's prompt", checks.check_inputs, "sees samples with the texts of others"),
        ("prompts for data", checks.check_inputs, "sees extra data with the texts of samples"),
        ("own levels", checks.check_inputs, "fake_score/0, .* do not rise with score_shift"),
        ("own bounds", checks.check_inputs, "fake_score/0, .* not between sigma_min and sigma_max"),
        ("unguided teacher", checks.check_inputs, "the loss does not depend on guidance_scale"),
    ],
)
def test_a_fault_of_a_method_is_found(fault, check, says, runs_of):
    with pytest.raises(AssertionError, match=f"Stranger, {fault}: {check.__name__}: .*{says}"):
        check(runs_of(fault))


@pytest.mark.parametrize(
    "check",
    [checks.check_discriminator, checks.check_draws, checks.check_inputs, checks.check_settings],
)
def test_a_method_without_these_faults_passes(check, runs_of):
    check(runs_of("none"))


def test_a_level_and_a_noise_of_one_purpose_are_found(runs_of):
    says = "'renoise/noise', student, update 0 draws both noise .* and uniform from one stream"
    with pytest.raises(AssertionError, match=f"check_draws: {says}"):
        checks.check_draws(runs_of("level of the noise"))


def without_purpose(draws: Draws, purpose: str) -> tuple[object, ...]:
    return draws.seed, draws.student_update, draws.phase


def without_phase(draws: Draws, purpose: str) -> tuple[object, ...]:
    return draws.seed, draws.student_update, purpose


def without_update(draws: Draws, purpose: str) -> tuple[object, ...]:
    return draws.seed, draws.phase, purpose


def with_indices(draws: Draws, purpose: str) -> tuple[object, ...]:
    return draws.seed, draws.student_update, draws.phase, purpose, draws.indices


def of_one_sample(draws: Draws) -> Draws:
    return dataclasses.replace(draws, indices=[0] * len(draws.indices))


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("noise", without_purpose),
        ("noise", without_phase),
        ("uniform", without_purpose),
        ("uniform", without_update),
        ("integers", without_purpose),
        ("shared_integer", without_phase),
    ],
)
def test_draws_that_ignore_a_part_of_their_key_are_found(kind, key, runs_of):
    """Only one kind of draw ignores it, as if that kind had a key of its own."""
    draw, own_key = getattr(Draws, kind), Draws._key

    def faulty(draws: Draws, *arguments: object) -> object:
        with mock.patch.object(Draws, "_key", key):
            return draw(draws, *arguments)

    # a micro-batch draws only one integer of its own, the prompt, and one shared one, the exit step
    runs = runs_of("more integers")
    with (
        mock.patch.object(Draws, kind, faulty),
        pytest.raises(
            AssertionError, match=f"check_draws: .* have the same {kind.replace('_', ' ')}"
        ),
    ):
        checks.check_draws(runs)
    assert Draws._key is own_key


@pytest.mark.parametrize("kind", ["noise", "uniform", "integers"])
def test_one_draw_for_all_samples_is_found(kind, runs_of):
    draw = getattr(Draws, kind)

    def faulty(draws: Draws, *arguments: object) -> object:
        return draw(of_one_sample(draws), *arguments)

    with (
        mock.patch.object(Draws, kind, faulty),
        pytest.raises(AssertionError, match=f"of sample 1, .* have the same {kind}"),
    ):
        checks.check_draws(runs_of("none"))


def test_a_shared_draw_that_differs_between_micro_batches_is_found(runs_of):
    draw = Draws.shared_integer

    def faulty(draws: Draws, *arguments: object) -> object:
        with mock.patch.object(Draws, "_key", with_indices):
            return draw(draws, *arguments)

    with (
        mock.patch.object(Draws, "shared_integer", faulty),
        pytest.raises(
            AssertionError, match="'exit', student, update 0: the shared integer below 2"
        ),
    ):
        checks.check_draws(runs_of("none"))


def reversed_update(average: MovingAverage) -> None:
    with torch.no_grad():
        for value, parameter in zip(average.weights.values(), average.parameters(), strict=True):
            value.lerp_(parameter, average.decay)


def test_an_average_in_the_wrong_direction_is_found(runs_of):
    with (
        mock.patch.object(MovingAverage, "update", reversed_update),
        pytest.raises(AssertionError, match=r"check_settings: the kept student's \S+ is not its"),
    ):
        checks.check_settings(runs_of("none"))


def test_learning_rates_that_are_exchanged_are_found(runs_of):
    """Exchanged after the config is read, as if the trainer had taken one for the other."""
    build = checks.check_settings.__wrapped__.__globals__["build"]

    def exchanged(config, *inputs, **options):
        rates = {"student_lr": config.fake_score_lr, "fake_score_lr": config.student_lr}
        return build(config.model_copy(update=rates), *inputs, **options)

    with (
        mock.patch("distill_bench.testing.setting_checks.build", exchanged),
        pytest.raises(AssertionError, match="the student moves by 0.001 .* rate is 0.003"),
    ):
        checks.check_settings(runs_of("none"))
