"""Scoring folders: the harness's own and anybody's files, nothing twice, no unlike protocols, and bad input of every kind."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distill_bench.domain import controls
from distill_bench.evaluate.__main__ import main
from distill_bench.evaluate.extractors import load_extractor
from distill_bench.evaluate.score import conditions, evaluate
from distill_bench.evaluator import Clips, Evaluator, Score
from distill_bench.sample.clip_files import frame_counts, read_clip
from distill_bench.sample.load_folder import load_clips
from distill_bench.store.files import read_jsonl
from distill_bench.store.nested import differences

ROOT = Path(__file__).parents[2]


def write(
    folder: Path, count: int = 12, first: int = 0, frames: np.ndarray | None = None, **row
) -> Path:
    """A folder of clips as the harness writes it."""
    made, prompts = controls.rendered(count, first)
    frames = made if frames is None else frames
    folder.mkdir(parents=True)
    np.save(folder / "clips.npy", frames)
    lines = [{"index": i, "prompt": p, "seed": first + i} for i, p in enumerate(prompts)]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "row.json").write_text(json.dumps({"kind": "student"} | row))
    return folder


def manifest(folder: Path, names: list[str], prompts: list[str]) -> None:
    lines = [
        {"file": n, "prompt": p, "seed": i}
        for i, (n, p) in enumerate(zip(names, prompts, strict=True))
    ]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def save_clip(path: Path, frames: np.ndarray, fps: int = 8) -> None:
    """One clip (T, 3, H, W) as a file of its suffix."""
    images = frames.transpose(0, 2, 3, 1)
    if path.suffix == ".npy":
        np.save(path, frames)
    elif path.suffix == ".mp4":
        av = pytest.importorskip("av")
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=fps)
            stream.width, stream.height, stream.pix_fmt = (
                images.shape[2],
                images.shape[1],
                "yuv444p",
            )
            stream.options = {"crf": "0"}
            for image in images:
                container.mux(
                    stream.encode(
                        av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                    )
                )
            container.mux(stream.encode())
    else:
        from PIL import Image

        first, *rest = [Image.fromarray(image) for image in images]
        lossless = {"lossless": True} if path.suffix == ".webp" else {}
        first.save(
            path, save_all=True, append_images=rest, duration=1000 // fps, loop=0, **lossless
        )


@pytest.mark.parametrize("suffix, error", [(".npy", 0), (".webp", 0), (".gif", 12), (".mp4", 6)])
def test_a_file_of_any_kind_gives_its_frames_and_rate(tmp_path, suffix, error):
    """Lossless kinds to the bit; a gif has 256 colours and hundredths of a second, a video another colour space."""
    clip = controls.rendered(3, 4)[0][2]
    save_clip(tmp_path / f"clip{suffix}", clip)
    read = read_clip(tmp_path / f"clip{suffix}")
    frames, fps = read.frames, read.fps
    assert frames.shape == clip.shape and frames.dtype == np.uint8
    assert np.abs(frames.astype(int) - clip).mean() <= error / 4
    assert np.abs(frames.astype(int) - clip).max() <= 4 * error
    assert fps is None if suffix == ".npy" else fps == pytest.approx(8, rel=0.05)


@pytest.mark.parametrize("suffix", [".mp4", ".webp", ".gif"])
def test_anybodys_folder_is_scored_by_the_command(tmp_path, suffix, capsys):
    frames, prompts = controls.rendered(12, 0)
    folder = tmp_path / "theirs"
    folder.mkdir()
    names = [f"{i:02d}{suffix}" for i in range(12)]
    for name, clip in zip(names, frames, strict=True):
        save_clip(folder / name, clip)
    manifest(folder, names, prompts)
    reference = write(tmp_path / "reference", 12, 100)
    assert (
        main([str(folder), "--reference", str(reference), "--evaluators", "fvd,motion,clip_score"])
        == 0
    )
    lines = {line["column"]: line for line in read_jsonl(folder / "metrics.jsonl")}
    assert {"fvd", "kvd", "motion", "motion_ratio", "clip_score", "clip_video"} <= set(lines)
    assert lines["motion_ratio"]["value"] == pytest.approx(1, abs=0.25)
    assert lines["clip_score"]["value"] > 80 and lines["fvd"]["n"] == 12
    said = capsys.readouterr().out
    assert (
        "FD[indomain-r2p1-cls], to the teacher's clips" in said
        and "warning: fvd: rank-deficient" in said
    )
    assert (folder / ".features").is_dir() and (reference / ".features").is_dir()


def test_the_second_call_computes_nothing_and_a_changed_setting_does(tmp_path, monkeypatch):
    folder, reference = write(tmp_path / "a"), write(tmp_path / "b", first=100)
    first = evaluate(folder, {"teacher": reference}, ["motion", "fidelity"])
    stamp = (folder / "metrics.jsonl").stat().st_mtime_ns
    assert evaluate(folder, {"teacher": reference}, ["motion", "fidelity"]) == first
    assert (folder / "metrics.jsonl").stat().st_mtime_ns == stamp
    from distill_bench.registry import find_evaluator

    monkeypatch.setattr(find_evaluator("fidelity"), "version", 99)
    again = evaluate(folder, {"teacher": reference}, ["motion", "fidelity"])
    assert {line["version"] for line in again if line["metric"] == "fidelity"} == {99}
    assert len(again) == len(first)


def test_a_line_says_all_that_a_reader_must_know(tmp_path):
    folder, reference = write(tmp_path / "a"), write(tmp_path / "b", first=100)
    (line, *_) = evaluate(folder, {"teacher": reference}, ["fvd"], "abcd1234")
    assert {
        "column",
        "value",
        "title",
        "unit",
        "better",
        "headline",
        "per_clip",
        "sd",
        "extractor",
        "n",
        "metric",
        "version",
    } < set(line)
    assert line["protocol"] == "abcd1234" and line["settings"]["resamples"] == 100
    assert line["conditions"]["clips"] == 12 and line["conditions"]["references"].keys() == {
        "teacher"
    }
    assert line["warnings"] and line["note"] is None


def test_scores_of_another_protocol_are_refused_and_what_differs_is_named(tmp_path):
    reference = write(tmp_path / "b", first=100)
    folder = write(tmp_path / "a")
    evaluate(folder, {"teacher": reference}, ["motion"])
    other = write(tmp_path / "c", first=200)
    with pytest.raises(ValueError, match=r"they differ in references.teacher \w{8} and \w{8}"):
        evaluate(folder, {"teacher": other}, ["fidelity"])
    assert {
        line["metric"] for line in evaluate(folder, {"teacher": other}, ["motion", "fidelity"])
    } == {"motion", "fidelity"}
    a, b = load_clips(folder), load_clips(reference)
    assert differences(conditions(a, {}), conditions(a, {})) == ""
    assert differences(
        conditions(a, {}), conditions(dataclasses.replace(b, fps=16), {})
    ).startswith("fps 8.0 and 16")


def test_scores_do_not_depend_on_what_was_cached(tmp_path):
    folder, reference = write(tmp_path / "a"), write(tmp_path / "b", first=100)
    fresh = evaluate(folder, {"teacher": reference}, out=tmp_path / "1.jsonl")
    kept = evaluate(folder, {"teacher": reference}, out=tmp_path / "2.jsonl")
    assert fresh == kept


@pytest.mark.slow
@pytest.mark.timeout(150)  # they take seconds; a rank that waits for the other is killed
def test_two_ranks_give_every_score_and_value_of_one(tmp_path):
    """Two processes as torchrun starts them; 40 clips are two batches, so that both ranks have one."""
    folder, reference = write(tmp_path / "a", 40), write(tmp_path / "b", 40, 100)
    argv = [
        sys.executable,
        "-m",
        "distill_bench.evaluate",
        str(folder),
        "--reference",
        str(reference),
    ]
    argv += ["--evaluators", "fvd,motion,diversity", "--out", str(tmp_path / "two.jsonl")]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    where = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [
        subprocess.Popen(argv, env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, **where)
        for rank in (0, 1)
    ]
    try:
        said = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert "motion_ratio" in said[0] and "fvd" not in said[1], "the first rank alone speaks"
    for clips in (folder, reference):
        shutil.rmtree(clips / ".features")  # else one process would read what two have made
    one = evaluate(
        folder, {"teacher": reference}, ["fvd", "motion", "diversity"], out=tmp_path / "one.jsonl"
    )
    two = read_jsonl(tmp_path / "two.jsonl")
    assert [line["column"] for line in two] == [line["column"] for line in one] and len(one) > 12
    for mine, theirs in zip(one, two, strict=True):
        numbers = [
            [line["value"], line["sd"] or 0, *(line["per_clip"] or ())] for line in (mine, theirs)
        ]
        assert np.allclose(*numbers, rtol=1e-12, atol=1e-12), mine["column"]
        assert mine | {"value": 0, "sd": 0, "per_clip": 0} == theirs | {
            "value": 0,
            "sd": 0,
            "per_clip": 0,
        }


class Broken(Evaluator):
    """An evaluator that gives no number."""

    paper, version = "none", 1

    def scores(self, clips, references):
        return [Score("broken", float("nan"), "broken")]


def test_a_score_that_is_no_number_is_an_error_and_leaves_no_line(tmp_path):
    with pytest.raises(ValueError, match="broken of the clips is not finite"):
        evaluate(write(tmp_path / "a"), {}, [f"{__file__}:Broken"])
    assert not (tmp_path / "a" / "metrics.jsonl").exists()


def floats(path: Path) -> None:
    np.save(path / "clips.npy", np.load(path / "clips.npy").astype(np.float32) / 255)


def zero_to_one(path: Path) -> None:
    (path / "row.json").unlink()  # which says that the harness decoded them
    np.save(path / "clips.npy", (np.load(path / "clips.npy") > 127).astype(np.uint8))


def last_channel(path: Path) -> None:
    np.save(path / "clips.npy", np.load(path / "clips.npy").transpose(0, 1, 3, 4, 2))


def one_clip(path: Path) -> None:
    np.save(path / "clips.npy", np.load(path / "clips.npy")[:1])
    (path / "manifest.jsonl").write_text('{"index": 0, "prompt": "a", "seed": 0}\n')


def one_frame(path: Path) -> None:
    np.save(path / "clips.npy", np.load(path / "clips.npy")[:, :1])


def cut_manifest(path: Path) -> None:
    (path / "manifest.jsonl").write_text('{"index": 0, "prompt": "a", "seed": 0}\n')


def no_prompts(path: Path) -> None:
    (path / "manifest.jsonl").write_text(
        "".join(f'{{"index": {i}, "seed": 0}}\n' for i in range(12))
    )


def emptied(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()


def torn_array(path: Path) -> None:
    (path / "clips.npy").write_bytes((path / "clips.npy").read_bytes()[:1000])


def unreadable_video(path: Path) -> None:
    pytest.importorskip("av")
    emptied(path)
    (path / "a.mp4").write_bytes(b"no video")


def unreadable_gif(path: Path) -> None:
    emptied(path)
    (path / "a.gif").write_bytes(b"no gif")


def missing_file(path: Path) -> None:
    emptied(path)
    manifest(path, ["none.npy"], ["a"])


def unlike_sizes(path: Path) -> None:
    emptied(path)
    np.save(path / "a.npy", np.zeros((8, 3, 32, 32), np.uint8))
    np.save(path / "b.npy", np.zeros((8, 3, 16, 16), np.uint8))


def dark_files(path: Path) -> None:
    emptied(path)
    for name in "ab":
        np.save(path / f"{name}.npy", np.zeros((8, 3, 32, 32), np.uint8))


def torn_manifest(path: Path) -> None:
    (path / "manifest.jsonl").write_text((path / "manifest.jsonl").read_text()[:-20])


def foreign_manifest(line: str):
    def spoil(path: Path) -> None:
        emptied(path)
        np.save(path / "a.npy", np.zeros((8, 3, 32, 32), np.uint8))
        (path / "manifest.jsonl").write_text(f'{{"file": "a.npy", "prompt": "a"}}\n{line}\n')

    return spoil


def unnamed_file(path: Path) -> None:
    emptied(path)
    for name in "ab":
        np.save(path / f"{name}.npy", np.full((8, 3, 32, 32), 9, np.uint8))
    manifest(path, ["a.npy"], ["a"])


def latin(path: Path) -> None:
    (path / "manifest.jsonl").write_bytes(
        '{"index": 0, "prompt": "caf\xe9", "seed": 0}\n'.encode("latin-1")
    )


def torn_facts(path: Path) -> None:
    (path / "facts.npz").write_bytes(b"PK\x03\x04 torn")


def many_in_one(path: Path) -> None:
    (path / "clips.npy").rename(path / "videos.npy")
    (path / "manifest.jsonl").unlink()


def faster(*rates: float):
    def spoil(path: Path) -> None:
        lines = [json.loads(line) for line in (path / "manifest.jsonl").read_text().splitlines()]
        lines = [line | {"fps": rates[i % len(rates)]} for i, line in enumerate(lines)]
        (path / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    return spoil


def no_pictures(path: Path) -> None:
    np.save(path / "clips.npy", np.load(path / "clips.npy")[..., :2, :2])


def few_frames(path: Path) -> None:
    np.save(path / "clips.npy", np.load(path / "clips.npy")[:, :5])


def scalar(path: Path) -> None:
    np.save(path / "clips.npy", np.uint8(3))


def rate_in_words(path: Path) -> None:
    (path / "row.json").write_text('{"fps": "fast"}')


def no_row(path: Path) -> None:
    (path / "row.json").write_text("[1]")


def other_axes(path: Path) -> None:
    emptied(path)
    np.save(path / "a.npy", np.zeros((8, 32, 32, 3), np.uint8) + 9)


def damaged_video(path: Path) -> None:
    """Its file is whole, its pictures are not."""
    emptied(path)
    noise = np.random.default_rng(0).integers(0, 256, (8, 3, 64, 64), np.uint8)
    save_clip(path / "a.mp4", noise)
    whole = bytearray((path / "a.mp4").read_bytes())
    at = whole.index(b"mdat") + 20_000
    whole[at : at + 600] = b"\xff" * 600
    (path / "a.mp4").write_bytes(whole)


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (floats, "clips are float32; they must be uint8 in 0..255"),
        (zero_to_one, "0..255, not 0..1"),
        (last_channel, r"must be \(N, T, 3, H, W\); found \(12, 8, 32, 32, 3\)"),
        (one_clip, "too few clips to score: 1;"),
        (one_frame, "clips have 1 frame; at least 2"),
        (cut_manifest, "lists 1 clips, clips.npy holds 12"),
        (no_prompts, "line 1: the line has no 'prompt'"),
        (emptied, "no clips in"),
        (torn_array, "clips.npy cannot be read"),
        (unreadable_video, "a.mp4 cannot be read"),
        (unreadable_gif, "a.gif cannot be read"),
        (missing_file, "no file .*none.npy"),
        (unlike_sizes, "all clips of a folder must have one shape"),
        (dark_files, "0..255, not 0..1"),
        (torn_manifest, "manifest.jsonl, line 12: .*Invalid JSON"),
        (
            foreign_manifest("a.npy,a red circle"),
            "manifest.jsonl, line 2: 'a.npy,a red circle': Invalid JSON",
        ),
        (foreign_manifest('["a.npy", "a"]'), "line 2: .*should be an object"),
        (foreign_manifest('{"file": 3, "prompt": "a"}'), "line 2: 'file': .*string"),
        (foreign_manifest('{"file": "a.npy", "prompt": null}'), "line 2: 'prompt': .*string"),
        (
            foreign_manifest('{"file": "a.npy", "prompt": "a", "fps": 0}'),
            "line 2: 'fps': .*greater than 0",
        ),
        (
            foreign_manifest('{"file": "./a.npy", "prompt": "a"}'),
            "manifest.jsonl names a.npy 2 times",
        ),
        (unnamed_file, r"manifest.jsonl does not name b.npy \(1 such files\)"),
        (latin, "manifest.jsonl is not UTF-8"),
        (torn_facts, "facts.npz cannot be read"),
        (
            many_in_one,
            r"\(12, 8, 3, 32, 32\); a clip is \(T, 3, H, W\), and several clips in one file are named clips.npy",
        ),
        (faster(16.0), "reference plays at 8 frames per second, the clips at 16"),
        (
            faster(16.0, 8.0),
            "gives 8 and 16 frames per second; all clips of a folder must have one rate",
        ),
        (no_pictures, "frames are 2x2; at least 4x4"),
        (few_frames, "the teacher reference has 8 frames of 32x32, the clips have 5 frames"),
        (scalar, r"clips.npy is \(\); clips.npy must be \(N, T, 3, H, W\)"),
        (rate_in_words, "row.json: fps: Input should be a valid number"),
        (no_row, "row.json is not a JSON object"),
        (other_axes, r"\(8, 32, 32, 3\); a clip is \(T, 3, H, W\); this looks like \(T, H, W, 3\)"),
        (
            foreign_manifest('{"file": "a.npy", "prompt": "a", "FPS": 24}'),
            "line 2: 'FPS' is written 'fps'",
        ),
        (damaged_video, "a.mp4 cannot be read: its frame [0-9]+ is damaged"),
    ],
)
def test_bad_clips_end_in_one_line_and_no_number(tmp_path, capsys, spoil, reason):
    folder, reference = write(tmp_path / "a"), write(tmp_path / "b", first=100)
    spoil(folder)
    with pytest.raises(SystemExit) as stopped:
        main([str(folder), "--reference", str(reference), "--evaluators", "fvd"])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    import re

    assert re.search(reason, said), said
    assert not (folder / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--evaluators", "fvdd"], "no evaluator called 'fvdd' (did you mean 'fvd'?)"),
        (["--evaluators", "fvd"], "fvd needs a reference (--reference FOLDER)"),
        (
            ["--reference", "teachers={b}"],
            "no kind 'teachers'; known: teacher, teacher_other, data, data_other",
        ),
        (["--reference", "{b}/none", "--evaluators", "fvd"], "no folder"),
        (
            ["--set", "motion.rafts=1", "--evaluators", "motion"],
            "motion has no setting 'rafts'; it has: raft",
        ),
        (["--set", "fvd.resamples=many", "--evaluators", "fvd"], "fvd.resamples = 'many'"),
        (["--evaluators", ","], "--evaluators names none; known: attributes,"),
        (["--reference", "{b}", "--reference", "teacher={b}"], "--reference gives teacher twice"),
        (["--set", "fvd.resamples={{", "--evaluators", "fvd"], "'{' is not a YAML value"),
        (
            ["--set", "fvd.resamples=1", "--evaluators", "fvd"],
            "fvd.resamples = 1: Input should be greater than or equal to 2",
        ),
        (
            ["--set", "motion.raft={b}/clips.npy", "--evaluators", "motion"],
            "clips.npy holds no weights",
        ),
        (
            ["--set", "clip_score.model=ViT-B-32:{b}/clips.npy", "--evaluators", "clip_score"],
            "no CLIP at",
        ),
        (
            [
                "--set",
                "fvd.extractor=random-r2p1:/none",
                "--reference",
                "{b}",
                "--evaluators",
                "fvd",
            ],
            "has no weights to read",
        ),
        (["--set", "resamples=4"], "--set takes EVALUATOR.FIELD=VALUE"),
        (
            ["--set", "fvd.extractor=i3d-k400-logits-400:/none.pt", "--evaluators", "fvd"],
            "no weights at /none.pt",
        ),
        (
            ["--set", "clip_score.model=ViT-B-32", "--evaluators", "clip_score"],
            "weights are missing",
        ),
        (
            ["--set", "clip_score.model=ViT-B-32:none", "--evaluators", "clip_score"],
            "'none' is not a known tag or valid file path",
        ),
        (["--set", "motion.raft=/none.pth", "--evaluators", "motion"], "no weights at /none.pth"),
        # whichever comes first: nothing is scored before the last is known to be right
        (["--evaluators", "motion,clip_scoree"], "no evaluator called 'clip_scoree'"),
        (["--set", "fvd.paper=3"], "fvd has no setting 'paper'"),
        (
            ["--evaluators", "clip_score,motion", "--reference", "{b}/large"],
            "the teacher reference has 8 frames of 64x64",
        ),
        (["--reference", "{b}/no=ne"], "b/no=ne"),
        (["--evaluators", "motion", "--out", "{b}/clips.npy/m.jsonl"], "cannot write"),
        (
            ["--set", "clip_score.model=ViT-B-32:{b}/empty.pt", "--evaluators", "clip_score"],
            "no CLIP at",
        ),
        (
            [
                "--set",
                "fvd.extractor={b}/own.py:wrong",
                "--evaluators",
                "fvd",
                "--reference",
                "{b}",
            ],
            "wrong fails on these clips: Zero",
        ),
    ],
)
def test_bad_commands_end_in_one_line_and_no_number(tmp_path, capsys, arguments, reason):
    folder, reference = write(tmp_path / "a"), write(tmp_path / "b", first=100)
    write(reference / "large", frames=controls.rendered(12, 100)[0].repeat(2, 3).repeat(2, 4))
    (reference / "empty.pt").touch()
    (reference / "own.py").write_text(OWN)
    with pytest.raises(SystemExit) as stopped:
        main([str(folder), *(a.format(b=reference) for a in arguments)])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and reason in said and said.count("\n") == 1, said
    assert read_jsonl(folder / "metrics.jsonl") == []


OWN = """
from distill_bench.evaluate.extractors import Extractor

def wrong():
    return Extractor("wrong", 1, "0" * 64, 2, lambda frames: 1 / 0, "none")

def mean():
    return Extractor("mean", 1, "0" * 64, 2, lambda frames: 1.0 * frames.flatten(1).float()[:,
    1000:1002], "none")
"""


def test_clips_that_an_encoder_was_trained_on_are_refused(tmp_path):
    from distill_bench.pretrain.fit_encoders import TRAIN_KEYS

    trained = write(tmp_path / "b", first=TRAIN_KEYS)
    for name, clips, references in (
        ("fvd", write(tmp_path / "a"), {"teacher": trained}),
        ("clip_score", trained, {}),
    ):
        with pytest.raises(ValueError, match="was trained on 12 of these clips"):
            evaluate(clips, references, [name])


def test_what_is_no_file_of_scores_is_not_written_over(tmp_path):
    folder = write(tmp_path / "a")
    for text in ("two lines\nof prose\n", "one line", "[1]\n", '{"metric": "motion"}\n{"torn\n'):
        (tmp_path / "notes").write_text(text)
        with pytest.raises(
            ValueError, match="notes, line . is not a score and would be overwritten"
        ):
            evaluate(folder, {}, ["motion"], out=tmp_path / "notes")
        assert (tmp_path / "notes").read_text() == text


def test_scores_may_go_into_a_new_folder(tmp_path):
    lines = evaluate(
        write(tmp_path / "a"), {}, ["motion"], out=tmp_path / "new" / "folder" / "metrics.jsonl"
    )
    assert lines and read_jsonl(tmp_path / "new" / "folder" / "metrics.jsonl") == lines


def test_one_protocol_by_name_with_other_references_is_refused(tmp_path):
    folder, one, other = (
        write(tmp_path / "a"),
        write(tmp_path / "b", first=100),
        write(tmp_path / "c", first=200),
    )
    evaluate(folder, {"teacher": one}, ["motion"], protocol="p1")
    with pytest.raises(
        ValueError, match="of protocol p1, these clips are of p1; they differ in references.teacher"
    ):
        evaluate(folder, {"teacher": other}, ["fvd"], protocol="p1")


def test_features_are_kept_by_all_that_makes_them_and_damaged_ones_are_made_again(tmp_path):
    frames, prompts = controls.rendered(12, 0)
    some = Clips(frames, prompts, list(range(12)), cache=tmp_path / "cache")
    first, constant, later = (tmp_path / f"{name}.py" for name in ("first", "constant", "later"))
    for path, factor in ((first, "1.0"), (constant, "0.0"), (later, "2.0")):
        path.write_text(OWN.replace("1.0", factor))
    with pytest.raises(ValueError, match="constant features"):
        load_extractor(f"{constant}:mean")(some)
    assert not list((tmp_path / "cache").glob("*")), "what is refused is not kept"
    features = load_extractor(f"{first}:mean")(some)
    assert not load_extractor(f"{later}:mean")(some).equal(features), (
        "the same name and weights, other code"
    )
    for path in (tmp_path / "cache").glob("*"):
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    assert load_extractor(f"{first}:mean")(some).equal(features)


def test_a_gif_takes_its_rate_from_the_files_that_do_not_round(tmp_path):
    frames, prompts = controls.rendered(2, 0)
    names = ["a.gif", "b.mp4"]
    for name, clip in zip(names, frames, strict=True):
        save_clip(tmp_path / name, clip)
    manifest(tmp_path, names, prompts)
    assert load_clips(tmp_path).fps == 8


@pytest.mark.parametrize("brightest", [0, 1])
def test_black_clips_of_a_dead_student_are_scored(tmp_path, brightest):
    black = np.zeros((12, 8, 3, 32, 32), np.uint8)
    black[0, :, :, 0, 0] = brightest
    lines = evaluate(
        write(tmp_path / "a", frames=black), {"teacher": write(tmp_path / "b", first=100)}
    )
    values = {line["column"]: line["value"] for line in lines}
    assert (
        values["motion_ratio"] == 0
        and values["copies"] == pytest.approx(11 / 12)
        and values["fvd"] > 1
    )


def test_a_manifest_written_by_an_editor_of_windows_is_read(tmp_path):
    folder = write(tmp_path / "a")
    text = (folder / "manifest.jsonl").read_text()
    (folder / "manifest.jsonl").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert load_clips(folder).prompts == controls.rendered(12, 0)[1]


def test_clips_without_a_manifest_have_no_captions(tmp_path):
    for i, clip in enumerate(controls.rendered(3, 0)[0]):
        np.save(tmp_path / f"{i}.npy", clip)
    some = load_clips(tmp_path)
    assert isinstance(some, Clips) and some.prompts == ["", "", ""] and some.fps == 8
    lines = evaluate(tmp_path, {})
    assert "motion" in {line["metric"] for line in lines} and "clip_score" not in {
        line["metric"] for line in lines
    }


@pytest.mark.parametrize(
    "milliseconds, tick, counts",
    [
        ([40, 40, 50, 40], 10, [1, 1, 1, 1]),  # 24 a second in a gif: never a hundred
        ([20, 30, 20, 30], 10, [1, 1, 1, 1]),
        ([41, 42, 42], 1, [1, 1, 1]),  # and in a webp
        ([120, 250, 120, 380], 10, [1, 2, 1, 3]),  # equal frames stored as one
        ([250, 375], 1, [2, 3]),  # none of them alone
        ([125] * 8, 1, [1] * 8),
    ],
)
def test_rounded_times_are_frames_of_one_rate(milliseconds, tick, counts):
    assert frame_counts(milliseconds, tick) == counts


def test_times_of_no_one_rate_are_refused():
    for milliseconds, reason in (([0, 40], "no duration"), ([100, 137, 171, 113], "no one rate")):
        with pytest.raises(ValueError, match=reason):
            frame_counts(milliseconds, 1)


def test_a_gif_of_jittered_times_keeps_its_frames(tmp_path):
    from PIL import Image

    clip = controls.rendered(3, 4)[0][2]
    first, *rest = [Image.fromarray(image) for image in clip.transpose(0, 2, 3, 1)]
    first.save(
        tmp_path / "a.gif",
        save_all=True,
        append_images=rest,
        duration=[40, 40, 50, 40, 40, 50, 40, 40],
        loop=0,
    )
    read = read_clip(tmp_path / "a.gif")
    assert len(read.frames) == 8 and read.fps == pytest.approx(24, rel=0.03)
