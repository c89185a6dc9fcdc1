"""Declarations of methods against their losses: needs, roles, weighted terms and logs."""

import dataclasses
from typing import get_type_hints

import pytest
import torch
from method_setting import DRAWS, SHAPE, B, Role, setting
from torch import Tensor, nn

from distill_bench.draws import Draws
from distill_bench.method import Scales, added
from distill_bench.methods.consistency import Consistency
from distill_bench.methods.decoupled_dmd import DecoupledDMD
from distill_bench.methods.dmd import DMD
from distill_bench.methods.dmd2 import DMD2
from distill_bench.methods.dp_dmd import DPDMD
from distill_bench.methods.f_distill import FDistill
from distill_bench.methods.gradient_template import GradientTemplate
from distill_bench.methods.ida import IDA
from distill_bench.methods.sgmd import SGMD
from distill_bench.methods.sid import SiD
from distill_bench.methods.tsg_fisher import TSGFisher
from distill_bench.methods.tsg_sim import TSGSIM

METHODS = [
    Consistency(),
    Consistency(target="student"),
    DecoupledDMD(),
    DMD(),
    DMD2(),
    DMD2(gan="fake_score", r1_weight=1.0),
    DMD2(gan="teacher", r1_weight=1.0),
    DPDMD(),
    FDistill(r1_weight=1.0),
    FDistill("reverse_kl"),
    GradientTemplate(),
    GradientTemplate("n", normaliser="none"),
    GradientTemplate(b="1/n"),
    GradientTemplate("0", "0.0", "0.1"),
    GradientTemplate(b="1/n", teacher_stop_gradient=False),
    GradientTemplate(teacher_stop_gradient=False),
    IDA(),
    SGMD(),
    SGMD("c_t", "x0", "x0"),
    SiD(),
    TSGFisher(),
    TSGSIM(),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_method_asks_for_its_needs_and_goes_back_through_its_roles(method):
    nets, batch, asked = setting(method)
    loss = method.student_loss(nets, batch)
    if loss.total.requires_grad:
        loss.total.backward()
    roles = {
        r for r in ("fake_score", "teacher", "unguided_teacher") if getattr(nets, r).differentiated
    }
    assert roles == method.differentiated_roles
    frozen = {"fake_score", "teacher", "unguided_teacher"}
    assert {role for role in frozen if getattr(nets, role).has_graph} == roles
    assert not nets.target.differentiated
    if method.has_fake_score:
        method.fake_score_loss(nets, batch, DRAWS.noise("x0", SHAPE))
    assert set(asked) == method.needs
    assert method.learning_rates().keys() <= method.modules(2).keys()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_weight_multiplies_the_terms_that_it_names(method):
    hints = get_type_hints(type(method), include_extras=True)
    for name, hint in hints.items():
        scales = [m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Scales)]
        if not scales:
            continue
        doubled = dataclasses.replace(method, **{name: 2 * getattr(method, name)})
        values = []
        for other in (method, doubled):
            nets, batch, _ = setting(other)
            terms = dict(other.student_loss(nets, batch).terms)
            terms |= other.fake_score_loss(nets, batch, DRAWS.noise("x0", SHAPE)).terms
            values.append({term: float(value.detach()) for term, value in terms.items()})
        for term, value in values[0].items():
            if term != "denoise":
                factor = 2 if any(term in s.terms for s in scales) else 1
                assert values[1][term] == pytest.approx(factor * value), (name, term)


def test_every_method_logs_the_same_gap_between_the_scores():
    """mean |x0_fake - x0_teacher| / n at one draw; n is 1 without a normaliser."""
    gaps = {}
    for method in METHODS:
        nets, batch, _ = setting(method)
        nets = dataclasses.replace(nets, unguided_teacher=nets.teacher, guidance_scale=1.0)
        logs = method.student_loss(nets, batch).logs
        if not isinstance(method, Consistency | FDistill) or method == FDistill("reverse_kl"):
            gaps[str(method)] = float(logs["score_gap"])
            assert not logs["score_gap"].requires_grad
    unscaled = gaps.pop(str(GradientTemplate("n", normaliser="none")))
    nets, batch, _ = setting(DMD2())
    sigma = batch.sigma("renoise/sigma")
    s = sigma.reshape(-1, 1, 1, 1, 1)
    x0 = nets.rollout(batch).detach()
    x_t = (1 - s) * x0 + s * batch.noise("renoise/noise")
    fake, teacher = (net(x_t, sigma, batch.text) for net in (nets.fake_score, nets.teacher))
    gap, n = ((a - b).abs().flatten(1).mean(1) for a, b in ((fake, teacher), (x0, teacher)))
    assert unscaled == pytest.approx(float(gap.mean()))
    assert gaps == pytest.approx(dict.fromkeys(gaps, float((gap / n).mean())), rel=1e-5)


def test_the_samples_of_every_loss_are_the_students():
    for method in METHODS:
        nets, batch, _ = setting(method)
        x0 = method.student_loss(nets, batch).x0
        if method.needs == {"real_latents"} and not method.has_fake_score:
            assert x0.shape == (B, *SHAPE)
        else:
            assert x0 is nets.rollout(batch)


TERMS = {  # of the student's loss, and of the fake score's
    DecoupledDMD(): ({"matching", "augmentation"}, {"denoise"}),
    DMD(): ({"kl", "regression"}, {"denoise"}),
    DMD2(): ({"kl"}, {"denoise"}),
    DMD2(gan="teacher", r1_weight=1.0): ({"kl", "gan"}, {"denoise", "discriminator", "r1"}),
    DPDMD(): ({"kl", "diversity"}, {"denoise"}),
    FDistill(r1_weight=1.0): ({"kl", "gan"}, {"denoise", "discriminator", "r1"}),
    GradientTemplate(): ({"direct"}, {"denoise"}),
    GradientTemplate(b="1/n"): ({"direct", "fake_score"}, {"denoise"}),
    GradientTemplate(b="1/n", teacher_stop_gradient=False): (
        {"direct", "fake_score", "teacher"},
        {"denoise"},
    ),
    IDA(): ({"kl"}, {"denoise"}),
    SGMD(): ({"fisher", "residual"}, {"denoise"}),
    SiD(): ({"sid"}, {"denoise"}),
    TSGFisher(): ({"fisher"}, {"denoise"}),
    TSGSIM(): ({"sim"}, {"denoise"}),
}


@pytest.mark.parametrize("method", TERMS, ids=str)
def test_terms_have_the_names_of_train_jsonl_and_the_fake_score_alone_learns_to_denoise(method):
    nets, batch, _ = setting(method)
    x0 = DRAWS.noise("x0", SHAPE)
    of_student, of_fake_score = TERMS[method]
    assert method.student_loss(nets, batch).terms.keys() == of_student
    others = dataclasses.replace(
        nets, student=Role(2), teacher=Role(2), unguided_teacher=Role(2), target=Role(2)
    )
    terms, with_others, with_another = (
        method.fake_score_loss(given, batch, x0).terms
        for given in (nets, others, dataclasses.replace(nets, fake_score=Role(2)))
    )
    assert terms.keys() == of_fake_score
    assert terms["denoise"] == with_others["denoise"]
    assert terms["denoise"] != with_another["denoise"]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_level_shared_by_the_batch_changes_no_more_than_the_level(method):
    """Here the shared level is that of the first sample, which all samples have anyway."""

    class Alike(Draws):
        def uniform(self, purpose: str) -> Tensor:
            return super().uniform(purpose)[:1].expand(B)

        def shared_uniform(self, purpose: str) -> Tensor:
            return self.uniform(purpose)

    draws = Alike(5, 0, "student", range(B), torch.device("cpu"), torch.float64)
    losses = []
    for one_sigma in (False, True):
        nets, batch, _ = setting(method)
        object.__setattr__(batch, "draws", draws)
        object.__setattr__(batch, "one_sigma", one_sigma)
        terms = {**method.student_loss(nets, batch).terms}
        if method.has_fake_score:
            terms |= method.fake_score_loss(nets, batch, DRAWS.noise("x0", SHAPE)).terms
        losses.append({name: float(term.detach()) for name, term in terms.items()})
    assert losses[0] == losses[1]


def test_decoupled_dmd_has_no_guidance_term_without_guidance():
    nets, batch, _ = setting(DecoupledDMD())
    unguided = dataclasses.replace(nets, guidance_scale=1.0)
    assert DecoupledDMD().student_loss(unguided, batch).terms.keys() == {"matching"}


GAN_KEYS = {"gan/sigma", "gan/noise"}
REAL_KEYS = {"gan_real/sigma", "gan_real/noise", "gan_real/nudge"}
RENOISE, DENOISE = ({f"{key}/sigma", f"{key}/noise"} for key in ("renoise", "denoise"))
KEYS = {  # of the draws of the student's phase, and of the fake score's
    Consistency(): ({"consistency/sigma", "consistency/noise"}, set()),
    DecoupledDMD(): (RENOISE | {"augmentation/sigma", "augmentation/noise"}, DENOISE),
    DMD(): (RENOISE, DENOISE),
    DMD2(gan="teacher", r1_weight=1.0): (RENOISE | GAN_KEYS, DENOISE | GAN_KEYS | REAL_KEYS),
    DPDMD(): (RENOISE | {"diversity/noise"}, DENOISE),
    FDistill(r1_weight=1.0): (RENOISE, DENOISE | GAN_KEYS | REAL_KEYS),
    GradientTemplate(): (RENOISE, DENOISE),
    IDA(): (RENOISE, DENOISE),
    SGMD(): (RENOISE, DENOISE),
    SiD(): (RENOISE, DENOISE),
    TSGFisher(): (RENOISE, DENOISE),
    TSGSIM(): (RENOISE, DENOISE),
}


@pytest.mark.parametrize("method", KEYS, ids=str)
def test_draws_have_the_keys_that_make_a_seed_mean_the_same_in_every_version(method):
    purposes: set[str] = set()

    class Recorded(Draws):
        def noise(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
            purposes.add(purpose)
            return super().noise(purpose, shape)

        def uniform(self, purpose: str) -> Tensor:
            purposes.add(purpose)
            return super().uniform(purpose)

    nets, batch, _ = setting(method)
    recorded = Recorded(5, 0, "student", range(B), torch.device("cpu"), torch.float64)
    object.__setattr__(batch, "draws", recorded)
    of_student, of_fake_score = KEYS[method]
    method.student_loss(nets, batch)
    assert purposes == of_student
    purposes.clear()
    if method.has_fake_score:
        method.fake_score_loss(nets, batch, DRAWS.noise("x0", SHAPE))
    assert purposes == of_fake_score


def test_an_added_field_keeps_its_default_and_is_marked():
    @dataclasses.dataclass(frozen=True)
    class Fields:
        late: float = added(2.5)

    (field,) = dataclasses.fields(Fields)
    assert Fields().late == 2.5
    assert field.metadata == {"added": True}
    assert Scales("gan", "r1").terms == ("gan", "r1")


def test_ida_needs_a_trained_network_in_both_roles():
    net = nn.Linear(2, 2)
    for networks in (
        {"student": net},
        {"fake_score": net},
        {"student": net, "fake_score": nn.Linear(2, 3)},
    ):
        with pytest.raises(ValueError, match="student and fake score have different weights"):
            IDA().after_student_update(networks)


def test_ida_averages_every_weight_also_of_a_frozen_network():
    """The hook runs after the student's phase, in which the fake score is frozen."""
    networks = {role: nn.Linear(2, 2) for role in ("student", "fake_score")}
    before = [p.detach().clone() for p in networks["fake_score"].parameters()]
    networks["fake_score"].requires_grad_(False)
    with torch.no_grad():
        IDA(keep=0.75).after_student_update(networks)
    for p, own, other in zip(
        networks["fake_score"].parameters(), before, networks["student"].parameters(), strict=True
    ):
        torch.testing.assert_close(p, 0.75 * own + 0.25 * other.detach())


def test_a_method_has_modules_and_jacobians_only_if_a_term_needs_them():
    assert DMD2().modules(2) == {}
    assert DMD2(gan="teacher").modules(2).keys() == {"head"}
    assert FDistill().modules(2).keys() == {"head", "histogram"}
    for zero in ("0", "0.0", "(0)"):
        assert GradientTemplate(b=zero, lam=zero).differentiated_roles == frozenset()
    for other in ("1", "0.5", "-1", "n", "1/n"):
        for name in ("b", "lam"):
            assert GradientTemplate(**{name: other}).differentiated_roles == {"fake_score"}
