"""Motion on clips of known motion: rendered shapes, shifted textures, still frames under noise."""

import dataclasses
import json

import calibration
import numpy as np
import pytest
import torch
from calibration import disc, texture

from distill_bench.domain import controls, shapes
from distill_bench.eval import motion as motion_module
from distill_bench.eval.motion import Motion, dynamic_degree, motion, noise_floor, ratio_by_clip
from distill_bench.evaluate.optical_flow import farneback_speed, normal_speed, raft_speed
from distill_bench.evaluator import Clips


def clips(count: int = 24, first: int = 0, pace: float = 1.0) -> Clips:
    frames, prompts = controls.rendered(count, first, pace)
    return Clips(frames, prompts, list(range(first, first + count)))


def by_column(sample: Clips, teacher: Clips | None = None) -> dict[str, object]:
    references = {} if teacher is None else {"teacher": teacher}
    return {score.column: score for score in Motion().scores(sample, references)}


@pytest.mark.parametrize("sd, largest", [(0.0, 0.09), (0.02, 0.09), (0.05, 0.14)])
def test_normal_flow_reads_the_speed_of_shapes_within_its_stated_errors(sd, largest):
    """Mean absolute relative error of the fastest 5 % on 32x32 shapes, clean and under noise."""
    fast = [a for a in shapes.all_attributes() if a.speed == "fast"][::6]
    true, read = [], []
    for speed in (0.25, 0.5, 1.0, 2.0):
        frames = np.stack(
            [shapes.render(a, i, speed / shapes.SPEEDS["fast"]) for i, a in enumerate(fast)]
        )
        if sd:
            frames = controls.noisy(frames, 0, sd)
        true += [speed] * len(frames)
        read += motion(frames, normal_speed)[0].mean(1).tolist()
    true, read = np.array(true), np.array(read)
    assert np.mean(abs(read - true) / true) < largest
    assert np.corrcoef(true, read)[0, 1] > 0.98
    assert 0.85 < (true * read).sum() / (true**2).sum() < 1.15


@pytest.mark.parametrize("size, radius", [(32, 4), (64, 4), (64, 8), (64, 16)])
def test_the_low_reading_of_small_bodies_cancels_in_a_ratio(size, radius):
    """Readings of discs are up to 72 % low, but proportional to the speed within 10 %."""
    half, one, double = (
        motion(disc(size, size, radius, speed, 0.4)[None], normal_speed)[0].mean()
        for speed in (0.5, 1.0, 2.0)
    )
    assert one < 0.85
    assert half / one == pytest.approx(0.5, rel=0.1) and double / one == pytest.approx(2, rel=0.1)


def test_the_readme_states_the_errors_of_the_calibration():
    text = (calibration.FLOW_FILE.parent / "README.md").read_text()
    stored = json.loads(calibration.FLOW_FILE.read_text())
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
        mean, largest = 100 * error["mean"], 100 * error["largest"]
        assert f"| {name} | {mean:.0f} % | {largest:.0f} % |" in text, name


@pytest.mark.slow
def test_the_stored_calibration_is_reproducible():
    stored = json.loads(calibration.FLOW_FILE.read_text())
    shape_rows = stored["normal-flow"]["moving_shapes"]
    assert shape_rows == calibration.shape_calibration(normal_speed)
    for name, size in (("normal-flow", 32), ("normal-flow-64", 64)):
        again = calibration.flow_calibration(normal_speed, (size, size))
        for kind in ("textures", "discs"):
            read = [row["top"] for row in stored[name][kind]]
            expected = [row["top"] for row in again[kind]]
            assert read == pytest.approx(expected, abs=2e-3), (name, kind)
            moving = [row for row in stored[name][kind] if row["true"]]
            assert stored[name][f"{kind}_error"] == calibration.relative_error(moving)
    assert shape_rows["r"] >= 0.95 and 0.85 <= shape_rows["slope"] <= 1.15
    assert stored["normal-flow"]["still_under_noise"]["0.02"] < 0.3
    for row in stored["farneback-half"]["textures"]:
        assert row["mean"] == pytest.approx(row["true"], rel=0.02, abs=0.02)


def test_a_still_clip_scores_zero_and_reads_under_its_noise_floor():
    moving = clips()
    still = dataclasses.replace(moving, frames=controls.frozen(moving.frames))
    scores = by_column(still, moving)
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


def test_half_speed_halves_the_ratio_and_shuffling_doubles_it():
    teacher = clips(48)
    frames = {
        "same": teacher.frames,
        "half": clips(48, pace=0.5).frames,
        "shuffled": controls.shuffled(teacher.frames),
        "backwards": controls.backwards(teacher.frames),
    }
    ratios = {
        name: by_column(dataclasses.replace(teacher, frames=f), teacher)["motion_ratio"].value
        for name, f in frames.items()
    }
    assert ratios["same"] == pytest.approx(1) and ratios["backwards"] == pytest.approx(1)
    assert ratios["half"] == pytest.approx(0.5, abs=0.03)
    assert ratios["shuffled"] > 2


@pytest.mark.parametrize("shift", [(1.0, 0.0), (4.0, 2.0), (8.0, -4.0)])
def test_farneback_reads_shifted_textures_within_two_per_cent(shift):
    pytest.importorskip("cv2")
    clip = texture(480, 832, shift, 2)
    top, mean = (values.mean() for values in motion(clip[None], farneback_speed))
    true = float(np.hypot(*shift))
    assert mean == pytest.approx(true, rel=0.005)
    assert top == pytest.approx(true, rel=0.02)


@pytest.mark.parametrize("method, error", [(normal_speed, 0.3), (farneback_speed, 0.02)])
def test_a_rolled_texture_is_seen_and_a_still_one_is_not(method, error):
    """Normal flow sees only the motion along the gradient, which on a texture is not all of it."""
    still = np.repeat(texture(64, 96, (0, 0), 1), 3, 0)
    rolled = np.stack([np.roll(still[0], 2 * t, -1) for t in range(3)])
    assert motion(still[None], method)[0].max() < 0.03
    assert motion(rolled[None], method)[0].mean() == pytest.approx(2, rel=error)


def test_the_method_is_chosen_by_size_and_named_on_the_score():
    small = by_column(clips())
    assert small["motion"].extractor == "normal-flow" and "motion_ratio" not in small
    assert small["dynamic_degree"].title == "dynamic degree[normal-flow]"
    frames = np.stack([texture(80, 80, (1.0, s / 4), 3, seed=s) for s in range(3)])
    large = by_column(Clips(frames, ["a"] * 3, [0, 1, 2]))
    assert large["motion"].extractor == "farneback-half" and "motion_true" not in large
    diagonals = 100 * 8 / (80 * 2**0.5) * large["motion"].value
    assert large["motion_diagonals"].value == pytest.approx(diagonals)


def test_without_opencv_large_clips_are_skipped_and_the_package_is_named(monkeypatch):
    monkeypatch.setattr(motion_module.importlib.util, "find_spec", lambda name: None)
    large = Clips(np.stack([texture(80, 80, (1, 0), 3)] * 2), ["a"] * 2, [0, 1])
    assert "distill-bench[optical-flow]" in Motion().reason_to_skip(large)
    assert Motion().reason_to_skip(clips()) is None


def test_a_clip_is_dynamic_if_two_of_seven_pairs_are_above_the_threshold():
    """8 frames at 8 per second: at 32x32 the threshold is 0.75 pixels."""
    top = np.array([[0.8, 0.8, 0, 0, 0, 0, 0], [0.8, 0.7, 0, 0, 0, 0, 0]])
    assert dynamic_degree(clips(2), top, normal_speed).tolist() == [1, 0]


def test_the_dynamic_degree_reads_every_second_frame_at_16_per_second():
    lengths = []

    def speed(clip: np.ndarray) -> torch.Tensor:
        lengths.append(len(clip))
        return torch.zeros(len(clip) - 1, 4, 4)

    dynamic_degree(dataclasses.replace(clips(2), fps=16), np.zeros((2, 7)), speed)
    assert lengths == [4, 4]


def test_short_clips_are_not_dynamic_by_default():
    """VBench would require 0 fast pairs and call them dynamic."""
    sample = clips(2)
    two_frames = dataclasses.replace(sample, frames=sample.frames[:, :2])
    assert dynamic_degree(two_frames, np.full((2, 1), 0.8), normal_speed) is None
    three_still = dataclasses.replace(sample, frames=controls.frozen(sample.frames)[:, :3])
    assert dynamic_degree(three_still, np.zeros((2, 2)), normal_speed).tolist() == [0, 0]


def test_an_unpaired_ratio_carries_a_warning():
    sample, other = clips(12), clips(12, 100)
    assert by_column(sample, sample)["motion_ratio"].warnings == ()
    assert "seeds" in by_column(sample, other)["motion_ratio"].warnings[0]
    foreign = dataclasses.replace(other, prompts=["x"] * 12)
    assert "prompts" in by_column(sample, foreign)["motion_ratio"].warnings[0]
    uncaptioned = dataclasses.replace(other, prompts=[""] * 12)
    assert "no captions" in by_column(uncaptioned, uncaptioned)["motion_ratio"].warnings[0]
    backwards = dataclasses.replace(
        sample,
        frames=sample.frames[::-1].copy(),
        prompts=sample.prompts[::-1],
        seeds=sample.seeds[::-1],
    )
    assert by_column(backwards, sample)["motion_ratio"].warnings == ()


def test_a_still_or_shorter_teacher_is_refused():
    sample, other = clips(12), clips(12, 100)
    still = dataclasses.replace(other, frames=controls.frozen(other.frames))
    with pytest.raises(ValueError, match="does not move"):
        by_column(sample, still)
    shorter = dataclasses.replace(other, frames=other.frames[:, :6])
    with pytest.raises(ValueError, match="6 frames of 32x32, the clips have 8 frames"):
        by_column(sample, shorter)


def test_raft_is_loaded_by_path_and_named_with_its_digest(tmp_path):
    from torchvision.models.optical_flow import raft_small

    torch.manual_seed(0)
    torch.save(raft_small(weights=None).state_dict(), tmp_path / "raft.pth")
    name, speed = raft_speed(tmp_path / "raft.pth")
    assert name.startswith("raft-small#")
    assert speed(texture(128, 136, (1, 0), 2)).shape == (1, 128, 136)
    with pytest.raises(ValueError, match="frames are 64x64; RAFT needs 128x128 or more"):
        speed(texture(64, 64, (1, 0), 2))
    with pytest.raises(ValueError, match="no weights at"):
        raft_speed(tmp_path / "none.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="neither"):
        raft_speed(tmp_path / "other.pth")


def test_known_good_is_nearer_to_one_than_known_bad():
    sample, teacher = clips(48), clips(48, 1000)
    noise = np.random.default_rng(0).integers(0, 256, sample.frames.shape, dtype=np.uint8)
    worse_and_worse = [
        sample.frames,
        clips(48, pace=0.5).frames,
        controls.frozen(sample.frames),
        noise,
    ]
    ratios = [
        by_column(dataclasses.replace(sample, frames=frames), teacher)["motion_ratio"].value
        for frames in worse_and_worse
    ]
    errors = [abs(ratio - 1) for ratio in ratios]
    assert errors[0] < 0.1 < errors[1] < errors[2] < errors[3]
    assert noise_floor(sample, normal_speed) < 0.1


def test_the_spread_of_the_ratio_is_that_of_joint_resampling():
    """The speed of a prompt is in both means and cancels in their ratio."""
    rng = np.random.default_rng(0)
    teacher = rng.gamma(2.0, 1.0, 400)
    student = 1.2 * teacher + rng.normal(0, 0.2, 400)
    by_clip = ratio_by_clip(student, teacher)
    assert by_clip.mean() == pytest.approx(student.mean() / teacher.mean(), rel=1e-12)
    drawn = rng.integers(0, 400, (4000, 400))
    joint_sd = (student[drawn].mean(1) / teacher[drawn].mean(1)).std()
    assert by_clip.std(ddof=1) / 20 == pytest.approx(joint_sd, rel=0.1)
    fixed_teacher_sd = (student / teacher.mean()).std(ddof=1) / 20
    assert fixed_teacher_sd > 4 * joint_sd


def test_the_ratio_pairs_clips_by_prompt_in_any_order():
    """The teacher's own clips in another order have a ratio of 1 without spread."""
    teacher = clips()
    order = [3, 1, 0, 2, *range(4, 24)]
    reordered = Clips(
        teacher.frames[order],
        [teacher.prompts[i] for i in order],
        [teacher.seeds[i] for i in order],
    )
    score = by_column(reordered, teacher)["motion_ratio"]
    assert score.value == pytest.approx(1) and np.std(score.per_clip) < 1e-6
