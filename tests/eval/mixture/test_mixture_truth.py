"""The evaluator of mixture students: exact samples score at the floor, planted losses are found."""

import numpy as np
import pytest
import torch
from mixture_reference import (
    NAMES,
    PER_PROMPT,
    SOME,
    ByHand,
    bundled_facts,
    energy,
    latents,
    mean_of,
    slowed,
)
from scipy import stats

from distill_bench.domain import controls
from distill_bench.domain.latent_clips import ERROR, RANGE, dithered, undithered
from distill_bench.domain.mixture import PROMPTS, SHAPE, motion_mixture, transported
from distill_bench.eval import mixture_truth as evaluator
from distill_bench.evaluator import Clips

MIXTURE = motion_mixture()


@pytest.fixture(scope="module")
def facts():
    return bundled_facts()


def clips(x: torch.Tensor, facts: dict) -> Clips:
    frames = dithered(x.reshape(-1, *SHAPE)).numpy()
    return Clips(frames, NAMES, list(range(len(NAMES))), facts=facts)


@pytest.fixture(scope="module")
def score(facts):
    def values(x: torch.Tensor | Clips, references: dict | None = None) -> dict:
        scored = x if isinstance(x, Clips) else clips(x, facts)
        scores = evaluator.MixtureTruth().scores(scored, references or {})
        return {s.column: s for s in scores}

    return values


@pytest.fixture(scope="module")
def exact(score):
    return score(latents())


def test_latents_are_read_off_the_frames_almost_exactly():
    x = torch.randn(20, *SHAPE, generator=torch.Generator().manual_seed(0))
    frames = dithered(x).numpy()
    assert frames.shape == (20, 8, 3, 8, 8)
    assert (undithered(frames, SHAPE) - x).abs().max() <= ERROR
    assert ERROR < 4e-4
    wide = undithered(dithered(torch.full((1, *SHAPE), 2 * RANGE)).numpy(), SHAPE)
    torch.testing.assert_close(wide, torch.full_like(wide, RANGE))
    with pytest.raises(ValueError, match="but latents need"):
        undithered(frames[:, :4], SHAPE)


def test_exact_samples_score_at_the_floor(exact):
    floor = (
        0.5
        * sum(
            (2 * weights * (1 - weights) / (np.pi * PER_PROMPT)).sqrt().sum()
            for weights in MIXTURE.weights
        )
        / len(PROMPTS)
    )
    assert exact["mode_tv"].value == pytest.approx(float(floor), rel=0.2)
    assert exact["lost_modes"].value < 0.5
    ratio = exact["mixture_motion_ratio"]
    assert ratio.sd < 0.03 and ratio.value == pytest.approx(1, abs=4 * ratio.sd)
    assert exact["mixture_motion_w1"].value < 0.08
    spread = exact["mixture_motion_spread_ratio"]
    assert spread.sd < 0.03 and spread.value == pytest.approx(1, abs=4 * spread.sd)
    energy = exact["mixture_energy"]
    assert abs(energy.value) < 4 * max(energy.sd, 0.003)
    # of the data: minus the entropy, which is below that of mode and noise together
    joint = [
        evaluator.entropies(weights)
        + 0.5 * (weights @ (2 * np.pi * np.e * MIXTURE.variances).log().sum(1))
        for weights in MIXTURE.weights
    ]
    density = exact["mixture_log_density"].value
    assert density == pytest.approx(-float(sum(joint)) / len(joint), abs=0.3)


def still(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(
        undithered(controls.frozen(dithered(x.reshape(-1, *SHAPE)).numpy()), SHAPE).numpy()
    ).flatten(1)


def without_a_mode(x: torch.Tensor) -> torch.Tensor:
    """Samples of a mixture whose first fast mode has moved to the second."""
    weights = MIXTURE.weights.clone()
    weights[:, 10] += weights[:, 9]
    weights[:, 9] = 0
    return latents(mixture=type(MIXTURE)(**MIXTURE.tensors() | {"weights": weights}))


def turned(x: torch.Tensor) -> torch.Tensor:
    """Motion in the opposite direction: the same speeds, other headings."""
    z = x.double() @ MIXTURE.basis
    z[:, :2] *= -1
    return z @ MIXTURE.basis.T


def spread(x: torch.Tensor) -> torch.Tensor:
    return x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (still, {"mode_tv", "mode_entropy", "lost_modes", "motion", "energy", "motion_energy"}),
        (slowed, {"mode_tv", "motion", "motion_energy", "log_density"}),
        (without_a_mode, {"mode_tv", "mode_entropy", "lost_modes"}),
        (turned, {"mode_tv", "motion_energy"}),
        (spread, {"log_density"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_planted_loss_is_found(fault, found, score, exact):
    x = latents()
    planted = score(fault(x))
    columns = {
        "mode_tv": ("mode_tv", +1, 0.02),
        "mode_entropy": ("mode_entropy", -1, 0.02),
        "lost_modes": ("lost_modes", +1, 0.5),
        "motion": ("mixture_motion_w1", +1, 0.05),
        "energy": ("mixture_energy", +1, 0.01),
        "motion_energy": ("mixture_motion_energy", +1, 0.01),
        "log_density": ("mixture_log_density", -1, 0.5),
    }
    for name, (column, sign, margin) in columns.items():
        worse = sign * (planted[column].value - exact[column].value)
        if name in found:
            assert worse > margin, column
    if "motion" in found:
        assert planted["mixture_motion_ratio"].value < 0.8
    if fault is turned:
        assert planted["mixture_motion_w1"].value == pytest.approx(
            exact["mixture_motion_w1"].value, abs=0.01
        )


@pytest.mark.slow
def test_scores_to_the_teacher_are_zero_for_its_own_clips(score, facts):
    teacher = clips(latents(), facts)
    own = score(teacher, {"teacher": teacher})
    assert own["mode_tv_teacher"].value == 0
    assert own["mixture_motion_w1_teacher"].value < 1e-9
    assert own["mixture_motion_ratio_teacher"].value == pytest.approx(1)
    assert own["mixture_motion_spread_ratio_teacher"].value == pytest.approx(1)
    assert own["mixture_energy_teacher"].value == pytest.approx(0, abs=1e-9)
    other = score(latents(10_000), {"teacher": teacher})
    assert 0 < other["mode_tv_teacher"].value < 0.2
    assert abs(other["mixture_energy_teacher"].value) < 0.04
    slow = score(slowed(latents(10_000)), {"teacher": teacher})
    assert slow["mixture_motion_w1_teacher"].value > 0.2


def test_standard_errors_to_the_teacher_take_its_clips_as_given(score, facts):
    """Only the clips are resampled: even the teacher's own have an error."""
    own = [PER_PROMPT * prompt + clip for prompt in range(len(PROMPTS)) for clip in range(8)]
    frames = dithered(latents()[own].reshape(-1, *SHAPE)).numpy()
    few = Clips(frames, [NAMES[i] for i in own], own, facts=facts)
    scores = score(few, {"teacher": few})
    for column in ("mode_tv", "mixture_motion_ratio", "mixture_motion_w1"):
        assert scores[f"{column}_teacher"].sd > 0.01
    assert scores["mixture_motion_spread_ratio_teacher"].sd > 0.01


def test_a_clip_counts_for_the_mode_that_is_likeliest_under_its_prompt(facts):
    """Between the still mode and that which moves slowly to the right, the weights decide."""
    radius = torch.linspace(0.1, 0.8, 2000, dtype=torch.float64)
    still, slow = (
        stats.norm.logpdf(radius, mean, sd) - np.log(sd) for mean, sd in ((0, 0.08), (0.9, 0.18))
    )
    names = ["mostly still", "mostly fast"]
    weights = MIXTURE.weights[[list(PROMPTS).index(name) for name in names]]
    odds = (weights[:, 0] / weights[:, 1]).log()
    assert odds[0] > odds[1]
    place = np.abs(still - slow + float(odds.mean())).argmin()
    x = (radius[place] * MIXTURE.basis[:, 0]).expand(4, -1)
    frames = dithered(x.reshape(-1, *SHAPE)).numpy()
    two = Clips(frames, [name for name in names for _ in range(2)], list(range(4)), facts=facts)
    for mode, name in enumerate(names):
        shares = evaluator.Group(MIXTURE, two, name, list(PROMPTS)).shares[0]
        assert shares[mode] == 1


@pytest.mark.slow
def test_the_w1_distance_of_a_shift_is_the_shift(facts):
    """Adding c to the radius of every sample moves the distribution of motion by c."""
    z = latents().double() @ MIXTURE.basis
    radius = z[:, :2].norm(dim=1, keepdim=True)
    z[:, :2] *= (radius + 0.5) / radius
    moved, unmoved = (
        [evaluator.Group(MIXTURE, clips(x, facts), name, list(PROMPTS)) for name in PROMPTS]
        for x in (z @ MIXTURE.basis.T, latents())
    )
    for group, other in zip(moved, unmoved, strict=True):
        assert float(group.motion_w1(other)[0]) == pytest.approx(0.5, abs=0.005)
        assert float(group.motion_w1()[0]) == pytest.approx(0.5, abs=0.1)


@pytest.mark.slow
def test_standard_errors_are_the_spread_over_draws(score):
    scores = [score(latents(i)) for i in range(4)]
    for column in ("mode_entropy", "mixture_motion_w1"):
        spread_of_values = np.std([s[column].value for s in scores], ddof=1)
        assert 0.3 < scores[0][column].sd / spread_of_values < 3.5, column


def test_clips_that_cannot_be_scored_say_why(facts, score):
    x = latents()[:6]
    few = Clips(dithered(x.reshape(-1, *SHAPE)).numpy(), NAMES[:5] + ["mostly fast"], [0] * 6)
    assert evaluator.MixtureTruth().reason_to_skip(few) is None
    assert score(few) == {}
    one = Clips(few.frames, few.prompts, few.seeds, facts=facts)
    reason = "a prompt has one clip; each needs at least 2"
    assert evaluator.MixtureTruth().reason_to_skip(one) == reason
    gaussian = Clips(few.frames, few.prompts, few.seeds, facts={"mean": np.zeros(2)})
    lacks = "facts.npz beside the clips lacks basis, means, variances, weights, prompts, "
    assert evaluator.MixtureTruth().reason_to_skip(gaussian).startswith(lacks)
    unknown = Clips(few.frames, ["a red circle"] * 6, few.seeds, facts=facts)
    with pytest.raises(ValueError, match="no prompt 'a red circle'; it has: any motion"):
        score(unknown)
    same = Clips(few.frames, ["any motion"] * 6, few.seeds, facts=facts)
    assert "only 6 clips per prompt" in score(same)["mode_tv"].warnings[0]


def test_the_scores_of_a_handful_of_clips_follow_from_their_definitions(facts):
    """Two prompts of nine clips, mixed up; the teacher's clips move half as much."""
    prompts = sorted(set(SOME))
    rows = [list(PROMPTS).index(name) for name in SOME]
    draws = torch.Generator().manual_seed(4)
    x, y = (
        transported(
            MIXTURE, rows, torch.rand(18, generator=draws), torch.randn(18, 16, generator=draws)
        ).double()
        for _ in range(2)
    )
    y = y - 0.5 * (y @ MIXTURE.basis[:, :2]) @ MIXTURE.basis[:, :2].T
    own, other = ByHand(x), ByHand(y)
    sample, teacher = (
        Clips(dithered(z.reshape(-1, *SHAPE)).numpy(), SOME, list(range(18)), facts=facts)
        for z in (x, y)
    )
    scores = evaluator.MixtureTruth().scores(sample, {"teacher": teacher})
    found = {s.column: s for s in scores}

    def exact(prompt: str) -> torch.Tensor:
        return evaluator.Group(MIXTURE, sample, prompt, list(PROMPTS)).exact()

    def moving(z: torch.Tensor) -> torch.Tensor:
        return z @ MIXTURE.basis[:, :2]

    own_spread, true_spread, teacher_spread = (
        mean_of(map(variance, prompts)) ** 0.5
        for variance in (own.variance, own.true_variance, other.variance)
    )
    true_mean = mean_of(own.true_motion(p) for p in prompts)
    teacher_mean = mean_of(other.motion[other.members(p)].mean() for p in prompts)
    shares, weights = {p: own.shares(p) for p in prompts}, {p: own.weights(p) for p in prompts}
    positive = [s[s > 0] for s in shares.values()]
    parts = {p: (own.x[own.members(p)], other.x[own.members(p)]) for p in prompts}
    expected = {
        "mode_tv": mean_of(0.5 * (shares[p] - weights[p]).abs().sum() for p in prompts),
        "mode_entropy": mean_of(-(s * s.log()).sum() for s in positive),
        "lost_modes": mean_of((shares[p] < 0.1 * weights[p]).sum() for p in prompts),
        "mixture_motion_ratio": mean_of(own.motion / true_mean),
        "mixture_motion_w1": mean_of(own.motion_w1(p) for p in prompts),
        "mixture_motion_spread_ratio": own_spread / true_spread,
        "mixture_energy": mean_of(energy(parts[p][0], exact(p)) for p in prompts),
        "mixture_motion_energy": mean_of(
            energy(moving(parts[p][0]), moving(exact(p))) for p in prompts
        ),
        "mixture_log_density": mean_of(own.log_density()),
        "mode_tv_teacher": mean_of(
            0.5 * (shares[p] - other.shares(p)).abs().sum() for p in prompts
        ),
        "mixture_motion_ratio_teacher": mean_of(own.motion / teacher_mean),
        "mixture_motion_w1_teacher": mean_of(
            stats.wasserstein_distance(*(moving(z).norm(dim=1) for z in parts[p])) for p in prompts
        ),
        "mixture_motion_spread_ratio_teacher": own_spread / teacher_spread,
        "mixture_energy_teacher": mean_of(energy(*parts[p], paired=True) for p in prompts),
    }
    assert {c: s.value for c, s in found.items()} == pytest.approx(expected, rel=2e-3, abs=2e-3)
    few = ("only 9 clips per prompt; modes want 100",)
    assert {s.warnings for s in found.values()} == {few}
    # standard errors: of the mean over prompts, each resampled alike
    resamples = evaluator.resampling_weights(9)[1:]
    spread = torch.stack(
        [
            torch.stack([0.5 * (r @ modes - weights[p]).abs().sum() for r in resamples])
            for p, modes in ((p, own.modes(p)) for p in prompts)
        ]
    )
    assert found["mode_tv"].sd == pytest.approx(float(spread.mean(0).std()), rel=1e-6)
    # prompts move unlike amounts, and are all there are: only clips of a prompt are resampled
    of_prompts = [own.motion[own.members(p)] for p in prompts]
    within = sum(float(m.var()) / len(m) for m in of_prompts) ** 0.5 / len(prompts)
    assert found["mixture_motion_ratio"].sd == pytest.approx(within / float(true_mean), rel=0.3)


def test_resamples_of_clips_are_drawn_with_replacement_after_the_clips_themselves():
    weights = evaluator.resampling_weights(50)
    assert weights.shape == (1 + evaluator.RESAMPLES, 50)
    torch.testing.assert_close(weights[0], torch.full((50,), 0.02, dtype=torch.float64))
    torch.testing.assert_close(weights.sum(1), torch.ones(201, dtype=torch.float64))
    counts = weights[1:] * 50
    torch.testing.assert_close(counts, counts.round())
    assert counts.max() > 2
    assert abs(float(counts.var(0).mean()) - 0.98) < 0.1
    assert len(counts.unique(dim=0)) == 200


def test_errors_to_the_teacher_are_those_of_the_clips(facts, score):
    """Clips that are all alike have none; the teacher's clips are as given."""
    names = ["mostly fast"] * 8
    first = NAMES.index("mostly fast")
    varied = dithered(latents()[first : first + 8].reshape(-1, *SHAPE)).numpy()
    alike, teacher = (
        Clips(frames, names, list(range(8)), facts=facts)
        for frames in (varied[:1].repeat(8, axis=0), varied)
    )
    of_alike, of_varied = (
        score(a, {"teacher": b}) for a, b in ((alike, teacher), (teacher, alike))
    )
    for column in ("mode_tv_teacher", "mixture_motion_ratio_teacher", "mixture_motion_w1_teacher"):
        assert of_alike[column].sd == pytest.approx(0, abs=1e-9)
        assert of_varied[column].sd > 0.01


def test_the_prompt_with_the_fewest_clips_decides_the_warning(facts, score):
    frames = dithered(latents()[[0] * 100 + [PER_PROMPT] * 99].reshape(-1, *SHAPE)).numpy()
    names = [NAMES[0]] * 100 + [NAMES[PER_PROMPT]] * 99
    sample = Clips(frames, names, list(range(199)), facts=facts)
    assert score(sample)["mode_tv"].warnings == ("only 99 clips per prompt; modes want 100",)


def test_clips_just_above_the_limits_have_no_warning(facts, score):
    hundred = Clips(
        dithered(latents()[:100].reshape(-1, *SHAPE)).numpy(), NAMES[:100], [0] * 100, facts=facts
    )
    assert score(hundred)["mode_tv"].warnings == ()
    names = ["any motion"] * 2
    two = Clips(dithered(latents()[:2].reshape(-1, *SHAPE)).numpy(), names, [0, 1], facts=facts)
    assert evaluator.MixtureTruth().reason_to_skip(two) is None
