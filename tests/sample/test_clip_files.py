"""Reading and writing single clip files of every type."""

import numpy as np
import pytest
from clip_folders import save_animation, save_clip

from distill_bench.domain import controls
from distill_bench.sample.clip_files import frame_counts, read_clip, write_video


@pytest.mark.parametrize(
    ("suffix", "error"), [(".npy", 0), (".webp", 0), (".gif", 12), (".mp4", 6)]
)
def test_every_kind_of_file_gives_its_frames_and_rate(tmp_path, suffix, error):
    """Lossless files keep every bit; a gif has 256 colours, and an mp4 compresses them."""
    frames = controls.rendered(3, 4)[0][2]
    save_clip(tmp_path / f"clip{suffix}", frames)
    clip = read_clip(tmp_path / f"clip{suffix}")
    assert clip.frames.shape == frames.shape and clip.frames.dtype == np.uint8
    assert np.abs(clip.frames.astype(int) - frames).mean() <= error / 4
    assert np.abs(clip.frames.astype(int) - frames).max() <= 4 * error
    if suffix == ".npy":
        assert clip.fps is None
    else:
        assert clip.fps == pytest.approx(8, rel=0.05)


def test_a_written_video_reads_back_with_its_rate(tmp_path):
    frames = controls.rendered(1, 0)[0][0].repeat(4, -1).repeat(4, -2)
    assert write_video(tmp_path / "a.mp4", frames, 12.5)
    clip = read_clip(tmp_path / "a.mp4")
    assert clip.fps == 12.5 and clip.frames.shape == frames.shape
    assert np.abs(clip.frames.astype(int) - frames).mean() < 4


@pytest.mark.parametrize(
    ("milliseconds", "tick", "counts"),
    [
        ([40, 40, 50, 40], 10, [1, 1, 1, 1]),  # 24 per second in a gif, not 100
        ([20, 30, 20, 30], 10, [1, 1, 1, 1]),
        ([41, 42, 42], 1, [1, 1, 1]),  # 24 per second in a webp
        ([120, 250, 120, 380], 10, [1, 2, 1, 3]),  # equal frames are stored as one
        ([250, 375], 1, [2, 3]),  # every stored frame stands for several
        ([125] * 8, 1, [1] * 8),
    ],
)
def test_rounded_durations_are_frames_of_one_rate(milliseconds, tick, counts):
    assert frame_counts(milliseconds, tick) == counts


@pytest.mark.parametrize(
    ("milliseconds", "reason"),
    [([0, 40], "no duration"), ([100, 137, 171, 113], "no constant rate")],
)
def test_durations_without_a_common_rate_are_refused(milliseconds, reason):
    with pytest.raises(ValueError, match=reason):
        frame_counts(milliseconds, 1)


def test_a_gif_with_spread_durations_keeps_its_number_of_frames(tmp_path):
    frames = controls.rendered(3, 4)[0][2]
    save_animation(tmp_path / "a.gif", frames, [40, 40, 50, 40, 40, 50, 40, 40])
    clip = read_clip(tmp_path / "a.gif")
    assert len(clip.frames) == 8 and clip.fps == pytest.approx(24, rel=0.03)
