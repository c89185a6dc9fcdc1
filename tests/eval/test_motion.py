"""Motion on clips of known motion: rendered shapes, shifted textures, still frames under noise."""

import dataclasses
import json

import calibration
import numpy as np
import pytest
import torch
from calibration import disc, moving_shapes, texture
from scipy.ndimage import correlate1d, gaussian_filter

from distill_bench.domain import controls
from distill_bench.eval import motion as motion_module
from distill_bench.eval.motion import Motion, dynamic_degree, fastest, noise_floor, speeds
from distill_bench.evaluate.optical_flow import (
    DAMPING,
    farneback_flow,
    is_large,
    lucas_kanade_flow,
    net_speed,
    raft_flow,
)
from distill_bench.evaluator import Clips


def clips(count: int = 24, first: int = 0, pace: float = 1.0) -> Clips:
    frames, prompts = controls.rendered(count, first, pace)
    return Clips(frames, prompts, list(range(first, first + count)))


def by_column(sample: Clips, teacher: Clips | None = None) -> dict[str, object]:
    references = {} if teacher is None else {"teacher": teacher}
    return {score.column: score for score in Motion().scores(sample, references)}


@pytest.mark.parametrize("change", [None, controls.jittered, controls.noisy])
def test_lucas_kanade_reads_the_speed_of_shapes_in_any_heading(change):
    """From still to 2 pixels per frame, also under jitter and 10 % of noise."""
    for true in (0.0, 0.4, 1.0, 2.0):
        frames = moving_shapes(true)
        read = speeds(frames if change is None else change(frames, 0), lucas_kanade_flow).top
        assert read.mean() == pytest.approx(true, rel=0.05, abs=0.05 if change is None else 0.2)
        assert np.abs(read - read.mean()).max() < (0.1 if change is None else 0.2)


def test_jitter_is_flicker_and_not_motion():
    """The mean speed of frame pairs, by contrast, reads jitter of 0.15 pixels as 0.2."""
    still = moving_shapes(0.0)
    read = speeds(controls.jittered(still), lucas_kanade_flow)
    assert read.top.mean() < 0.06 and read.by_pair.mean() > 0.18


def test_lucas_kanade_is_damped_least_squares_in_gaussian_windows():
    """Against scipy's filters and numpy's solver, at every pixel up to the edges."""
    clip = texture(20, 28, (0.7, -0.4), 3)
    smooth = gaussian_filter(clip / 255, 2.0, mode="nearest", truncate=3, axes=(2, 3))
    change, middle = np.diff(smooth, axis=0), (smooth[1:] + smooth[:-1]) / 2
    gradient = [correlate1d(middle, [-0.5, 0, 0.5], axis, mode="nearest") for axis in (3, 2)]

    def window(product: np.ndarray) -> np.ndarray:
        return gaussian_filter(product.sum(1), 3.0, mode="nearest", truncate=3, axes=(1, 2))

    matrix = np.moveaxis([[window(a * b) for a in gradient] for b in gradient], (0, 1), (-2, -1))
    right = np.stack([-window(a * change) for a in gradient], -1)
    expected = np.linalg.solve(matrix + DAMPING * np.eye(2), right[..., None])[..., 0]
    flow = lucas_kanade_flow(torch.from_numpy(clip)).permute(0, 2, 3, 1)
    np.testing.assert_allclose(flow, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size, radius", [(32, 4), (64, 4), (64, 8), (64, 16)])
def test_small_bodies_are_read_within_a_tenth(size, radius):
    for true in (0.5, 1.0, 2.0):
        read = speeds(disc(size, size, radius, true, 0.4)[None], lucas_kanade_flow).top[0]
        assert read == pytest.approx(true, rel=0.1)


def test_a_point_is_followed_through_the_flow():
    """A body that steps right three times by 2 pixels, in a flow of a quarter of the size."""
    flow = torch.zeros(3, 2, 8, 8)
    for step in range(3):
        flow[step, 0, 2:4, 2 + step // 2 : 5] = 2.0
    speed = net_speed(flow, (32, 32))
    assert speed[2, 2] == 2 and speed[6, 6] == 0
    there_and_back = torch.stack([flow[0], -flow[0], torch.zeros(2, 8, 8)])
    assert net_speed(there_and_back, (32, 32))[2, 2] == pytest.approx(0, abs=1e-6)


def test_a_point_is_followed_in_pixels_of_a_clip_of_other_proportions_and_stays_inside():
    """Flow of 4x6 pixels for a clip of 20x12: 5 pixels of the clip across, 2 down."""
    flow = torch.zeros(2, 2, 6, 4)
    flow[0, 0, 1, 0] = 5.0  # to the place of the next line
    flow[1, 1, 1, 1] = flow[0, 1, 2, 2] = 4.0  # the latter to the line after the next
    flow[1, 0, 4, 2] = 5.0
    flow[:, 0, 5, 3] = flow[:, 1, 5, 3] = 7.0  # past the last column and line
    flow[:, 0, 0, 0] = flow[:, 1, 0, 0] = -7.0  # past the first
    expected = torch.zeros(6, 4)
    expected[1, 0] = expected[2, 2] = np.hypot(5, 4) / 2
    expected[1, 1], expected[4, 2] = 4 / 2, 5 / 2
    torch.testing.assert_close(net_speed(flow, (12, 20)), expected, rtol=0, atol=1e-6)


def test_motion_that_turns_back_within_eight_frames_cancels():
    """Nine frames are two windows, of four steps each."""
    forwards = moving_shapes(1.0, 4)
    for order, expected in (([0, 1, 2, 3, 2, 1, 0, 0], 0), ([0, 1, 2, 3, 4, 3, 2, 1, 0], 1)):
        read = speeds(forwards[:, order], lucas_kanade_flow)
        assert read.top.mean() == pytest.approx(expected, abs=0.1)
        assert read.by_pair[:, :6].mean() == pytest.approx(1, rel=0.06)


def test_the_fastest_twentieth_of_the_pixels_counts_and_at_least_one():
    assert fastest(torch.tensor([[[1.0, 3], [1, 1]], [[2, 2], [0, 2]]])).tolist() == [3, 2]
    assert fastest(torch.arange(80.0).reshape(1, 8, 10)).tolist() == [(79 + 78 + 77 + 76) / 4]


def test_the_noise_floor_is_read_off_sixteen_still_clips_of_eight_frames_with_noise():
    seen = []

    def flow(clip: torch.Tensor) -> torch.Tensor:
        seen.append(clip.float())
        steps = torch.zeros(len(clip) - 1, 2, 32, 32)
        steps[:, 0, :, :16] = len(seen) / 100
        return steps

    frames = np.empty((18, 9, 3, 32, 32), np.uint8)
    frames[:] = np.arange(60, 78, dtype=np.uint8)[:, None, None, None, None]
    frames += 10 * np.arange(9, dtype=np.uint8)[:, None, None, None]
    floor = noise_floor(Clips(frames, [""] * 18, [0] * 18), flow)
    assert len(seen) == 16
    for index, clip in enumerate(seen):
        assert clip.shape == (8, 3, 32, 32)
        level = 60 + index + 10 * 4  # of the middle frame
        assert (clip.mean((1, 2, 3)) - level).abs().max() < 0.5
        assert clip.std(dim=0).mean() == pytest.approx(0.02 * 255, rel=0.1)
    apart = (seen[0] - seen[0].mean()) - (seen[1] - seen[1].mean())
    assert apart.std() == pytest.approx(2**0.5 * 0.02 * 255, rel=0.1), "noise of their own"
    assert floor == pytest.approx(0.085, rel=1e-4), "mean of 0.01, 0.02, ..., 0.16"
    noise_floor(Clips(frames, [""] * 18, [0] * 18), flow)
    assert all(map(torch.equal, seen[16:], seen[:16])), "the same noise every time"


def test_motion_that_turns_back_after_a_window_counts():
    forwards = moving_shapes(1.0, 4)
    there_and_back = np.concatenate([forwards, forwards[:, -2::-1]], 1)
    assert there_and_back.shape[1] == 15
    assert speeds(there_and_back, lucas_kanade_flow).top.mean() == pytest.approx(1, rel=0.05)


def test_the_readme_states_the_errors_of_the_calibration():
    text = (calibration.FLOW_FILE.parent / "README.md").read_text()
    stored = json.loads(calibration.FLOW_FILE.read_text())
    small, limit = stored["lucas-kanade"], stored["lucas-kanade-64"]
    large, moving = stored["farneback-half"], small["moving_shapes"]
    rows = {
        "moving shapes, radius 5 to 6, of 32x32": moving["error"]["rendered"],
        "the same under 5 % of noise": moving["error"]["5 % of noise"],
        "the same under jitter of 0.15 pixels": moving["error"]["jitter of 0.15 pixels"],
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
    for name, curve in moving["response"].items():
        cells = [f"{reading['mean']:.2f} ± {reading['sd']:.2f}" for reading in curve.values()]
        assert f"| {name} | {' | '.join(cells)} |" in text, name


@pytest.mark.slow
def test_the_stored_calibration_is_reproducible():
    stored = json.loads(calibration.FLOW_FILE.read_text())
    assert stored["lucas-kanade"]["moving_shapes"] == calibration.shape_calibration(
        lucas_kanade_flow
    )
    for name, size in (("lucas-kanade", 32), ("lucas-kanade-64", 64)):
        again = calibration.flow_calibration(lucas_kanade_flow, (size, size))
        for kind in ("textures", "discs"):
            read = [row["top"] for row in stored[name][kind]]
            expected = [row["top"] for row in again[kind]]
            assert read == pytest.approx(expected, abs=2e-3), (name, kind)
            moving = [row for row in stored[name][kind] if row["true"]]
            assert stored[name][f"{kind}_error"] == calibration.relative_error(moving)
    for row in stored["farneback-half"]["textures"]:
        assert row["mean"] == pytest.approx(row["true"], rel=0.02, abs=0.02)


def test_a_still_clip_scores_zero_and_reads_under_its_noise_floor():
    moving = clips()
    still = dataclasses.replace(moving, frames=controls.frozen(moving.frames))
    scores = by_column(still, moving)
    assert scores["motion_still"].value == scores["motion_still_true"].value == 1
    for column in (
        "motion",
        "motion_mean",
        "flicker",
        "dynamic_degree",
        "motion_true",
        "motion_ratio",
        "motion_ratio_true",
    ):
        assert scores[column].value == pytest.approx(0, abs=1e-9), column
    assert scores["motion"].value < scores["motion_floor"].value < 0.1


def test_half_speed_halves_the_ratio_and_shuffling_changes_it():
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
    assert ratios["same"] == pytest.approx(1)
    assert ratios["backwards"] == pytest.approx(1, abs=0.01)
    assert ratios["half"] == pytest.approx(0.5, abs=0.03)
    assert abs(ratios["shuffled"] - 1) > 0.1


@pytest.mark.parametrize("shift", [(1.0, 0.0), (4.0, 2.0), (8.0, -4.0)])
def test_farneback_reads_shifted_textures_within_two_per_cent(shift):
    clip = texture(480, 832, shift, 2)
    read, true = speeds(clip[None], farneback_flow), float(np.hypot(*shift))
    assert read.mean[0] == pytest.approx(true, rel=0.005)
    assert read.top[0] == pytest.approx(true, rel=0.02)


@pytest.mark.parametrize("flow, error", [(lucas_kanade_flow, 0.1), (farneback_flow, 0.02)])
def test_a_rolled_texture_is_seen_and_a_still_one_is_not(flow, error):
    still = np.repeat(texture(64, 96, (0, 0), 1), 3, 0)
    rolled = np.stack([np.roll(still[0], 2 * t, -1) for t in range(3)])
    assert speeds(still[None], flow).top[0] < 0.03
    assert speeds(rolled[None], flow).top[0] == pytest.approx(2, rel=error)


def test_the_method_is_chosen_by_size_and_named_on_the_score():
    small = by_column(clips())
    assert small["motion"].extractor == "lucas-kanade" and "motion_ratio" not in small
    assert small["dynamic_degree"].title == "dynamic degree[lucas-kanade]"
    frames = np.stack([texture(80, 150, (1.0, s / 4), 3, seed=s) for s in range(3)])
    large = by_column(Clips(frames, ["a"] * 3, [0, 1, 2]))
    assert large["motion"].extractor == "farneback-half" and "motion_true" not in large
    diagonals = 100 * 8 / 170 * large["motion"].value
    assert large["motion_diagonals"].value == pytest.approx(diagonals)


def test_flicker_is_the_mean_change_of_a_pixel_from_frame_to_frame():
    """Up and down alike; differences within a frame do not count."""
    frames = np.zeros((2, 3, 3, 32, 32), np.uint8)
    frames[:, :, :, :16] = 200
    frames[0, 1] += 20
    frames[1, 2] += 5
    flicker = by_column(Clips(frames, ["a"] * 2, [0, 1]))["flicker"]
    assert flicker.per_clip == (20.0, 2.5)


def test_a_frame_is_large_if_its_shorter_side_is_above_64_pixels():
    sizes = [(64, 64), (64, 200), (200, 64), (65, 65), (65, 200), (200, 65)]
    large = [is_large(np.zeros((2, 3, 3, *size), np.uint8)) for size in sizes]
    assert large == [False] * 3 + [True] * 3


def test_without_opencv_large_clips_are_skipped_and_the_package_is_named(monkeypatch):
    large = Clips(np.stack([texture(80, 80, (1, 0), 3)] * 2), ["a"] * 2, [0, 1])
    assert Motion().reason_to_skip(large) is None
    monkeypatch.setattr(motion_module.importlib.util, "find_spec", lambda name: None)
    install = "needs opencv: pip install 'distill-bench[optical-flow]'"
    assert Motion().reason_to_skip(large).endswith(install)
    assert Motion().reason_to_skip(clips()) is None


def test_a_clip_is_dynamic_if_two_of_seven_pairs_are_above_the_threshold():
    """8 frames at 8 per second: at 32x32 the threshold is 0.75 pixels."""
    top = np.array([[0.8, 0.8, 0, 0, 0, 0, 0], [0.8, 0.7, 0, 0, 0, 0, 0]])
    assert dynamic_degree(clips(2), top, lucas_kanade_flow).tolist() == [1, 0]


def test_the_dynamic_degree_reads_every_second_frame_at_16_per_second():
    lengths = []

    def flow(clip: torch.Tensor) -> torch.Tensor:
        lengths.append(len(clip))
        return torch.zeros(len(clip) - 1, 2, 4, 4)

    dynamic_degree(dataclasses.replace(clips(2), fps=16), np.zeros((2, 7)), flow)
    assert lengths == [4, 4]


def test_short_clips_are_not_dynamic_by_default():
    """VBench would require 0 fast pairs and call them dynamic."""
    sample = clips(2)
    two_frames = dataclasses.replace(sample, frames=sample.frames[:, :2])
    assert dynamic_degree(two_frames, np.full((2, 1), 0.8), lucas_kanade_flow) is None
    three_still = dataclasses.replace(sample, frames=controls.frozen(sample.frames)[:, :3])
    assert dynamic_degree(three_still, np.zeros((2, 2)), lucas_kanade_flow).tolist() == [0, 0]


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
    with pytest.raises(ValueError, match="the teacher reference has 6 frames of 32x32, the"):
        by_column(sample, shorter)


def test_raft_is_loaded_by_path_and_named_with_its_digest(tmp_path):
    from torchvision.models.optical_flow import raft_small

    torch.manual_seed(0)
    torch.save(raft_small(weights=None).state_dict(), tmp_path / "raft.pth")
    name, flow = raft_flow(tmp_path / "raft.pth")
    assert name.startswith("raft-small#")
    assert not flow.net.training and not any(p.requires_grad for p in flow.parameters())
    assert flow(torch.from_numpy(texture(128, 136, (1, 0), 2))).shape == (1, 2, 128, 136)
    assert flow.fitting.name == f"{name}, pairs of frames"
    motion, small, large = (
        Motion(raft=str(tmp_path / "raft.pth")),
        Clips(np.zeros((2, 2, 3, 127, 200), np.uint8), [""] * 2, [0, 0]),
        Clips(np.zeros((2, 2, 3, 128, 200), np.uint8), [""] * 2, [0, 0]),
    )
    assert motion.extractors(small) == motion.extractors(large) == {name, "oracle"}
    assert motion.reason_to_skip(large) is None
    assert motion.reason_to_skip(small) == (
        "frames are 127x200; RAFT needs 128x128 or more; unset DISTILL_BENCH_RAFT"
    )
    with pytest.raises(ValueError, match="frames are 64x64; RAFT needs 128x128 or more"):
        flow(torch.from_numpy(texture(64, 64, (1, 0), 2)))
    with pytest.raises(ValueError, match="no weights at"):
        raft_flow(tmp_path / "none.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="neither"):
        raft_flow(tmp_path / "other.pth")


def test_known_good_is_nearer_to_one_than_known_bad():
    sample, teacher = clips(48), clips(48, 1000)
    noise = np.random.default_rng(0).integers(0, 256, sample.frames.shape, dtype=np.uint8)
    worse_and_worse = [
        sample.frames,
        clips(48, pace=0.5).frames,
        controls.frozen(sample.frames),
    ]
    scores = [
        by_column(dataclasses.replace(sample, frames=frames), teacher)
        for frames in [*worse_and_worse, noise]
    ]
    errors = [abs(of_set["motion_ratio"].value - 1) for of_set in scores]
    assert errors[0] < 0.1 < errors[1] < errors[2]
    w1 = [of_set["motion_w1"].value for of_set in scores]
    assert w1[0] < 0.1 < w1[1] < w1[2] and w1[3] > 3 * w1[0]
    assert noise_floor(sample, lucas_kanade_flow) < 0.1


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
