"""Energy distances of mixture students, and which clips count as pairs of the same noise."""

import pytest
import torch
from mixture_reference import MIXTURE, NAMES, bundled_facts, latents, slowed

from distill_bench.domain.latent_clips import dithered
from distill_bench.domain.mixture import PROMPTS, SHAPE
from distill_bench.eval import mixture_truth as evaluator
from distill_bench.evaluator import Clips

FACTS = bundled_facts()


def test_the_energy_distance_follows_its_definition():
    x = torch.tensor([[0.0], [2.0]], dtype=torch.float64)
    y = torch.tensor([[1.0], [1.0], [4.0]], dtype=torch.float64)
    weights = torch.full((1, 2), 0.5, dtype=torch.float64)
    between = (1 + 1 + 4 + 1 + 1 + 2) / 6
    expected = 2 * between - 2 - (0 + 3 + 3) / 3
    assert float(evaluator.energy_distance(x, y, weights)[0]) == pytest.approx(expected)
    apart = (1 + 4 + 1 + 2) / 4  # without the pairs of equal index: |0 - 1| and |2 - 1|
    twins = torch.eye(2, 3, dtype=torch.bool)
    paired = evaluator.energy_distance(x, y, weights, twins)
    assert float(paired[0]) == pytest.approx(2 * apart - 2 - (0 + 3 + 3) / 3)


def test_the_energy_distance_to_clips_of_the_same_noise_is_unbiased():
    """Samples moved by little, beside samples of another noise moved alike."""
    x, fresh = latents().double(), latents(10_000).double()
    resamples = torch.full((1, 1000), 1e-3, dtype=torch.float64)
    twins = torch.eye(1000, dtype=torch.bool)
    same, others = (
        float(evaluator.energy_distance(x + 0.1, y, resamples, twins)[0]) for y in (x, fresh)
    )
    assert 0 < same == pytest.approx(others, abs=0.02)
    unpaired = float(evaluator.energy_distance(x + 0.1, x, resamples)[0])
    assert unpaired < same - 0.005  # each clip is near its own twin


@pytest.mark.parametrize("order", [[3, 0, 4, 1, 5, 2], [5, 1, 3]], ids=["mixed up", "half"])
def test_clips_are_paired_with_the_teachers_by_their_seeds(order):
    """In any order and number: the sum over all pairs but those of one seed."""
    x, y = latents()[:6].double(), slowed(latents()[:6])
    seeds = [7, 3, 11, 5, 2, 13]

    def made(z: torch.Tensor, places: list[int]) -> Clips:
        frames = dithered(z[places].reshape(-1, *SHAPE)).numpy()
        return Clips(frames, NAMES[:6][: len(places)], [seeds[i] for i in places], facts=FACTS)

    teacher = made(y, list(range(6)))
    scores = evaluator.MixtureTruth().scores(made(x, order), {"teacher": teacher})
    found = next(s.value for s in scores if s.column == "mixture_energy_teacher")
    a, b = x[order], y
    between = [(a[i] - b[j]).norm() for i in range(len(a)) for j in range(6) if order[i] != j]
    own, other = (2 * torch.pdist(z).sum() / (len(z) * (len(z) - 1)) for z in (a, b))
    expected = 2 * sum(between) / len(between) - own - other
    assert found == pytest.approx(float(expected), abs=2e-3)


def test_clips_without_a_common_seed_are_paired_by_their_places():
    frames = dithered(latents()[:4].reshape(-1, *SHAPE)).numpy()
    one, other, repeated = (
        evaluator.Group(MIXTURE, Clips(frames, NAMES[:4], seeds, facts=FACTS), NAMES[0], [*PROMPTS])
        for seeds in ([0, 1, 2, 3], [4, 5, 6, 7], [0, 0, 0, 0])
    )
    for twins in (one.twins(other), one.twins(repeated), repeated.twins(repeated)):
        assert torch.equal(twins, torch.eye(4, dtype=torch.bool))
