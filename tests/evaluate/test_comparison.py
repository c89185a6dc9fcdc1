"""Distances of clips to a reference: their spreads, floors, titles and warnings."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from distill_bench.evaluate import comparison
from distill_bench.evaluate.comparison import (
    PUBLISHED,
    compare,
    few_clips,
    frechet_scores,
)
from distill_bench.evaluate.distances import (
    frechet_distance,
    frechet_infinity,
    frechet_sd,
    infinity_sd,
    kernel_distance,
    kernel_sd,
)
from distill_bench.evaluate.extractors import Extractor
from distill_bench.evaluator import Clips


def clips(count: int = 12, seed: int = 0, frames: int = 4, prompts: str = "") -> Clips:
    """Clips of noise, whose brightness differs more between clips of one seed than of another."""
    draws = np.random.default_rng(seed)
    noise = draws.integers(0, 40, (count, frames, 3, 8, 8)) + 10 * seed
    noise += draws.integers(0, 80, (count, 1, 3, 1, 1))
    names = list(prompts) or [f"prompt {i}" for i in range(count)]
    return Clips(noise.astype(np.uint8), names, list(range(count)))


def colours(frames: Tensor) -> Tensor:
    return frames.float().mean((1, 3, 4))


def extractor(name: str = "small", features=colours, dim: int = 3) -> Extractor:
    return Extractor(name, 1, "1" * 64, dim, features, "none", frames_matter=True)


REFERENCES = {
    "teacher": clips(seed=1),
    "teacher_other": clips(seed=2),
    "data": clips(seed=3),
    "data_other": clips(seed=4),
}


def by_column(sample: Clips, references=None, of: Extractor | None = None) -> dict:
    references = REFERENCES if references is None else references
    scores = frechet_scores(of or extractor(), sample, references, 7, "fd", "kd")
    return {score.column: score for score in scores}


def features_of(sample: Clips) -> Tensor:
    return extractor()(sample)


@pytest.mark.parametrize("paired", [True, False])
def test_every_distance_has_the_spread_of_its_own_bootstrap(paired):
    sample = clips() if paired else clips(prompts="abcdefghijkl")
    found, x = by_column(sample), features_of(sample)
    for kind, end in (("teacher", ""), ("data", "_data")):
        y, floor = features_of(REFERENCES[kind]), features_of(REFERENCES[f"{kind}_other"])
        expected = {
            f"fd{end}": (frechet_distance(x, y), frechet_sd(x, y, paired, 7)),
            f"kd{end}": (kernel_distance(x, y, paired), kernel_sd(x, y, paired, 7)),
            f"fd_infinity{end}": (frechet_infinity(x, y, paired), infinity_sd(x, y, paired, 7)),
            f"fd_over_floor{end}": (frechet_distance(x, y) / frechet_distance(floor, y), None),
        }
        for column, (value, sd) in expected.items():
            assert found[column].value == pytest.approx(value, rel=1e-9), column
            assert found[column].sd == (None if sd is None else pytest.approx(sd, rel=1e-9)), column
    assert len(found) == 8


@pytest.mark.parametrize(
    ("name", "distance", "kernel"),
    [
        (PUBLISHED, "FVD", "KVD"),
        ("videomae-v2-ssv2", "CD-FVD", "CD-KVD"),
        ("own", "FD[own]", "KVD"),
    ],
)
def test_titles_name_the_distance_its_network_and_the_reference(name, distance, kernel):
    found = by_column(clips(), of=extractor(name))
    for end, reference in (("", "the teacher's clips"), ("_data", "data")):
        titles = {
            f"fd{end}": distance,
            f"kd{end}": kernel,
            f"fd_infinity{end}": f"{distance} of infinite clips",
            f"fd_over_floor{end}": "over that of other seeds",
        }
        for column, title in titles.items():
            assert found[column].title == f"{title}, to {reference}"
            assert found[column].extractor == f"{name}@T4#11111111"
    assert [column for column, score in found.items() if score.headline] == ["fd"]


def test_a_score_of_another_network_may_carry_a_note():
    (pair,) = compare(extractor(), clips(), {"teacher": REFERENCES["teacher"]})
    assert pair.score("fd", 1.0, "FD", note="only an example").note == "only an example"


@pytest.mark.parametrize(("count", "reference"), [(4, 4), (4, 12), (12, 4)])
def test_the_limit_of_infinite_clips_wants_four_on_either_side(count, reference):
    sample, teacher = clips(count), {"teacher": clips(reference, seed=1)}
    assert "fd_infinity" in by_column(sample, teacher)
    fewer = clips(count - 1) if count == 4 else sample
    if reference == 4:
        teacher = {"teacher": clips(3, seed=1)}
    assert "fd_infinity" not in by_column(fewer, teacher)


def test_clips_are_few_below_five_per_feature_and_below_the_usual_number(monkeypatch):
    monkeypatch.setattr(comparison, "FEW_CLIPS", 20)
    for features, wanted in ((3, 20), (6, 30)):
        for count, other in ((wanted, wanted - 1), (wanted - 1, wanted)):
            (text,) = few_clips(features, clips(count), clips(other))
            assert text == (
                f"{wanted - 1} clips are few: a distance of {features} features wants {wanted}"
            )
        assert few_clips(features, clips(wanted), clips(wanted)) == ()
    few = few_clips(12, clips(12), clips(40))
    assert few == ("12 clips are few: a distance of 12 features wants 60",)
    few = few_clips(12, clips(40), clips(11))
    assert few == ("rank-deficient: 11 clips are fewer than the 12 features",)


def test_warnings_name_the_reference_that_they_concern():
    sample = clips(10)
    found = by_column(sample, REFERENCES | {"data": sample})
    assert found["fd"].warnings[1:] == (
        "10 clips against 12 of the teacher: the bias differs from other rows'",
        comparison.UNPAIRED,
    )
    assert found["fd_data"].warnings[1:] == (
        "these are the reference's own clips: 0 by construction",
    )


@pytest.mark.parametrize("kind", ["teacher", "data_other"])
def test_a_reference_of_another_length_is_refused_by_its_name(kind):
    references = REFERENCES | {kind: clips(seed=5, frames=6)}
    with pytest.raises(ValueError) as error:
        by_column(clips(), references)
    assert str(error.value) == (
        f"the {kind} reference has 6 frames of 8x8, the clips have 4 frames of 8x8; they must agree"
    )


def numbered(first: int, count: int = 12) -> Clips:
    """Clips whose first pixel counts from `first`."""
    frames = clips(count).frames
    frames[:, 0, 0, 0, 0] = np.arange(first, first + count)
    return dataclasses.replace(clips(count), frames=frames)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_a_floor_is_rounding_error_below_a_share_of_the_variance_of_all_features(scale):
    """Other seeds whose features are those of the reference, all moved alike."""
    rows = scale * torch.randn(36, 3, generator=torch.Generator().manual_seed(0))
    rows *= torch.tensor([1.0, 2.0, 3.0])
    limit = comparison.ROUNDING * float(rows[:12].double().var(0).sum())
    for share, refused in ((0.5, True), (2.0, False)):
        rows[12:24] = rows[:12] + (share * limit / 3) ** 0.5
        of = extractor("table", lambda frames: rows[frames[:, 0, 0, 0, 0].long()])
        (pair,) = compare(of, numbered(24), {"teacher": numbered(0)})
        if refused:
            with pytest.raises(
                ValueError, match="of teacher_other to teacher is .* rounding error"
            ):
                pair.over_floor(numbered(12), "over")
        else:
            assert pair.over_floor(numbered(12), "over").value > 1e6
