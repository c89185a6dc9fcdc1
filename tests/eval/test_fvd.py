"""FVD: known-good is nearer than known-bad, clips are paired by prompt, traps are refused."""

import dataclasses
import json
from pathlib import Path

import calibration
import numpy as np
import pytest

from distill_bench.domain import controls
from distill_bench.eval.fvd import DEFAULT, FVD, PUBLISHED, SECOND
from distill_bench.evaluate.comparison import compare
from distill_bench.evaluate.extractors import load_extractor
from distill_bench.evaluator import Clips, order_to_match


def clips(count: int = 24, first: int = 0) -> Clips:
    frames, prompts = controls.rendered(count, first)
    return Clips(frames, prompts, list(range(first, first + count)))


def by_column(scores) -> dict[str, object]:
    return {score.column: score for score in scores}


def extractor_file(path: Path, name: str, features: str, dim: int) -> str:
    """The spec of an extractor that computes `features` of the frames x, written to a file."""
    path.write_text(
        "from distill_bench.evaluate.extractors import Extractor\n"
        "def make():\n"
        f"    return Extractor({name!r}, 1, '1' * 64, {dim}, lambda x: {features}, 'none')\n"
    )
    return f"{path}:make"


@pytest.mark.slow
def test_the_stored_self_test_matches_the_shipped_extractors_and_is_reproducible():
    """Frozen clips above 5 times the null, half speed above 2, shuffled frames above 3."""
    stored = json.loads(calibration.EXTRACTORS_FILE.read_text())
    for name in (DEFAULT, SECOND):
        assert stored[name]["extractor"] == f"{name}#{load_extractor(name).sha256}"
    assert all(row["z"] > 3 for row in stored[DEFAULT]["corruptions"].values())
    again = calibration.extractor_self_test(load_extractor(DEFAULT), 72, 2)
    for corruptions in (stored[DEFAULT]["corruptions"], again["corruptions"]):
        assert corruptions["frozen"]["ratio"] > 5
        assert corruptions["half speed"]["ratio"] > 2
        assert corruptions["shuffled"]["ratio"] > 3


def test_the_readme_states_the_floors_of_the_calibration():
    text = (calibration.EXTRACTORS_FILE.parent / "README.md").read_text()
    stored = json.loads(calibration.EXTRACTORS_FILE.read_text())[DEFAULT]["floors"]
    assert stored.keys() == {
        f"{name}, {kind}" for name in ("fvd", "fvd_infinity") for kind in ("named", "free")
    }
    for name, floors in stored.items():
        cells = [f"{floor['mean']:.2f} ± {floor['sd']:.2f}" for floor in floors.values()]
        column, kind = name.split(", ")
        assert f"| `{column}`, {kind} | {' | '.join(cells)} |" in text, name


@pytest.mark.slow
def test_known_good_is_nearer_than_known_bad():
    reference, other, good = clips(72, 1000), clips(72, 2000), clips(72)
    references = {"teacher": reference, "teacher_other": other, "data": other}
    noise = np.random.default_rng(0).integers(0, 256, good.frames.shape, dtype=np.uint8)
    worse_and_worse = [
        good.frames,
        controls.backwards(good.frames),
        controls.frozen(good.frames),
        noise,
    ]
    rows = [
        by_column(FVD(resamples=5).scores(dataclasses.replace(good, frames=frames), references))
        for frames in worse_and_worse
    ]
    for column in ("fvd", "fvd_data", "fvd_over_floor", "fvd_infinity"):
        values = [row[column].value for row in rows]
        assert values == sorted(values), column
    assert rows[0]["fvd_random"].value < rows[2]["fvd_random"].value < rows[3]["fvd_random"].value
    assert rows[0]["fvd_over_floor"].value < 2 < rows[2]["fvd_over_floor"].value
    assert {column for column, score in rows[0].items() if score.headline} == {"fvd"}
    assert any("72 clips are few" in warning for warning in rows[0]["fvd"].warnings)


def test_only_the_published_extractors_distance_is_called_fvd(tmp_path):
    own = extractor_file(tmp_path / "own.py", "own", "x.float().mean((1, 3, 4))", 3)
    (score, *_) = FVD(own, resamples=10).scores(clips(), {"teacher": clips(24, 100)})
    assert score.extractor == "own#11111111" and score.title.startswith("FD[own]")
    published = extractor_file(tmp_path / "i3d.py", PUBLISHED, "x.flatten(1)[:, :400].float()", 400)
    (score, *_) = FVD(published, resamples=5).scores(clips(4), {"data": clips(4, 100)})
    assert score.column == "fvd_data" and score.title == "FVD, to data"
    assert "rank-deficient: 4 clips are fewer than the 400 features" in score.warnings


@pytest.mark.parametrize("kinds", [("teacher",), ("data",), ("teacher", "data")])
def test_the_second_distance_is_that_of_the_random_features(kinds):
    references = {kind: clips(24, 100 * i) for i, kind in enumerate(kinds, 1)}
    scores = by_column(FVD(resamples=5).scores(clips(), references))
    pairs = list(compare(load_extractor(SECOND), clips(), references))
    assert len(pairs) == len(kinds)
    for kind, pair in zip(kinds, pairs, strict=True):
        column = "fvd_random" + ("_data" if kind == "data" else "")
        assert scores[column].value == pytest.approx(pair.distance)
        assert scores[column].extractor == load_extractor(SECOND).id_for(clips())


def reordered(sample: Clips, order) -> Clips:
    return dataclasses.replace(
        sample,
        frames=sample.frames[order],
        prompts=[sample.prompts[i] for i in order],
        seeds=[sample.seeds[i] for i in order],
    )


def test_the_order_of_the_clips_does_not_matter():
    """Two clips per prompt, also swapped within a prompt; equal up to rounding in other batches."""
    sample, reference = (
        dataclasses.replace(
            rendered, prompts=[rendered.prompts[i // 2] for i in range(36)], seeds=list(range(36))
        )
        for rendered in (clips(36), clips(36, 1000))
    )
    evaluator = FVD(resamples=10)
    expected = by_column(evaluator.scores(sample, {"teacher": reference}))
    for order in (np.random.default_rng(0).permutation(36), np.arange(36) ^ 1):
        scores = by_column(evaluator.scores(reordered(sample, order), {"teacher": reference}))
        for column, score in expected.items():
            assert scores[column].value == pytest.approx(score.value, rel=1e-3, abs=1e-5), column
            if score.sd is not None:
                assert scores[column].sd == pytest.approx(score.sd, rel=1e-3), column
        assert not any("unpaired" in w for score in scores.values() for w in score.warnings)
    backwards = np.arange(36)[::-1]
    references = {"teacher": reordered(reference, backwards)}
    scores = by_column(evaluator.scores(reordered(sample, backwards), references))
    assert scores["kvd"].value == pytest.approx(expected["kvd"].value, rel=1e-3, abs=1e-5)


def test_clips_in_the_order_of_the_reference_stay_in_place():
    """The harness's order: two seeds per prompt, not alphabetical, also against other seeds."""
    sample = dataclasses.replace(clips(6), prompts=["c", "a", "b"] * 2)
    for first in (0, 1000):
        reference = dataclasses.replace(sample, seeds=list(range(first, first + 6)))
        assert order_to_match(reference, sample) == list(range(6))


@pytest.mark.parametrize("prompts", [[""] * 24, ["x"] * 24, [*clips().prompts[:-1], ""]])
def test_unpaired_sets_carry_a_warning(prompts):
    other = dataclasses.replace(clips(24, 1000), prompts=prompts)
    for sample, reference in ((clips(), other), (other, clips())):
        scores = FVD(resamples=5).scores(sample, {"teacher": reference})
        warned = {s.column for s in scores if any("unpaired" in w for w in s.warnings)}
        assert warned == {"fvd", "kvd", "fvd_infinity"}


def test_a_floor_that_shares_a_clip_with_its_reference_is_refused():
    sample, reference, other = clips(12), clips(12, 1000), clips(12, 2000)
    frames = np.concatenate([reference.frames[3:4], other.frames[1:]])
    one_shared = dataclasses.replace(other, frames=frames)
    for floor in (reference, reordered(reference, np.arange(12)[::-1]), one_shared):
        with pytest.raises(
            ValueError,
            match="teacher_other holds the same clips as teacher: give clips of other seeds",
        ):
            FVD(resamples=5).scores(sample, {"teacher": reference, "teacher_other": floor})


def test_a_floor_of_rounding_error_is_refused(tmp_path):
    """The clips differ only in the column of pixels that the extractor ignores."""
    blind = extractor_file(tmp_path / "a.py", "blind", "x[..., 1:].float().mean((1, 3, 4))", 3)
    sample, reference = clips(12), clips(12, 1000)
    frames = reference.frames.copy()
    frames[..., 0] ^= 1
    references = {
        "teacher": reference,
        "teacher_other": dataclasses.replace(reference, frames=frames),
    }
    with pytest.raises(ValueError, match="it must be above rounding"):
        FVD(blind, resamples=5).scores(sample, references)


def test_copies_and_the_references_own_clips_carry_a_warning():
    reference = clips(12, 1000)
    own = by_column(FVD(resamples=5).scores(reference, {"teacher": reference}))["fvd"]
    assert abs(own.value) < 1e-9 and any("0 by construction" in w for w in own.warnings)
    copied = dataclasses.replace(reference, frames=reference.frames[[0] * 6 + list(range(6))])
    score = by_column(FVD(resamples=5).scores(copied, {"teacher": reference}))["fvd"]
    assert any("6 of 12 clips are copies" in warning for warning in score.warnings)
    with pytest.raises(ValueError, match="6 of the 12 clips of the teacher reference are copies"):
        FVD(resamples=5).scores(reference, {"teacher": copied})


def test_twelve_copies_of_one_clip_get_a_score():
    reference = clips(12, 1000)
    copies = dataclasses.replace(reference, frames=reference.frames[[0] * 12])
    assert by_column(FVD(resamples=5).scores(copies, {"teacher": reference}))["fvd"].value > 1


def test_pairs_of_equal_clips_leave_no_error_in_any_distance():
    """A resample of pairs has equal clips on both sides."""
    sample = clips()
    for score in FVD(resamples=3).scores(sample, {"teacher": sample}):
        assert score.value == pytest.approx(0, abs=1e-5), score.column
        assert score.sd is None or score.sd == pytest.approx(0, abs=1e-5), score.column
