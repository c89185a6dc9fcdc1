"""Declarations of methods against their losses: needs, roles, weighted terms and logs."""

import dataclasses
import sys
from collections.abc import Callable
from types import ModuleType
from typing import ClassVar, get_type_hints

import pytest
import torch
from torch import Tensor, nn

from distill_bench.config.errors import ConfigError
from distill_bench.config.resolve import resolve
from distill_bench.draws import Draws
from distill_bench.method import Batch, Method, Nets, Scales, added
from distill_bench.methods import dmd
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

SHAPE, B = (2, 1, 2, 1), 3
DRAWS = Draws(5, 0, "student", range(B), torch.device("cpu"), torch.float64)
DATA = {"x0": DRAWS.noise("data", SHAPE), "noise": DRAWS.noise("z", SHAPE)}
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


class Role:
    """A role that notes whether a gradient passes through one of its predictions."""

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.differentiated = False

    def note(self, _gradient: Tensor) -> None:
        self.differentiated = True

    def __call__(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        s = sigma.reshape(-1, 1, 1, 1, 1)
        prediction = torch.tanh(self.scale * x_t + s) + text[..., None, None]
        if prediction.requires_grad:
            prediction.register_hook(self.note)
        return prediction

    def features(self, x_t: Tensor, sigma: Tensor, text: Tensor, depth: float) -> Tensor:
        return self(x_t, sigma, text).flatten(2).transpose(1, 2)


def setting(method: Method) -> tuple[Nets, Batch, list[str]]:
    """Nets and a batch for a method; the list receives the data that it asks for."""
    text, asked = DRAWS.noise("text", (1, 1)), []

    def given(need: str):
        return lambda _: asked.append(need) or DATA | {"text": text}

    extras = {need: given(need) for need in ("real_latents", "ode_pairs")}
    batch = Batch(text, DRAWS, SHAPE, 2.0, 0.1, 0.9, extras)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        modules = {name: net.double() for name, net in method.modules(2).items()}
    x0 = DRAWS.noise("x0", SHAPE).requires_grad_()

    def rollout(given: Batch) -> Tensor:
        assert given is batch
        return x0

    nets = Nets(
        student=Role(0.3),
        fake_score=Role(0.7),
        teacher=Role(-0.5),
        rollout=rollout,
        exit_sigma=lambda _: torch.full((B,), 0.8, dtype=torch.float64),
        target=Role(0.4),
        unguided_teacher=Role(-0.9),
        null_text=torch.zeros(1, 1, 1, dtype=torch.float64),
        guidance_scale=2.0,
        modules=modules,
    )
    return nets, batch, asked


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


def test_the_largest_draw_has_the_highest_level_of_a_consistency_model():
    """Its product with the number of levels rounds up in single precision."""

    class Largest(Draws):
        def uniform(self, purpose: str) -> Tensor:
            return torch.full((B,), 1 - 2**-24)

    levels, method = [], Consistency(steps=18)
    nets, batch, _ = setting(method)
    draws = Largest(5, 0, "student", range(B), torch.device("cpu"))
    student = nets.student

    def recorded(x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        levels.append(sigma)
        return student(x_t, sigma, text)

    nets = dataclasses.replace(nets, student=recorded)
    method.student_loss(nets, dataclasses.replace(batch, draws=draws))
    assert levels[0].tolist() == [1.0] * B


def test_an_added_field_keeps_its_default_and_is_marked():
    @dataclasses.dataclass(frozen=True)
    class Fields:
        late: float = added(2.5)

    (field,) = dataclasses.fields(Fields)
    assert Fields().late == 2.5
    assert field.metadata == {"added": True}
    assert Scales("gan", "r1").terms == ("gan", "r1")


# ---- LPIPS, an optional package

DISTANCE = DMD(distance="lpips")


class LPIPS(nn.Module):
    """In place of the package's network: it keeps the frames that it compares."""

    made: ClassVar[list["LPIPS"]] = []

    def __init__(self, net: str, verbose: bool) -> None:
        super().__init__()
        self.net, self.verbose = net, verbose
        self.weight = nn.Parameter(torch.ones(()))
        self.made.append(self)

    def forward(self, frames: Tensor, other: Tensor) -> Tensor:
        self.frames = frames, other
        return (self.weight * (frames - other)).square().mean((1, 2, 3), keepdim=True)


@pytest.fixture
def kind(monkeypatch) -> type[Tensor]:
    """A type of tensors of its own, for which a new network is made."""
    module = ModuleType("lpips")
    module.LPIPS = LPIPS
    monkeypatch.setitem(sys.modules, "lpips", module)
    return type("Frames", (Tensor,), {})


@pytest.mark.parametrize(
    ("size", "enlarged"), [((16, 80), True), ((80, 16), True), ((64, 96), False)]
)
def test_lpips_compares_frames_with_frames_of_at_least_64_pixels(size, enlarged, kind):
    video, target = (torch.rand(2, 3, 4, *size).as_subclass(kind) for _ in range(2))
    distance = dmd.lpips(video, target)
    net = LPIPS.made[-1]
    frames, other = net.frames
    assert frames.shape == other.shape == (8, 3, *((64, 64) if enlarged else size))
    if enlarged:
        first = nn.functional.interpolate(video[:1, :, 3], size=(64, 64), mode="bilinear")[0]
        torch.testing.assert_close(frames[3], first)
    else:
        assert torch.equal(frames[5], video[1, :, 1])
        torch.testing.assert_close(distance, (video - target).square().mean())
    assert distance.ndim == 0
    assert (net.net, net.verbose, net.training) == ("vgg", False, False)
    assert not net.weight.requires_grad


def test_a_network_of_lpips_is_made_once_per_device_and_type_of_tensor(kind):
    """A rehearsal of memory uses tensors without data, on which another run's network fails."""
    video, made = torch.rand(1, 3, 1, 64, 64), len(LPIPS.made)
    other = type("Others", (Tensor,), {})
    for given in (kind, other, kind, other):
        dmd.lpips(video.as_subclass(given), video)
    assert len(LPIPS.made) == made + 2
    dmd.lpips(video.to("meta").as_subclass(kind), video.to("meta"))
    assert len(LPIPS.made) == made + 3
    assert LPIPS.made[-1].weight.device.type == "meta"


def test_the_regression_compares_decoded_clips_if_lpips_is_asked_for(kind):
    nets, batch, _ = setting(DISTANCE)

    def decode(latents: Tensor) -> Tensor:
        video = 2 * latents.expand(-1, -1, 3, -1, 64).repeat(1, 2, 1, 32, 1)[:, :3]
        return video.as_subclass(kind)

    nets = dataclasses.replace(nets, decode=decode)
    y, prediction = DATA["x0"], nets.student(DATA["noise"], torch.ones(B), batch.text)
    loss = DISTANCE.student_loss(nets, batch)
    expected = 0.25 * (decode(prediction) - decode(y)).square().mean()
    torch.testing.assert_close(loss.terms["regression"], expected)


def test_a_missing_package_is_named_before_a_run_and_not_needed_to_count_its_passes():
    assert DISTANCE.packages == {"lpips"}
    assert DMD().packages == frozenset()
    assert DISTANCE.rehearsed() == DMD()
    assert DMD2().rehearsed() == DMD2()
    with pytest.raises(ConfigError, match="lpips"):
        resolve({"method": {"name": "dmd", "distance": "lpips"}})


def test_ida_needs_a_trained_network_in_both_roles():
    net = nn.Linear(2, 2)
    for networks in (
        {"student": net},
        {"fake_score": net},
        {"student": net, "fake_score": nn.Linear(2, 3)},
    ):
        with pytest.raises(ValueError, match="student and fake score have different weights"):
            IDA().after_student_update(networks)


# ---- fields that contradict each other


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPDMD(teacher_steps=4, anchor=5), "anchor 5 must be at most teacher_steps 4"),
        (lambda: FDistill(ratio_low=2, ratio_high=2), "ratio_low 2 must be below ratio_high 2"),
        (
            lambda: GradientTemplate("1/(sigma - 0.57)"),
            "a .* finite number at n = 0.37, sigma = 0.57",
        ),
        (
            lambda: GradientTemplate(b="1/(n - 1.73)"),
            "b .* finite number at n = 1.73, sigma = 0.13",
        ),
        (lambda: GradientTemplate(lam="(0.5 - sigma)**0.5"), "lam .* sigma = 0.57: .*j"),
        (
            lambda: GradientTemplate("10.0**999"),
            "a '10.0..999' is not a finite number .*34, ",
        ),
        (
            lambda: GradientTemplate("1/(n - 1.5)", normaliser="none", epsilon=0.5),
            "at n = 1.5, sigma = 0.13: float division by zero",
        ),
        (lambda: GradientTemplate("True"), "True is no number"),
        (lambda: GradientTemplate("'n'"), "'n' is no number"),
        (lambda: GradientTemplate("m"), "'m' is not allowed"),
    ],
)
def test_impossible_fields_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_fields_at_their_bounds_are_accepted():
    assert DPDMD(teacher_steps=5, anchor=5).anchor == 5
    assert GradientTemplate("2**-1 + n*sigma - 1").a == "2**-1 + n*sigma - 1"
    assert GradientTemplate("1/(n - 1.73)", normaliser="none", epsilon=0.5).epsilon == 0.5
