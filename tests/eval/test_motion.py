"""Motion on clips whose motion is known: rendered shapes, shifted textures, still frames under noise."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from distill_bench.eval import motion as module
from distill_bench.eval.motion import (
    Motion,
    disc,
    dynamic_degree,
    farneback_speed,
    motion,
    noise_floor,
    normal_speed,
    raft_speed,
    ratio_by_clip,
    texture,
)

from distill_bench.domain import controls, shapes
from distill_bench.evaluator import Clips


def clips(count: int = 24, first: int = 0, pace: float = 1.0) -> Clips:
    frames, prompts = controls.rendered(count, first, pace)
    return Clips(frames, prompts, list(range(first, first + count)))


def by_column(scores) -> dict[str, object]:
    return {score.column: score for score in scores}


@pytest.mark.parametrize("sd, most", [(0.0, 0.09), (0.02, 0.09), (0.05, 0.14)])
def test_normal_flow_reads_the_speed_of_shapes_within_its_stated_errors(sd, most):
    """Mean absolute percentage error of the fastest 5 % on flat shapes of 32x32, clean and under noise."""
    fast = [a for a in shapes.all_attributes() if a.speed == "fast"][::6]
    true, read = [], []
    for speed in (0.25, 0.5, 1.0, 2.0):
        frames = np.stack(
            [shapes.render(a, i, speed / shapes.SPEEDS["fast"]) for i, a in enumerate(fast)]
        )
        true += [speed] * len(frames)
        read += (
            motion(controls.noisy(frames, 0, sd) if sd else frames, normal_speed)[0]
            .mean(1)
            .tolist()
        )
    true, read = np.array(true), np.array(read)
    assert np.mean(abs(read - true) / true) < most
    assert np.corrcoef(true, read)[0, 1] > 0.98
    assert 0.85 < (true * read).sum() / (true**2).sum() < 1.15


@pytest.mark.parametrize("size, radius", [(32, 4), (64, 4), (64, 8), (64, 16)])
def test_what_a_body_reads_low_cancels_in_a_ratio(size, radius):
    """Discs read up to 72 % low; at half and double the speed they read half and double within a tenth."""
    half, one, double = (
        motion(disc(size, size, radius, v, 0.4)[None], normal_speed)[0].mean()
        for v in (0.5, 1.0, 2.0)
    )
    assert one < 0.85
    assert half / one == pytest.approx(0.5, rel=0.1) and double / one == pytest.approx(2, rel=0.1)


def test_the_readme_says_the_errors_of_the_calibration():
    text, stored = (
        (module.CALIBRATION.parent / "README.md").read_text(),
        json.loads(module.CALIBRATION.read_text()),
    )
    small, limit, large = stored["normal-flow"], stored["normal-flow-64"], stored["farneback-half"]
    errors = small["moving_shapes"]["error_by_noise"]
    rows = {
        "moving shapes, radius 5 to 6, of 32x32": errors["0.0"],
        "the same under 5 % of noise": errors["0.05"],
        "discs of radius 2, 4 and 8, of 32x32": small["discs_error"],
        "discs of radius 4, 8 and 16, of 64x64": limit["discs_error"],
        "textures of 32x32": small["textures_error"],
        "textures of 64x64": limit["textures_error"],
        "textures of 480x832 (Farneback)": large["textures_error"],
        "discs of radius 30, 60 and 120, of 480x832 (Farneback)": large["discs_error"],
    }
    for name, error in rows.items():
        assert (
            f"| {name} | {100 * error['mean']:.0f} % | {100 * error['largest']:.0f} % |" in text
        ), name


def test_a_still_clip_scores_zero_and_reads_under_its_floor():
    some = clips()
    still = dataclasses.replace(some, frames=controls.frozen(some.frames))
    scores = by_column(Motion().scores(still, {"teacher": some}))
    for column in (
        "motion",
        "motion_mean",
        "flicker",
        "dynamic_degree",
        "motion_true",
        "motion_ratio",
    ):
        assert scores[column].value == pytest.approx(0, abs=1e-9), column
    assert scores["motion"].value < scores["motion_floor"].value < 0.1


def test_half_speed_halves_and_jitter_doubles_the_ratio():
    some = clips(48)
    rows = {
        "own": some.frames,
        "half": clips(48, pace=0.5).frames,
        "shuffled": controls.shuffled(some.frames),
        "backwards": controls.backwards(some.frames),
    }
    values = {
        name: by_column(Motion().scores(dataclasses.replace(some, frames=f), {"teacher": some}))[
            "motion_ratio"
        ].value
        for name, f in rows.items()
    }
    assert values["own"] == pytest.approx(1) and values["backwards"] == pytest.approx(1)
    assert values["half"] == pytest.approx(0.5, abs=0.03)
    assert values["shuffled"] > 2


@pytest.mark.parametrize("shift", [(1.0, 0.0), (4.0, 2.0), (8.0, -4.0)])
def test_farneback_reads_shifted_textures_within_two_percent(shift):
    pytest.importorskip("cv2")
    top, mean = (each.mean() for each in motion(texture(480, 832, shift, 2)[None], farneback_speed))
    true = float(np.hypot(*shift))
    assert mean == pytest.approx(true, rel=0.005)
    assert top == pytest.approx(true, rel=0.02)


@pytest.mark.parametrize("method, error", [(normal_speed, 0.3), (farneback_speed, 0.02)])
def test_an_integer_roll_of_a_texture_is_seen_and_a_still_one_is_not(method, error):
    """Normal flow sees the motion along the gradient only: less than the whole on a texture."""
    still = np.repeat(texture(64, 96, (0, 0), 1), 3, 0)
    rolled = np.stack([np.roll(still[0], 2 * t, -1) for t in range(3)])
    assert motion(still[None], method)[0].max() < 0.03
    assert motion(rolled[None], method)[0].mean() == pytest.approx(2, rel=error)


def test_the_method_goes_by_size_and_its_name_is_on_the_score():
    small = by_column(Motion().scores(clips(), {}))
    assert small["motion"].extractor == "normal-flow" and "motion_ratio" not in small
    assert small["dynamic_degree"].title == "dynamic degree[normal-flow]"
    large = np.stack([texture(80, 80, (1.0, s / 4), 3, seed=s) for s in range(3)])
    scores = by_column(Motion().scores(Clips(large, ["a"] * 3, [0, 1, 2]), {}))
    assert scores["motion"].extractor == "farneback-half" and "motion_true" not in scores
    diagonals = 100 * 8 / (80 * 2**0.5) * scores["motion"].value
    assert scores["motion_diagonals"].value == pytest.approx(diagonals)


def test_missing_opencv_is_a_reason_with_what_to_install(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    large = Clips(np.stack([texture(80, 80, (1, 0), 3)] * 2), ["a"] * 2, [0, 1])
    assert "distill-bench[optical-flow]" in Motion().reason_to_skip(large)
    assert Motion().reason_to_skip(clips()) is None


def test_dynamic_degree_counts_pairs_as_vbench_and_refuses_its_traps():
    """8 frames at 8 a second: 2 pairs above 0.75 px make a clip of 32x32 dynamic; 16 a second are read at every second frame."""
    some = clips(2)
    tops = np.array([[0.8, 0.8, 0, 0, 0, 0, 0], [0.8, 0.7, 0, 0, 0, 0, 0]])
    assert dynamic_degree(some, tops, normal_speed).tolist() == [1, 0]
    assert (
        dynamic_degree(
            dataclasses.replace(some, frames=some.frames[:, :2]), tops[:, :1], normal_speed
        )
        is None
    )
    seen = []
    twice = dataclasses.replace(some, fps=16)
    dynamic_degree(
        twice, tops, lambda clip: seen.append(len(clip)) or torch.zeros(len(clip) - 1, 4, 4)
    )
    assert seen == [4, 4]
    still = dataclasses.replace(some, frames=controls.frozen(some.frames)[:, :3])
    assert dynamic_degree(still, np.zeros((2, 2)), normal_speed).tolist() == [0, 0]


def test_the_ratio_says_when_it_is_not_paired_and_refuses_a_still_teacher():
    some, other = clips(12), clips(12, 100)
    assert by_column(Motion().scores(some, {"teacher": some}))["motion_ratio"].warnings == ()
    assert (
        "seeds" in by_column(Motion().scores(some, {"teacher": other}))["motion_ratio"].warnings[0]
    )
    foreign = dataclasses.replace(other, prompts=["x"] * 12)
    assert (
        "prompts"
        in by_column(Motion().scores(some, {"teacher": foreign}))["motion_ratio"].warnings[0]
    )
    nameless = dataclasses.replace(other, prompts=[""] * 12)
    assert (
        "no captions"
        in by_column(Motion().scores(nameless, {"teacher": nameless}))["motion_ratio"].warnings[0]
    )
    still = dataclasses.replace(other, frames=controls.frozen(other.frames))
    with pytest.raises(ValueError, match="does not move"):
        Motion().scores(some, {"teacher": still})
    turned = dataclasses.replace(
        some, frames=some.frames[::-1].copy(), prompts=some.prompts[::-1], seeds=some.seeds[::-1]
    )
    assert by_column(Motion().scores(turned, {"teacher": some}))["motion_ratio"].warnings == ()
    longer = dataclasses.replace(other, frames=other.frames[:, :6])
    with pytest.raises(ValueError, match="6 frames of 32x32, the clips have 8 frames"):
        Motion().scores(some, {"teacher": longer})


def test_raft_comes_by_path_under_its_digest(tmp_path):
    from torchvision.models.optical_flow import raft_small

    torch.manual_seed(0)
    torch.save(raft_small(weights=None).state_dict(), tmp_path / "raft.pth")
    name, speed = raft_speed(tmp_path / "raft.pth")
    assert name.startswith("raft-small#")
    assert speed(texture(128, 136, (1, 0), 2)).shape == (1, 128, 136)
    with pytest.raises(ValueError, match="128x128 or more; found 64x64"):
        speed(texture(64, 64, (1, 0), 2))
    with pytest.raises(ValueError, match="no weights at"):
        raft_speed(tmp_path / "none.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="neither"):
        raft_speed(tmp_path / "other.pth")


def test_the_stored_calibration_is_what_the_methods_read():
    stored = json.loads(module.CALIBRATION.read_text())
    assert stored["normal-flow"]["moving_shapes"] == module.shape_calibration(normal_speed)
    for name, size in (("normal-flow", 32), ("normal-flow-64", 64)):
        again = module.calibration(normal_speed, (size, size))
        for kind in ("textures", "discs"):
            read = [row["top"] for row in stored[name][kind]]
            assert read == pytest.approx([row["top"] for row in again[kind]], abs=2e-3), (
                name,
                kind,
            )
            assert stored[name][f"{kind}_error"] == module._error(
                [row for row in stored[name][kind] if row["true"]]
            )
    assert stored["normal-flow"]["moving_shapes"]["r"] >= 0.95
    assert 0.85 <= stored["normal-flow"]["moving_shapes"]["slope"] <= 1.15
    assert stored["normal-flow"]["still_under_noise"]["0.02"] < 0.3
    for row in stored["farneback-half"]["textures"]:
        assert row["mean"] == pytest.approx(row["true"], rel=0.02, abs=0.02)


def test_known_good_is_nearer_to_one_than_known_bad():
    some, reference = clips(48), clips(48, 1000)
    noise = np.random.default_rng(0).integers(0, 256, some.frames.shape, dtype=np.uint8)
    frames = [some.frames, clips(48, pace=0.5).frames, controls.frozen(some.frames), noise]
    away = [
        abs(
            by_column(Motion().scores(dataclasses.replace(some, frames=f), {"teacher": reference}))[
                "motion_ratio"
            ].value
            - 1
        )
        for f in frames
    ]
    assert away[0] < 0.1 < away[1] < away[2] < away[3]
    assert noise_floor(some, normal_speed) < 0.1


def test_the_spread_of_the_ratio_is_that_of_clips_of_both_resampled_together():
    """How the speeds of prompts differ is in both means, and not in their ratio."""
    rng = np.random.default_rng(0)
    theirs = rng.gamma(2.0, 1.0, 400)
    mine = 1.2 * theirs + rng.normal(0, 0.2, 400)
    each = ratio_by_clip(mine, theirs)
    assert each.mean() == pytest.approx(mine.mean() / theirs.mean(), rel=1e-12)
    drawn = rng.integers(0, 400, (4000, 400))
    together = (mine[drawn].mean(1) / theirs[drawn].mean(1)).std()
    assert each.std(ddof=1) / 20 == pytest.approx(together, rel=0.1)
    assert (mine / theirs.mean()).std(ddof=1) / 20 > 4 * together, (
        "what holding the teacher's mean would say"
    )


def test_the_ratio_pairs_clips_by_prompt_whatever_their_order():
    """The teacher's own clips in another order: a ratio of 1 without a spread."""
    some = clips()
    order = [3, 1, 0, 2, *range(4, 24)]
    other = Clips(
        some.frames[order], [some.prompts[i] for i in order], [some.seeds[i] for i in order]
    )
    score = by_column(Motion().scores(other, {"teacher": some}))["motion_ratio"]
    assert score.value == pytest.approx(1) and np.std(score.per_clip) < 1e-6
