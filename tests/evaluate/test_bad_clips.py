"""Folders that cannot be scored: one line that names the fault, and no score."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from clip_folders import save_clip, write_lines, write_manifest, write_sampled

from distill_bench.evaluate.__main__ import main

Spoil = Callable[[Path], None]


def edited(change: Callable[[np.ndarray], np.ndarray]) -> Spoil:
    """Replace the frames of clips.npy."""

    def spoil(folder: Path) -> None:
        np.save(folder / "clips.npy", change(np.load(folder / "clips.npy")))

    return spoil


def with_lines(*lines: dict) -> Spoil:
    """Replace the manifest."""
    return lambda folder: write_lines(folder, list(lines))


def with_file(name: str, content: str | bytes) -> Spoil:
    """Write a file into the sampled folder."""

    def spoil(folder: Path) -> None:
        data = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(data)

    return spoil


def with_rates(*rates: float) -> Spoil:
    """Give the lines of the manifest these rates in turn."""

    def spoil(folder: Path) -> None:
        lines = map(json.loads, (folder / "manifest.jsonl").read_text().splitlines())
        write_lines(folder, [line | {"fps": rates[i % len(rates)]} for i, line in enumerate(lines)])

    return spoil


def emptied(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def only_file(name: str, content: bytes) -> Spoil:
    """Replace the files of the folder by one damaged file."""

    def spoil(folder: Path) -> None:
        emptied(folder)
        (folder / name).write_bytes(content)

    return spoil


def only_arrays(**clips: np.ndarray) -> Spoil:
    """Replace the files of the folder by npy clips without a manifest."""

    def spoil(folder: Path) -> None:
        emptied(folder)
        for name, frames in clips.items():
            np.save(folder / f"{name}.npy", frames)

    return spoil


def second_line(text: str) -> Spoil:
    """Replace the files of the folder by one clip, with this second line in the manifest."""

    def spoil(folder: Path) -> None:
        only_arrays(a=CLIP)(folder)
        first = json.dumps({"file": "a.npy", "prompt": "a"})
        (folder / "manifest.jsonl").write_text(f"{first}\n{text}\n")

    return spoil


def cast_from_unit_range(folder: Path) -> None:
    (folder / "row.json").unlink()  # the harness's own clips may be black
    edited(lambda x: (x > 127).astype(np.uint8))(folder)


def one_clip(folder: Path) -> None:
    edited(lambda x: x[:1])(folder)
    with_lines({"index": 0, "prompt": "a", "seed": 0})(folder)


def torn_array(folder: Path) -> None:
    path = folder / "clips.npy"
    path.write_bytes(path.read_bytes()[:1000])


def torn_manifest(folder: Path) -> None:
    path = folder / "manifest.jsonl"
    path.write_text(path.read_text()[:-20])


def named_but_missing(folder: Path) -> None:
    emptied(folder)
    write_manifest(folder, ["none.npy"], ["a"])


def unnamed_file(folder: Path) -> None:
    only_arrays(a=CLIP, b=CLIP)(folder)
    write_manifest(folder, ["a.npy"], ["a"])


def all_clips_in_one_file(folder: Path) -> None:
    (folder / "clips.npy").rename(folder / "videos.npy")
    (folder / "manifest.jsonl").unlink()


def damaged_frames(folder: Path) -> None:
    """Damage the frames of a video but not its container."""
    emptied(folder)
    noise = np.random.default_rng(0).integers(0, 256, (8, 3, 64, 64), np.uint8)
    save_clip(folder / "a.mp4", noise)
    data = bytearray((folder / "a.mp4").read_bytes())
    start = data.index(b"mdat") + 20_000
    data[start : start + 600] = b"\xff" * 600
    (folder / "a.mp4").write_bytes(data)


CLIP = np.full((8, 3, 32, 32), 9, np.uint8)
BLACK = np.zeros_like(CLIP)
LATIN_1 = '{"index": 0, "prompt": "caf\xe9", "seed": 0}\n'.encode("latin-1")
ONE_LINE = {"index": 0, "prompt": "a", "seed": 0}

# fault -> (change to a folder of 12 sampled clips, pattern of the error line)
FAULTS: dict[str, tuple[Spoil, str]] = {
    "float frames": (
        edited(lambda x: x.astype(np.float32) / 255),
        r"clips are float32; they must be uint8 in 0\.\.255",
    ),
    "frames of 0..1": (cast_from_unit_range, r"0\.\.255, not 0\.\.1"),
    "channels last": (
        edited(lambda x: x.transpose(0, 1, 3, 4, 2)),
        r"must be \(N, T, 3, H, W\); found \(12, 8, 32, 32, 3\)",
    ),
    "one clip": (one_clip, "too few clips to score: 1;"),
    "one frame": (edited(lambda x: x[:, :1]), "clips have 1 frame; at least 2"),
    "tiny frames": (edited(lambda x: x[..., :2, :2]), "frames are 2x2; at least 4x4"),
    "fewer frames than the reference": (
        edited(lambda x: x[:, :5]),
        "the teacher reference has 8 frames of 32x32, the clips have 5 frames",
    ),
    "a scalar": (
        edited(lambda x: np.uint8(3)),
        r"clips.npy is \(\); clips.npy must be \(N, T, 3, H, W\)",
    ),
    "a torn clips.npy": (torn_array, "clips.npy cannot be read"),
    "a torn facts.npz": (with_file("facts.npz", b"PK\x03\x04 torn"), "facts.npz cannot be read"),
    "too few lines": (with_lines(ONE_LINE), "lists 1 clips, clips.npy holds 12"),
    "no prompts": (
        with_lines(*({"index": i, "seed": 0} for i in range(12))),
        "line 1: the line has no 'prompt'",
    ),
    "a torn manifest": (torn_manifest, "manifest.jsonl, line 12: .*Invalid JSON"),
    "a manifest in Latin-1": (with_file("manifest.jsonl", LATIN_1), "manifest.jsonl is not UTF-8"),
    "another rate than the reference": (
        with_rates(16.0),
        "reference plays at 8 frames per second, the clips at 16",
    ),
    "two rates": (
        with_rates(16.0, 8.0),
        "gives 8 and 16 frames per second; all clips of a folder must have one rate",
    ),
    "a rate in words": (
        with_file("row.json", '{"fps": "fast"}'),
        "row.json: fps: Input should be a valid number",
    ),
    "a row.json that is a list": (with_file("row.json", "[1]"), "row.json is not a JSON object"),
    "no clips": (emptied, "no clips in"),
    "not a video": (only_file("a.mp4", b"no video"), "a.mp4 cannot be read"),
    "not a gif": (only_file("a.gif", b"no gif"), "a.gif cannot be read"),
    "damaged frames": (damaged_frames, "a.mp4 cannot be read: its frame [0-9]+ is damaged"),
    "a missing file": (named_but_missing, "no file .*none.npy"),
    "an unnamed file": (unnamed_file, r"manifest.jsonl does not name b.npy \(1 such files\)"),
    "two sizes": (
        only_arrays(a=BLACK, b=BLACK[..., :16, :16]),
        "all clips of a folder must have one shape",
    ),
    "npy files of 0..1": (only_arrays(a=BLACK, b=BLACK), r"0\.\.255, not 0\.\.1"),
    "all clips in one npy file": (
        all_clips_in_one_file,
        r"\(12, 8, 3, 32, 32\); a clip is \(T, 3, H, W\); a file of several clips must be named",
    ),
    "an npy file with channels last": (
        only_arrays(a=CLIP.transpose(0, 2, 3, 1)),
        r"\(8, 32, 32, 3\); a clip is \(T, 3, H, W\); this looks like \(T, H, W, 3\)",
    ),
    "a line of CSV": (
        second_line("a.npy,a red circle"),
        "manifest.jsonl, line 2: 'a.npy,a red circle': Invalid JSON",
    ),
    "a line that is a list": (second_line('["a.npy", "a"]'), "line 2: .*should be an object"),
    "a file that is a number": (
        second_line('{"file": 3, "prompt": "a"}'),
        "line 2: 'file': .*string",
    ),
    "a prompt that is null": (
        second_line('{"file": "a.npy", "prompt": null}'),
        "line 2: 'prompt': .*string",
    ),
    "a rate of zero": (
        second_line('{"file": "a.npy", "prompt": "a", "fps": 0}'),
        "line 2: 'fps': .*greater than 0",
    ),
    "a file named twice": (
        second_line('{"file": "./a.npy", "prompt": "a"}'),
        "manifest.jsonl names a.npy 2 times",
    ),
    "a key in capitals": (
        second_line('{"file": "a.npy", "prompt": "a", "FPS": 24}'),
        "line 2: unknown key 'FPS'; write 'fps'",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_folder_ends_in_one_line_and_no_score(tmp_path, capsys, fault):
    spoil, reason = FAULTS[fault]
    folder = write_sampled(tmp_path / "a")
    reference = write_sampled(tmp_path / "b", first=100)
    spoil(folder)
    with pytest.raises(SystemExit) as stopped:
        main([str(folder), "--reference", str(reference), "--evaluators", "fvd"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    assert re.search(reason, error), error
    assert not (folder / "metrics.jsonl").exists()
