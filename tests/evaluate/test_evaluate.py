"""Scoring folders: nothing is computed twice, protocols never mix, ranks change no score."""

import dataclasses
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from clip_folders import save_clip, write_manifest, write_sampled

from distill_bench.domain import controls
from distill_bench.evaluate.__main__ import main
from distill_bench.evaluate.extractors import load_extractor
from distill_bench.evaluate.score import conditions, evaluate
from distill_bench.evaluator import Clips, Evaluator, Score
from distill_bench.pretrain.fit_encoders import TRAIN_KEYS, LabelledClips
from distill_bench.registry import find_evaluator
from distill_bench.sample.load_folder import load_clips
from distill_bench.store.files import read_jsonl
from distill_bench.store.nested import describe_differences

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_sampled(tmp_path / "a")


@pytest.fixture
def reference(tmp_path) -> Path:
    return write_sampled(tmp_path / "b", first=100)


@pytest.mark.parametrize("suffix", [".mp4", ".webp", ".gif"])
def test_a_folder_of_files_is_scored_by_the_command(tmp_path, reference, suffix, capsys):
    frames, prompts = controls.rendered(12, 0)
    folder = tmp_path / "files"
    folder.mkdir()
    names = [f"{i:02d}{suffix}" for i in range(12)]
    for name, clip in zip(names, frames, strict=True):
        save_clip(folder / name, clip)
    write_manifest(folder, names, prompts)
    (folder / "notes.txt").write_text("no clip")
    arguments = ["--reference", str(reference), "--evaluators", "fvd,motion,clip_score"]
    assert main([str(folder), *arguments]) == 0
    lines = {line["column"]: line for line in read_jsonl(folder / "metrics.jsonl")}
    assert {"fvd", "kvd", "motion", "motion_ratio", "clip_score", "clip_video"} <= set(lines)
    assert lines["motion_ratio"]["value"] == pytest.approx(1, abs=0.25)
    assert lines["clip_score"]["value"] > 80 and lines["fvd"]["n"] == 12
    printed = capsys.readouterr().out
    assert "FD[indomain-r2p1-cls], to the teacher's clips" in printed
    assert "warning: fvd: rank-deficient" in printed
    assert f"{folder}: 1 entry not scored: notes.txt" in printed
    assert (folder / ".features").is_dir() and (reference / ".features").is_dir()


def test_clips_without_captions_get_every_score_that_needs_none(tmp_path):
    for i, clip in enumerate(controls.rendered(3, 0)[0]):
        np.save(tmp_path / f"{i}.npy", clip)
    scored = {line["metric"] for line in evaluate(tmp_path, {})}
    assert "motion" in scored and "clip_score" not in scored


def test_only_a_changed_evaluator_is_computed_again(folder, reference, monkeypatch):
    first = evaluate(folder, {"teacher": reference}, ["motion", "fidelity"])
    stamp = (folder / "metrics.jsonl").stat().st_mtime_ns
    assert evaluate(folder, {"teacher": reference}, ["motion", "fidelity"]) == first
    assert (folder / "metrics.jsonl").stat().st_mtime_ns == stamp
    monkeypatch.setattr(find_evaluator("fidelity"), "version", 99)
    again = evaluate(folder, {"teacher": reference}, ["motion", "fidelity"])
    assert {line["version"] for line in again if line["metric"] == "fidelity"} == {99}
    assert len(again) == len(first)


def test_a_line_records_the_score_and_how_it_was_made(folder, reference):
    (line, *_) = evaluate(folder, {"teacher": reference}, ["fvd"], "abcd1234")
    score_fields = {field.name for field in dataclasses.fields(Score)}
    assert score_fields | {"n", "metric", "version"} < set(line)
    assert line["protocol"] == "abcd1234" and line["settings"]["resamples"] == 100
    assert line["conditions"]["clips"] == 12
    assert line["conditions"]["references"].keys() == {"teacher"}
    assert line["warnings"] and line["note"] is None


def test_scores_of_another_protocol_are_refused_and_the_difference_is_named(
    tmp_path, folder, reference
):
    evaluate(folder, {"teacher": reference}, ["motion"])
    other = write_sampled(tmp_path / "c", first=200)
    with pytest.raises(ValueError, match=r"they differ in references.teacher \w{8} and \w{8}"):
        evaluate(folder, {"teacher": other}, ["fidelity"])
    with pytest.raises(ValueError, match="no evaluator called 'fidelty'"):  # is said first
        evaluate(folder, {"teacher": other}, ["fidelty"])
    lines = evaluate(folder, {"teacher": other}, ["motion", "fidelity"])
    assert {line["metric"] for line in lines} == {"motion", "fidelity"}


def test_one_protocol_name_for_two_references_is_refused(tmp_path, folder, reference):
    evaluate(folder, {"teacher": reference}, ["motion"], protocol="p1")
    other = write_sampled(tmp_path / "c", first=200)
    with pytest.raises(
        ValueError,
        match="of protocol p1, these clips are of p1; they differ in references.teacher",
    ):
        evaluate(folder, {"teacher": other}, ["fvd"], protocol="p1")


def test_conditions_differ_in_the_frame_rate(folder):
    clips = load_clips(folder)
    faster = dataclasses.replace(clips, fps=16)
    assert describe_differences(conditions(clips, {}), conditions(clips, {})) == ""
    assert describe_differences(conditions(clips, {}), conditions(faster, {})) == "fps 8.0 and 16"


def test_cached_features_give_the_same_scores(tmp_path, folder, reference):
    fresh = evaluate(folder, {"teacher": reference}, out=tmp_path / "1.jsonl")
    cached = evaluate(folder, {"teacher": reference}, out=tmp_path / "2.jsonl")
    assert fresh == cached


SCORED_AND_THREADS = """
import sys
from pathlib import Path
from distill_bench.evaluate.__main__ import main
code = main(sys.argv[1:])
print(*(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")), sep=", ")
raise SystemExit(code)
"""


@pytest.mark.slow
@pytest.mark.timeout(150)  # takes seconds, but a rank that waits for the other must be killed
def test_two_ranks_give_the_scores_of_one(tmp_path):
    """Processes as torchrun starts them, with one batch each; 40 clips are two batches."""
    folder = write_sampled(tmp_path / "a", 40)
    reference = write_sampled(tmp_path / "b", 40, 100)
    names = ["fvd", "motion", "diversity"]
    command = [sys.executable, "-c", SCORED_AND_THREADS, str(folder)]
    command += ["--reference", str(reference), "--evaluators", ",".join(names)]
    command += ["--out", str(tmp_path / "two.jsonl")]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = os.environ | launch | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": rank, "LOCAL_RANK": rank},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    try:
        printed = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], printed
    assert "motion_ratio" in printed[0] and "fvd" not in printed[1], "only rank 0 prints scores"
    assert all("python" in text and "gloo" not in text for text in printed), "its threads are left"
    for clips in (folder, reference):
        shutil.rmtree(clips / ".features")  # one process must compute them itself
    one = evaluate(folder, {"teacher": reference}, names, out=tmp_path / "one.jsonl")
    two = read_jsonl(tmp_path / "two.jsonl")
    assert [line["column"] for line in two] == [line["column"] for line in one] and len(one) > 12
    for line, other_line in zip(one, two, strict=True):
        numbers = [
            [scored.pop("value"), scored.pop("sd") or 0, *(scored.pop("per_clip") or ())]
            for scored in (line, other_line)
        ]
        assert np.allclose(*numbers, rtol=1e-12, atol=1e-12), line["column"]
        assert line == other_line


class NotANumber(Evaluator):
    """An evaluator whose score is nan."""

    paper, version = "none", 1

    def scores(self, clips, references):
        return [Score("broken", float("nan"), "broken")]


def test_a_score_that_is_not_finite_is_an_error_and_leaves_no_line(folder):
    with pytest.raises(ValueError, match="broken of the clips is not finite"):
        evaluate(folder, {}, [f"{__file__}:NotANumber"])
    assert not (folder / "metrics.jsonl").exists()


def test_training_clips_of_a_shipped_network_are_refused(tmp_path, folder):
    train = LabelledClips.rendered(12, TRAIN_KEYS)
    trained_on = write_sampled(tmp_path / "b", frames=train.frames)
    with pytest.raises(ValueError, match="was trained on 12 of these clips"):
        evaluate(folder, {"teacher": trained_on}, ["fvd"])
    with pytest.raises(ValueError, match="was trained on 12 of these clips"):
        evaluate(trained_on, {}, ["clip_score"])


@pytest.mark.parametrize(
    "text", ["two lines\nof prose\n", "one line", "[1]\n", '{"metric": "motion"}\n{"torn\n']
)
def test_a_file_that_holds_no_scores_is_not_overwritten(tmp_path, folder, text):
    (tmp_path / "notes").write_text(text)
    with pytest.raises(ValueError, match="notes, line . is not a score and would be overwritten"):
        evaluate(folder, {}, ["motion"], out=tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == text


def test_scores_can_be_written_into_a_new_folder(tmp_path, folder):
    out = tmp_path / "new" / "folder" / "metrics.jsonl"
    lines = evaluate(folder, {}, ["motion"], out=out)
    assert lines and read_jsonl(out) == lines


EXTRACTOR = """
from distill_bench.evaluate.extractors import Extractor

def make():
    net = lambda frames: FACTOR * frames.flatten(1).float()[:, 1000:1002]
    return Extractor("own", 1, "0" * 64, 2, net, "none")
"""


def test_features_are_cached_by_the_code_of_their_extractor_and_damaged_ones_replaced(tmp_path):
    frames, prompts = controls.rendered(12, 0)
    clips = Clips(frames, prompts, list(range(12)), cache=tmp_path / "cache")

    def extractor(name: str, factor: str):
        (tmp_path / f"{name}.py").write_text(EXTRACTOR.replace("FACTOR", factor))
        return load_extractor(f"{tmp_path / name}.py:make")

    with pytest.raises(ValueError, match="constant features"):
        extractor("constant", "0.0")(clips)
    assert not list((tmp_path / "cache").glob("*")), "refused features were cached"
    first = extractor("first", "1.0")
    features = first(clips)
    assert not extractor("other", "2.0")(clips).equal(features), "same name, other code"
    for path in (tmp_path / "cache").glob("*"):
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    assert first(clips).equal(features)


@pytest.mark.parametrize("brightest", [0, 1])
def test_black_clips_of_a_collapsed_student_are_scored(tmp_path, reference, brightest):
    black = np.zeros((12, 8, 3, 32, 32), np.uint8)
    black[0, :, :, 0, 0] = brightest
    lines = evaluate(write_sampled(tmp_path / "a", frames=black), {"teacher": reference})
    values = {line["column"]: line["value"] for line in lines}
    assert values["motion_ratio"] == 0 and values["fvd"] > 1
    assert values["copies"] == pytest.approx(11 / 12)
