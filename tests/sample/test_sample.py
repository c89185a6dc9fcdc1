"""Sampling runs and reference rows: shared prompts and seeds, protocols, ranks and resuming."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from distill_bench.config.identity import run_id
from distill_bench.config.protocol import protocol, protocol_hash
from distill_bench.config.resolve import resolve
from distill_bench.config.sweep_file import load_sweep
from distill_bench.config.yaml_files import dump_yaml
from distill_bench.domain import controls, shapes
from distill_bench.eval.motion import Motion
from distill_bench.networks import pipeline as pipelines
from distill_bench.networks.pipeline import DiffusersPipeline
from distill_bench.sample import write_folder
from distill_bench.sample.__main__ import main
from distill_bench.sample.load_folder import load_clips
from distill_bench.sample.reference_kinds import ROLES
from distill_bench.sample.references import references
from distill_bench.sample.run import sample
from distill_bench.train.loop import train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Config and reference rows of mini-wan: 4 clips, 2 teacher steps."""
    config = resolve({"method": "dmd2", "nfe": 2, "protocol": {"clips": 4, "teacher_steps": 2}})
    return config, references(config, tmp_path_factory.mktemp("store"))


def test_every_row_has_the_protocols_prompts_and_its_own_seeds(rows):
    _, folders = rows
    assert set(folders) == {
        "data",
        "data_other",
        "teacher",
        "teacher_other",
        "teacher_few",
        "untrained",
        "frozen",
        "shuffled",
        "noise",
    }
    assert set(folders) == set(ROLES), "every kind has a role in the results"
    clips = {kind: load_clips(folder) for kind, folder in folders.items()}
    for kind, some in clips.items():
        assert some.frames.shape == (4, 8, 3, 32, 32), kind
        assert some.prompts == clips["teacher"].prompts
        start = 1004 if kind.endswith("_other") else 1000
        assert some.seeds == list(range(start, start + 4)), kind
    assert len({some.digest for some in clips.values()}) == 8, (
        "at 2 steps the few-step teacher is the teacher"
    )
    assert clips["teacher"].prompts[:2] == clips["teacher"].prompts[2:], "two clips per prompt"


@pytest.mark.slow
def test_memory_settings_change_no_clip_and_the_precision_is_part_of_the_protocol(rows, tmp_path):
    config, folders = rows
    held = config.model_copy(update={"teacher_offload": True})
    sequential = config.model_copy(update={"guidance_forwards": "sequential"})
    low = config.model_copy(
        update={"protocol": config.protocol.model_copy(update={"precision": "bfloat16"})}
    )
    assert (
        protocol_hash(held)
        == protocol_hash(sequential)
        == protocol_hash(config)
        != protocol_hash(low)
    )
    for kind, folder in references(held, tmp_path / "held").items():
        assert load_clips(folder).digest == load_clips(folders[kind]).digest, kind
    made = references(sequential, tmp_path / "sequential")
    for kind in (
        "teacher",
        "teacher_other",
        "untrained",
    ):  # some processors round otherwise for half as many samples
        assert (
            np.abs(
                load_clips(made[kind]).frames.astype(int) - load_clips(folders[kind]).frames
            ).max()
            <= 1
        ), kind
    made = references(low, tmp_path / "low")
    for kind in ("teacher", "teacher_other", "untrained"):
        apart = np.abs(load_clips(made[kind]).frames.astype(int) - load_clips(folders[kind]).frames)
        assert apart.max() > 0 and apart.mean() < 8, kind


def test_controls_are_the_teachers_clips_frozen_and_shuffled(rows):
    teacher, frozen, shuffled = (
        load_clips(rows[1][kind]).frames for kind in ("teacher", "frozen", "shuffled")
    )
    assert (np.diff(frozen.astype(int), axis=1) == 0).all() and (
        frozen[:, 0] == teacher[:, 4]
    ).all()
    for mine, theirs in zip(shuffled, teacher, strict=True):
        assert not (mine == theirs).all()
        assert sorted(f.tobytes() for f in mine) == sorted(f.tobytes() for f in theirs)


def test_data_rows_show_what_their_captions_say(rows):
    for kind in ("data", "data_other"):
        some = load_clips(rows[1][kind])
        assert shapes.read(some.frames) == [shapes.parse(prompt) for prompt in some.prompts]


def test_the_protocol_is_stored_beside_the_rows_and_every_part_changes_its_hash(rows):
    config, folders = rows
    root = folders["teacher"].parent
    assert json.loads((root / "protocol.json").read_text()) == protocol(
        config
    ) and root.name == protocol_hash(config)
    for key, value in (
        ("clips", 5),
        ("seed", 7),
        ("teacher_steps", 3),
        ("teacher_guidance", 2.0),
        ("fps", 16.0),
    ):
        changed = resolve(
            {"method": "dmd2", "nfe": 2, "protocol": {"clips": 4, "teacher_steps": 2, key: value}}
        )
        assert protocol_hash(changed) != root.name, key
    assert (
        protocol_hash(
            resolve({"method": "dmd", "nfe": 4, "protocol": {"clips": 4, "teacher_steps": 2}})
        )
        == root.name
    )


def test_rows_carry_the_protocols_rate_which_scales_motion_per_second(rows, tmp_path):
    config = resolve(
        {"method": "dmd2", "nfe": 2, "protocol": {"clips": 2, "teacher_steps": 1, "fps": 16.0}}
    )
    fast = load_clips(references(config, tmp_path)["teacher"])
    assert load_clips(rows[1]["teacher"]).fps == 8 and fast.fps == 16
    slow = dataclasses.replace(fast, fps=8.0)
    at = [
        {score.column: score.value for score in Motion().scores(each, {})} for each in (slow, fast)
    ]
    assert (
        at[1]["motion_diagonals"] == pytest.approx(2 * at[0]["motion_diagonals"])
        and at[1]["motion"] == at[0]["motion"]
    )


def test_ids_and_protocols_of_committed_results_are_unchanged():
    """A field added later enters ids and protocols only if it differs from its default."""
    lines = list(csv.DictReader((ROOT / "results" / "quick" / "runs.csv").open()))
    configs = load_sweep(ROOT / "sweeps" / "quick.yaml").expand()
    assert {run_id(config) for config in configs} == {
        line["run_id"] for line in lines if line["status"] != "reference"
    }
    assert {protocol_hash(config) for config in configs} == {line["protocol"] for line in lines}
    later = resolve({"method": "dmd2", "protocol": {"fps": 16.0}})
    assert (
        run_id(later)
        != run_id(resolve({"method": "dmd2"}))
        == run_id(resolve({"method": "dmd2", "protocol": {"fps": 8.0}}))
    )


def test_corruptions_change_what_they_name():
    frames, _ = controls.rendered(3, 0)
    assert (controls.backwards(controls.backwards(frames)) == frames).all()
    assert (
        controls.noisy(frames, 1).std() > frames.std()
        and (controls.noisy(frames, 1) == controls.noisy(frames, 1)).all()
    )
    assert (
        np.abs(np.diff(controls.blurred(frames).astype(int))).mean()
        < np.abs(np.diff(frames.astype(int))).mean()
    )
    half, _ = controls.rendered(72, 0, pace=0.5)
    whole, _ = controls.rendered(72, 0)
    assert shapes.centroid_speed(half).mean() == pytest.approx(
        shapes.centroid_speed(whole).mean() / 2, rel=0.02
    )
    without, said = controls.rendered(72, 0, without="red")
    assert "red" not in {a.colour for a in shapes.read(without)} and any(
        " red " in prompt for prompt in said
    )


def test_a_folder_without_a_run_ends_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path)])
    assert (
        ended.value.code == 2
        and "it has no run.yaml" in (said := capsys.readouterr().err)
        and said.count("\n") == 1
    )


@pytest.fixture
def trained(tmp_path, tiny_wan):
    """A run of one update on the tiny pipeline, with 5 clips to sample."""
    config = resolve(
        {
            "method": "dmd2",
            "teacher": str(tiny_wan),
            "frames": 5,
            "height": 16,
            "width": 16,
            "nfe": 2,
            "student_updates": 1,
            "fake_score_updates": 1,
            "batch_size": 2,
            "trackers": [],
            "evaluations": 1,
            "signals_every": None,
            "protocol": {"clips": 5},
        }
    )
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    (run / "run.yaml").write_text(dump_yaml(config.model_dump(mode="json")))
    train(run)
    return run


def test_interrupted_sampling_resumes_batch_by_batch_to_the_same_bytes(trained, monkeypatch):
    """Interrupted in its third batch, it makes only that one when it resumes."""
    monkeypatch.setattr(pipelines, "CLIPS_PER_BATCH", 2)
    (folder,) = sample(trained)
    whole = (folder / "clips.npy").read_bytes()
    shutil.rmtree(folder)
    decode, made = DiffusersPipeline.decode, []

    def dying(self, latents):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(len(latents))
        return decode(self, latents)

    monkeypatch.setattr(DiffusersPipeline, "decode", dying)
    with pytest.raises(KeyboardInterrupt):
        sample(trained)
    assert not folder.exists() and made == [2, 2]
    made.insert(0, None)  # never two again
    assert sample(trained) == [folder] and made == [None, 2, 2, 1]
    assert (folder / "clips.npy").read_bytes() == whole
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]
    assert sorted(path.name for path in (folder / "videos").iterdir()) == [
        f"{i:06d}.mp4" for i in range(5)
    ]


def test_ranks_share_the_batches_and_rank_0_assembles_the_folder(trained, monkeypatch):
    """Ranks as torchrun starts them; rank 0 does not repeat the batch of rank 1."""
    monkeypatch.setattr(pipelines, "CLIPS_PER_BATCH", 2)
    (folder,) = sample(trained)
    whole = (folder / "clips.npy").read_bytes()
    shutil.rmtree(folder)
    decode, made = DiffusersPipeline.decode, []
    monkeypatch.setattr(
        DiffusersPipeline,
        "decode",
        lambda self, latents: made.append(len(latents)) or decode(self, latents),
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, sizes in (("1", [2]), ("0", [2, 2, 1])):
        monkeypatch.setenv("RANK", rank)
        sample(trained)
        assert made == sizes and folder.exists() == (rank == "0")
    assert (folder / "clips.npy").read_bytes() == whole


def test_rank_0_makes_batches_that_other_ranks_do_not(trained, monkeypatch):
    monkeypatch.setattr(pipelines, "CLIPS_PER_BATCH", 2)
    monkeypatch.setattr(write_folder, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setenv("WORLD_SIZE", "3")
    (folder,) = sample(trained)
    assert len(load_clips(folder).frames) == 5
