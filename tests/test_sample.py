"""The rows beside every run: which there are, what they share, and that the wrong ones are wrong as they say."""

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from distill_bench.eval.motion import Motion

from distill_bench import controls, shapes
from distill_bench.config import load_sweep, resolve, run_id
from distill_bench.media import load_clips
from distill_bench.sample import main, protocol, protocol_hash, references

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The reference rows of mini-wan at 4 clips and 2 steps of the teacher, and their config."""
    config = resolve({"method": "dmd2", "nfe": 2, "protocol": {"clips": 4, "teacher_steps": 2}})
    return config, references(config, tmp_path_factory.mktemp("store"))


def test_every_row_has_the_prompts_and_its_seeds(rows):
    config, folders = rows
    assert set(folders) == {
        "data", "data_other", "teacher", "teacher_other", "teacher_few", "untrained", "frozen", "shuffled", "noise",
    }  # fmt: skip
    clips = {kind: load_clips(folder) for kind, folder in folders.items()}
    for kind, some in clips.items():
        assert some.frames.shape == (4, 8, 3, 32, 32), kind
        assert some.prompts == clips["teacher"].prompts
        start = 1004 if kind.endswith("_other") else 1000
        assert some.seeds == list(range(start, start + 4)), kind
    assert len({some.digest for some in clips.values()}) == 8, "at 2 steps the few-step teacher is the teacher"
    assert clips["teacher"].prompts[:2] == clips["teacher"].prompts[2:], "two clips a prompt"


def test_the_controls_are_the_teachers_clips_still_and_out_of_order(rows):
    teacher, frozen, shuffled = (load_clips(rows[1][kind]).frames for kind in ("teacher", "frozen", "shuffled"))
    assert (np.diff(frozen.astype(int), axis=1) == 0).all() and (frozen[:, 0] == teacher[:, 4]).all()
    for mine, theirs in zip(shuffled, teacher, strict=True):
        assert not (mine == theirs).all()
        assert sorted(f.tobytes() for f in mine) == sorted(f.tobytes() for f in theirs)


def test_data_is_what_the_captions_say(rows):
    for kind in ("data", "data_other"):
        some = load_clips(rows[1][kind])
        assert shapes.read(some.frames) == [shapes.parse(prompt) for prompt in some.prompts]


def test_the_protocol_lies_beside_the_rows_and_whatever_counts_changes_its_hash(rows):
    config, folders = rows
    root = folders["teacher"].parent
    assert json.loads((root / "protocol.json").read_text()) == protocol(config) and root.name == protocol_hash(config)
    for key, value in (("clips", 5), ("seed", 7), ("teacher_steps", 3), ("teacher_guidance", 2.0), ("fps", 16.0)):
        changed = resolve({"method": "dmd2", "nfe": 2, "protocol": {"clips": 4, "teacher_steps": 2, key: value}})
        assert protocol_hash(changed) != root.name, key
    assert protocol_hash(resolve({"method": "dmd", "nfe": 4, "protocol": {"clips": 4, "teacher_steps": 2}})) == root.name


def test_the_rate_of_the_protocol_is_on_the_rows_and_scales_the_motion_of_a_second(rows, tmp_path):
    config = resolve({"method": "dmd2", "nfe": 2, "protocol": {"clips": 2, "teacher_steps": 1, "fps": 16.0}})
    fast = load_clips(references(config, tmp_path)["teacher"])
    assert load_clips(rows[1]["teacher"]).fps == 8 and fast.fps == 16
    slow = dataclasses.replace(fast, fps=8.0)
    at = [{score.column: score.value for score in Motion().scores(each, {})} for each in (slow, fast)]
    assert at[1]["motion_diagonals"] == pytest.approx(2 * at[0]["motion_diagonals"]) and at[1]["motion"] == at[0]["motion"]


def test_ids_and_protocols_of_committed_results_hold():
    """A field that came later counts only away from its default: it makes no run anew, and takes no score out of its table."""
    lines = list(csv.DictReader((ROOT / "results" / "quick" / "runs.csv").open()))
    configs = load_sweep(ROOT / "sweeps" / "quick.yaml").expand()
    assert {run_id(config) for config in configs} == {line["run_id"] for line in lines if line["status"] != "reference"}
    assert {protocol_hash(config) for config in configs} == {line["protocol"] for line in lines}
    later = resolve({"method": "dmd2", "protocol": {"fps": 16.0}})
    assert run_id(later) != run_id(resolve({"method": "dmd2"})) == run_id(resolve({"method": "dmd2", "protocol": {"fps": 8.0}}))


def test_corruptions_of_clips_do_what_they_say():
    frames, _ = controls.rendered(3, 0)
    assert (controls.backwards(controls.backwards(frames)) == frames).all()
    assert controls.noisy(frames, 1).std() > frames.std() and (controls.noisy(frames, 1) == controls.noisy(frames, 1)).all()
    assert np.abs(np.diff(controls.blurred(frames).astype(int))).mean() < np.abs(np.diff(frames.astype(int))).mean()
    half, _ = controls.rendered(72, 0, pace=0.5)
    whole, _ = controls.rendered(72, 0)
    assert shapes.centroid_speed(half).mean() == pytest.approx(shapes.centroid_speed(whole).mean() / 2, rel=0.02)
    without, said = controls.rendered(72, 0, without="red")
    assert "red" not in {a.colour for a in shapes.read(without)} and any(" red " in prompt for prompt in said)


def test_what_cannot_be_sampled_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path)])
    assert ended.value.code == 2 and "it has no run.yaml" in (said := capsys.readouterr().err) and said.count("\n") == 1
