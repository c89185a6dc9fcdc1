"""A student's clips as VBench reads them."""

import json
from pathlib import Path

import numpy as np
import pytest

from distill_bench.cli import main
from distill_bench.config.resolve import load_run, resolve
from distill_bench.config.yaml_files import dump_yaml
from distill_bench.sample import vbench_files
from distill_bench.sample.clip_files import read_video
from distill_bench.sample.sampler import Sampler
from distill_bench.train import checkpoint
from distill_bench.train.loop import train

PROMPTS = ["a red circle moving left", "a blue square moving up quickly"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "dmd2-s0-tiny"
    folder.mkdir()
    config = resolve(
        {"method": "dmd2", "student_updates": 1, "batch_size": 2, "nfe": 2, "trackers": []}
        | {"evaluations": 1, "signals_every": None, "checkpoint_every": 1}
    )
    (folder / "run.yaml").write_text(dump_yaml(config.model_dump(mode="json")))
    train(folder)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A list as VBench's vbench_full_info.json, with one prompt twice."""
    path = tmp_path / "info.json"
    entries = [{"prompt_en": p, "dimension": ["scene"]} for p in [*PROMPTS, PROMPTS[0]]]
    path.write_text(json.dumps(entries))
    return path


@pytest.mark.slow
def test_clips_have_vbenchs_names_and_the_students_frames(run_dir, prompts, tmp_path, capsys):
    folder = tmp_path / "vbench"
    command = ["sample", str(run_dir), "--vbench", str(folder), "--prompts", str(prompts)]
    assert main([*command, "--clips-per-prompt", "3"]) == 0
    assert f"6 clips in {folder}" in capsys.readouterr().out
    names = {f"{prompt}-{i}.mp4" for prompt in PROMPTS for i in range(3)}
    assert {path.name for path in folder.iterdir()} == names

    config = load_run(run_dir)
    sampler = Sampler(config, prompts=[p for p in PROMPTS for _ in range(3)])
    student = sampler.pipeline.student()
    checkpoint.load_student(checkpoint.students(run_dir)[1], student, config.adapter)
    expected = sampler.student(student).frames(0, 6)
    for index, prompt in enumerate(PROMPTS):
        for number in range(3):
            clip = read_video(folder / f"{prompt}-{number}.mp4")
            assert clip.fps == config.protocol.fps
            difference = clip.frames.astype(int) - expected[3 * index + number]
            assert np.abs(difference).mean() < 12  # lossy, with colours at half resolution
    # seeds differ: no two clips of a prompt are alike
    assert len({expected[i].tobytes() for i in range(6)}) == 6


@pytest.mark.slow
def test_clips_that_exist_are_kept_and_missing_ones_are_made(run_dir, prompts, tmp_path):
    folder = tmp_path / "vbench"
    first, *others = vbench_files.sample_for_vbench(run_dir, folder, prompts, 1)
    before = read_video(first).frames.astype(int)
    first.unlink()
    stamps = [path.stat().st_mtime_ns for path in others]
    vbench_files.sample_for_vbench(run_dir, folder, prompts, 1)
    again = read_video(first).frames
    assert np.abs(again - before).mean() < 1  # sampled anew: rounding, then a lossy codec
    assert np.abs(read_video(others[0]).frames - before).mean() > 10
    assert [path.stat().st_mtime_ns for path in others] == stamps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--vbench out", "--vbench and --prompts belong together"),
        ("--prompts info.json", "--vbench and --prompts belong together"),
        ("--vbench out --prompts none.txt", "none.txt"),
        ("--vbench out --prompts long.txt", "is too long to name a file (255 bytes)"),
        ("--vbench out --prompts slash.txt", "cannot name a file: it has /"),
        ("--vbench out --prompts info.json --clips-per-prompt 0", "at least 1 is needed"),
        ("--vbench info.json --prompts info.json", "info.json"),
    ],
)
@pytest.mark.slow
def test_a_wrong_command_is_an_error_of_one_line_and_writes_nothing(
    options, message, run_dir, prompts, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("long.txt").write_text("a" * 260)
    Path("slash.txt").write_text("a and/or b")
    with pytest.raises(SystemExit) as stopped:
        main(["sample", str(run_dir), *options.split()])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error and error.count("\n") == 1
    assert not Path("out").exists()
