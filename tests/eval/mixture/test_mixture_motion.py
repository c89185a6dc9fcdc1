"""Motion scores of mixture students: ranges of motion, other axes, errors to the teacher."""

import numpy as np
import pytest
import torch
from scipy import stats

from distill_bench.domain.latent_clips import dithered
from distill_bench.domain.mixture import PROMPTS, SHAPE, motion_mixture, transported
from distill_bench.draws import generator
from distill_bench.eval import mixture_truth as evaluator
from distill_bench.evaluator import Clips

MIXTURE = motion_mixture()
NAMES = ["mostly fast"] * 60 + ["any motion"] * 60


def facts(means: torch.Tensor = MIXTURE.means) -> dict[str, np.ndarray]:
    parameters = {name: value.numpy() for name, value in MIXTURE.tensors().items()}
    known = {"means": means.numpy(), "prompts": np.array(list(PROMPTS))}
    return parameters | known | {"latent_shape": np.array(SHAPE)}


def latents(seed: int = 0, speed: float = 1.0) -> torch.Tensor:
    """Exact samples (N, d) of NAMES, whose motion is then multiplied."""
    draws = torch.Generator().manual_seed(seed)
    share = torch.rand(len(NAMES), generator=draws)
    noise = torch.randn(len(NAMES), 16, generator=draws)
    rows = [list(PROMPTS).index(name) for name in NAMES]
    z = transported(MIXTURE, rows, share, noise).double() @ MIXTURE.basis
    z[:, :2] *= speed
    return z @ MIXTURE.basis.T


def clips(x: torch.Tensor, **known: np.ndarray) -> Clips:
    frames = dithered(x.reshape(-1, *SHAPE)).numpy()
    return Clips(frames, NAMES, list(range(len(NAMES))), facts=facts() | known)


def scores(sample: Clips, teacher: Clips | None = None) -> dict:
    references = {} if teacher is None else {"teacher": teacher}
    return {s.column: s for s in evaluator.MixtureTruth().scores(sample, references)}


def motion(x: torch.Tensor) -> np.ndarray:
    return (x @ MIXTURE.basis[:, :2]).norm(dim=1).numpy()


@pytest.mark.parametrize("speeds", [(0.3, 3.0), (3.0, 0.3), (3.0, 1.0), (1.0, 3.0)])
def test_w1_covers_the_motion_of_both_sides_however_fast(speeds):
    """Faster than any mode of the data moves; W1 over prompts by scipy."""
    x, y = (latents(seed, speed) for seed, speed in enumerate(speeds))
    found = scores(clips(x), clips(y))
    own, other = motion(x).reshape(2, 60), motion(y).reshape(2, 60)
    expected = np.mean([stats.wasserstein_distance(*pair) for pair in zip(own, other, strict=True)])
    assert found["mixture_motion_w1_teacher"].value == pytest.approx(expected, rel=0.01)


def test_an_offset_along_another_axis_changes_no_motion_score():
    """The data and the clips have it alike."""
    x, means = latents(), MIXTURE.means.clone()
    means[:, 2] += 1.5
    moved = x + 1.5 * MIXTURE.basis[:, 2]
    plain, offset = scores(clips(x)), scores(clips(moved, means=means.numpy()))
    for column in ("motion_ratio", "motion_w1", "motion_spread_ratio", "motion_energy"):
        name = f"mixture_{column}"
        assert offset[name].value == pytest.approx(plain[name].value, abs=2e-3), name


def test_the_error_of_the_energy_distance_to_the_teacher_resamples_the_clips():
    sample, teacher = clips(latents(0, 0.8)), clips(latents(1))
    of_prompt = []
    for name in dict.fromkeys(NAMES):
        own, other = (
            evaluator.Group(MIXTURE, side, name, list(PROMPTS)) for side in (sample, teacher)
        )
        resamples, twins = evaluator.resampling_weights(60), torch.eye(60, dtype=torch.bool)
        of_prompt.append(evaluator.energy_distance(own.x, other.x, resamples, twins)[1:])
    expected = float(torch.stack(of_prompt).mean(0).std())
    assert scores(sample, teacher)["mixture_energy_teacher"].sd == pytest.approx(expected, rel=1e-9)


def test_exact_samples_are_the_same_in_every_version():
    """Committed scores compare with them."""
    group = evaluator.Group(MIXTURE, clips(latents()), "any motion", list(PROMPTS))
    row, count = list(PROMPTS).index("any motion"), evaluator.EXACT_SAMPLES
    draws = generator("mixture/exact", row)
    share, noise = torch.rand(count, generator=draws), torch.randn(count, 16, generator=draws)
    assert torch.equal(group.exact(), transported(MIXTURE, [row] * count, share, noise).double())
