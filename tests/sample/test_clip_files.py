"""Reading and writing single clip files of every type."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from clip_folders import save_animation, save_clip, save_video
from PIL import Image

from distill_bench.domain import controls
from distill_bench.sample.clip_files import (
    frame_counts,
    frame_rate,
    oriented,
    read_clip,
    write_video,
)


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


@pytest.mark.parametrize("suffix", [".avi", ".MOV", ".mkv", ".ts", ".m4v", ".flv", ".3gp", ".nut"])
def test_every_container_gives_all_frames_and_the_rate(tmp_path, suffix):
    """Some count in milliseconds, which does not make 24 frames per second uneven."""
    frames = controls.rendered(3, 4)[0][2]
    save_video(tmp_path / f"clip{suffix}", frames, 24)
    clip = read_clip(tmp_path / f"clip{suffix}")
    assert clip.frames.shape == frames.shape
    assert clip.fps == pytest.approx(24)


# display matrix a, b, c, d; how numpy turns or flips the rows and columns of (T, 3, H, W)
TURNS = {
    (1, 0, 0, 1): lambda clip: clip,
    (0, 1, -1, 0): lambda clip: np.rot90(clip, -1, (2, 3)),  # phones held upright
    (-1, 0, 0, -1): lambda clip: np.rot90(clip, 2, (2, 3)),
    (0, -1, 1, 0): lambda clip: np.rot90(clip, 1, (2, 3)),
    (-1, 0, 0, 1): lambda clip: clip[..., ::-1],
    (1, 0, 0, -1): lambda clip: clip[..., ::-1, :],
    (0, 1, 1, 0): lambda clip: clip.swapaxes(2, 3),
    (0, -1, -1, 0): lambda clip: np.rot90(clip, 2, (2, 3)).swapaxes(2, 3),
}


def write_matrix(path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Set the display matrix in the track header of an mp4."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


@pytest.mark.parametrize("matrix", TURNS)
def test_a_turned_or_flipped_video_is_read_as_a_player_shows_it(tmp_path, matrix):
    frames = controls.rendered(3, 4)[0][2][..., :24]
    save_video(tmp_path / "a.mp4", frames, 8)
    upright = read_clip(tmp_path / "a.mp4").frames
    write_matrix(tmp_path / "a.mp4", matrix)
    np.testing.assert_array_equal(read_clip(tmp_path / "a.mp4").frames, TURNS[matrix](upright))


@pytest.mark.parametrize("matrix", [(1, 1, -1, 1), (1, 0, 0, 2), (0, 0, 0, 0), (1, 0, 1, 1)])
def test_another_display_matrix_is_refused(matrix):
    with pytest.raises(ValueError, match="not a turn by a multiple of 90 degrees"):
        oriented(np.zeros((2, 3, 4, 4), np.uint8), matrix)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".flv", ".avi", ".ts"])
@pytest.mark.parametrize("shown", [(0, 1, 2, 4, 5, 6, 7, 8), (0, 1, 2, 3, 4, 5, 6, 9)])
def test_a_video_of_uneven_frame_times_is_refused(tmp_path, suffix, shown):
    save_video(tmp_path / f"a{suffix}", controls.rendered(3, 4)[0][2], 8, shown)
    with pytest.raises(ValueError, match="its frames last 125 to (250|375) milliseconds"):
        read_clip(tmp_path / f"a{suffix}")


def test_a_video_may_start_late(tmp_path):
    save_video(tmp_path / "a.mkv", controls.rendered(3, 4)[0][2], 8, range(3, 11))
    assert read_clip(tmp_path / "a.mkv").fps == 8


MILLISECOND = Fraction(1, 1000)


@pytest.mark.parametrize(
    ("times", "tick", "stated", "fps"),
    [
        ([0, 42, 83, 125, 167], MILLISECOND, 24.0, 24.0),
        ([7, 40, 74, 107, 140], MILLISECOND, 30.0, 30.0),
        ([0, 4, 8, 13, 17, 21, 25], MILLISECOND, 240.0, 240.0),
        ([0, 3003, 6006], Fraction(1, 90_000), 29.97, 29.97),
        ([0, 125, 250, 375], MILLISECOND, None, 8.0),
        ([0, 125, 250, 375], MILLISECOND, 25.0, 8.0),  # a wrong rate in the header
        ([None, None], MILLISECOND, 25.0, 25.0),
        ([0, None, 250, 375], MILLISECOND, 8.0, 8.0),
        ([0], MILLISECOND, 8.0, 8.0),
        ([0, 1, 3, 4, 5], Fraction(1, 30), 24.0, None),  # a tick hides no dropped frame
        ([0, 125, 260, 375], MILLISECOND, 8.0, None),
        ([0, 0, 0], MILLISECOND, 8.0, None),
        ([0, 41, 83, 130, 180, 233], MILLISECOND, 24.0, None),  # slows down
    ],
)
def test_timestamps_give_the_rate_up_to_the_rounding_of_the_container(times, tick, stated, fps):
    pairs = [(pts, None) for pts in times]
    if fps is None:
        with pytest.raises(ValueError, match="a clip has a constant rate"):
            frame_rate(pairs, tick, stated)
    else:
        assert frame_rate(pairs, tick, stated) == pytest.approx(fps)


def test_a_last_frame_that_stays_is_refused():
    with pytest.raises(ValueError, match="its frames last 125 to 2000 milliseconds"):
        frame_rate([(0, 125), (125, 125), (250, 2000)], MILLISECOND, 1.3)


def test_pixels_that_are_not_square_are_refused(tmp_path):
    frames = controls.rendered(3, 4)[0][2]
    save_video(tmp_path / "a.mp4", frames, 8, sample_aspect_ratio=Fraction(40, 39))
    assert read_clip(tmp_path / "a.mp4").frames.shape == frames.shape
    save_video(tmp_path / "b.mp4", frames, 8, sample_aspect_ratio=Fraction(4, 3))
    with pytest.raises(ValueError, match="its pixels are not square, but 4:3"):
        read_clip(tmp_path / "b.mp4")


@pytest.mark.parametrize("suffix", [".webp", ".gif", ".apng", ".mkv"])
def test_transparent_pixels_are_refused_and_an_opaque_alpha_is_not(suffix, tmp_path):
    """Their colours are undefined; a player shows the ground behind them."""
    colours = np.arange(4 * 16 * 16 * 3).reshape(4, 16, 16, 3) % 251
    for name, lowest in (("opaque", 255), ("clear", 0)):
        path, alpha = tmp_path / f"{name}{suffix}", np.full((4, 16, 16, 1), 255)
        alpha[:, :8] = lowest
        pictures = np.concatenate([colours, alpha], -1).astype(np.uint8)
        if suffix in (".webp", ".gif"):
            first, *others = map(Image.fromarray, pictures)
            options = {"duration": 125, "lossless": True}
            first.save(path, save_all=True, append_images=others, **options)
            continue
        with av.open(str(path), "w") as container:
            codec = {".apng": "apng", ".mkv": "ffv1"}[suffix]
            stream = container.add_stream(codec, rate=8)
            stream.width = stream.height = 16
            stream.pix_fmt = {".apng": "rgba", ".mkv": "bgra"}[suffix]
            for picture in pictures:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgba")))
            container.mux(stream.encode())
    assert read_clip(tmp_path / f"opaque{suffix}").frames.shape == (4, 3, 16, 16)
    with pytest.raises(ValueError, match="transparent pixels"):
        read_clip(tmp_path / f"clear{suffix}")
