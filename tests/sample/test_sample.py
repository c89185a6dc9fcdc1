"""Sampling runs and reference rows: shared prompts and seeds, protocols, ranks and resuming."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from distill_bench.config.identity import run_id
from distill_bench.config.protocol import protocol, protocol_hash, student_key
from distill_bench.config.resolve import resolve
from distill_bench.config.rows.sampling import teacher_sampling
from distill_bench.config.sweep_file import load_sweep
from distill_bench.config.yaml_files import dump_yaml
from distill_bench.domain import controls, shapes
from distill_bench.eval.motion import Motion
from distill_bench.networks import pipeline as pipelines
from distill_bench.networks.denoiser import Denoiser
from distill_bench.networks.ledger import Ledger
from distill_bench.networks.pipeline import DiffusersPipeline
from distill_bench.noise import student_sigmas
from distill_bench.rollout import rollout
from distill_bench.sample import write_folder
from distill_bench.sample.__main__ import main
from distill_bench.sample.load_folder import load_clips
from distill_bench.sample.reference_kinds import ROLES
from distill_bench.sample.references import references
from distill_bench.sample.run import sample
from distill_bench.sample.sampler import Sampler
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
        "slowed",
        "stilled",
        "equalised",
        "jittered",
        "shuffled",
        "noise",
    }
    assert set(folders) == set(ROLES), "every kind has a role in the results"
    rows_of_clips = {kind: load_clips(folder) for kind, folder in folders.items()}
    prompts = rows_of_clips["teacher"].prompts
    assert prompts[:2] == prompts[2:], "two clips per prompt"
    for kind, clips in rows_of_clips.items():
        assert clips.frames.shape == (4, 8, 3, 32, 32), kind
        assert clips.prompts == prompts, kind
        start = 1004 if kind.endswith("_other") else 1000
        assert clips.seeds == list(range(start, start + 4)), kind
    digests = {clips.digest for clips in rows_of_clips.values()}
    assert len(digests) == 12, "at 2 steps, teacher_few equals teacher"


@pytest.mark.slow
def test_memory_settings_change_no_clip_and_the_precision_is_part_of_the_protocol(rows, tmp_path):
    """Sequential guidance may change rounding, because its batches have half the size."""
    config, folders = rows
    offloaded = config.model_copy(update={"teacher_offload": True})
    sequential = config.model_copy(update={"guidance_forwards": "sequential"})
    low_protocol = config.protocol.model_copy(update={"precision": "bfloat16"})
    low = config.model_copy(update={"protocol": low_protocol})
    assert protocol_hash(offloaded) == protocol_hash(sequential) == protocol_hash(config)
    assert protocol_hash(low) != protocol_hash(config)
    for kind, folder in references(offloaded, tmp_path / "offloaded").items():
        assert load_clips(folder).digest == load_clips(folders[kind]).digest, kind
    sequential_folders = references(sequential, tmp_path / "sequential")
    low_folders = references(low, tmp_path / "low")
    for kind in ("teacher", "teacher_other", "untrained"):
        expected = load_clips(folders[kind]).frames.astype(int)
        assert np.abs(load_clips(sequential_folders[kind]).frames - expected).max() <= 1, kind
        difference = np.abs(load_clips(low_folders[kind]).frames - expected)
        assert difference.max() > 0, kind
        assert difference.mean() < 8, kind


def test_controls_are_the_teachers_clips_changed(rows):
    teacher, frozen, slowed, stilled, equalised, jittered, shuffled = (
        load_clips(rows[1][kind]).frames
        for kind in (
            "teacher",
            "frozen",
            "slowed",
            "stilled",
            "equalised",
            "jittered",
            "shuffled",
        )
    )
    assert (stilled == frozen).all((1, 2, 3, 4)).sum() == 1, "a quarter"
    assert (stilled == teacher).all((1, 2, 3, 4)).sum() == 3
    first = 0.25 * teacher[:, 1] + 0.75 * teacher[:, 2]  # frame 3.5 - 3.5 / 2
    assert np.abs(slowed[:, 0] - first).max() <= 0.5
    assert (equalised == controls.equalised(teacher, load_clips(rows[1]["teacher"]).prompts)).all()
    assert (jittered == controls.jittered(teacher, rows[0].protocol.seed)).all()
    assert (np.diff(frozen.astype(int), axis=1) == 0).all()
    assert (frozen[:, 0] == teacher[:, 4]).all()
    for clip, original in zip(shuffled, teacher, strict=True):
        assert not (clip == original).all()
        assert sorted(f.tobytes() for f in clip) == sorted(f.tobytes() for f in original)


def test_data_rows_show_what_their_captions_say(rows):
    for kind in ("data", "data_other"):
        clips = load_clips(rows[1][kind])
        for shown, prompt in zip(shapes.read(clips.frames), clips.prompts, strict=True):
            named = shapes.parse(prompt).named()
            assert {key: getattr(shown, key) for key in named} == named


def test_the_protocol_is_stored_beside_the_rows_and_every_part_changes_its_hash(rows):
    """Method and number of student steps are not part of the protocol."""
    config, folders = rows
    root = folders["teacher"].parent
    assert json.loads((root / "protocol.json").read_text()) == protocol(config)
    assert root.name == protocol_hash(config)
    common = {"clips": 4, "teacher_steps": 2}
    other_student = resolve({"method": "dmd", "nfe": 4, "protocol": common})
    assert protocol_hash(other_student) == root.name
    for change in (
        {"clips": 5},
        {"seed": 7},
        {"teacher_steps": 3},
        {"teacher_guidance": 2.0},
        {"teacher_shift": 1.0},
        {"teacher_stepping": "renoise"},
        {"fps": 16.0},
    ):
        changed = resolve({"method": "dmd2", "nfe": 2, "protocol": common | change})
        assert protocol_hash(changed) != root.name, change


def test_students_of_unlike_shift_share_a_protocol_that_states_the_teachers():
    """The clips of the untrained student have the student's shift, so their key names it."""
    stated, followed = (
        [resolve({"method": "dmd2", "shift": s, "protocol": p}) for s in (1.0, 2.0, 5.0)]
        for p in ({"teacher_shift": 0.5}, {})
    )
    assert len({protocol_hash(config) for config in stated}) == 1
    assert len({protocol_hash(config) for config in followed}) == 3
    assert len({student_key(config) for config in stated}) == 3
    assert {teacher_sampling(config, 1).shift for config in stated} == {0.5}
    assert [teacher_sampling(config, 1).shift for config in followed] == [1.0, 2.0, 5.0]


def test_the_teachers_clips_have_the_stepping_of_the_protocol(tmp_path):
    """All of its rows: the reference, the floor, few steps, and `sampling` that names no other."""
    stated = {"clips": 2, "teacher_steps": 3, "teacher_guidance": 1.0, "teacher_stepping": 0.5}
    run = resolve({"method": "dmd2", "nfe": 2, "protocol": stated})
    ode = resolve({"method": "dmd2", "nfe": 2, "protocol": stated | {"teacher_stepping": "ode"}})
    folders, others = references(run, tmp_path), references(ode, tmp_path)
    for kind, steps in {"teacher": 3, "teacher_other": 3, "teacher_few": 2}.items():
        clips = load_clips(folders[kind])
        sampler = Sampler(run, tmp_path)
        denoiser = Denoiser(sampler.teacher_net, "teacher", Ledger(1))
        noises = sampler._noises(clips.seeds, steps)
        text = sampler.texts.rows([0, 1])
        latents = rollout(denoiser, noises, student_sigmas(steps, run.shift), text, 0.5)
        assert np.array_equal(clips.frames, sampler.pipeline.decode(latents).numpy()), kind
        assert not np.array_equal(clips.frames, load_clips(others[kind]).frames), kind
    assert teacher_sampling(run, 2).stepping == 0.5


def test_the_teachers_clips_follow_its_own_shift(tmp_path):
    common = {"clips": 2, "teacher_steps": 2}

    def clips(shift, **keys):
        run = resolve({"method": "dmd2", "shift": shift, "protocol": common | keys})
        return load_clips(references(run, tmp_path)["teacher"]).frames

    own = clips(0.5)
    assert np.array_equal(clips(5.0, teacher_shift=0.5), own)
    assert not np.array_equal(clips(5.0), own)


def test_rows_carry_the_protocols_rate_which_scales_motion_per_second(rows, tmp_path):
    """`motion_diagonals` is per second, `motion` per frame."""
    fast_protocol = {"clips": 2, "teacher_steps": 1, "fps": 16.0}
    config = resolve({"method": "dmd2", "nfe": 2, "protocol": fast_protocol})
    fast = load_clips(references(config, tmp_path)["teacher"])
    assert load_clips(rows[1]["teacher"]).fps == 8
    assert fast.fps == 16
    slow = dataclasses.replace(fast, fps=8.0)
    slow_scores, fast_scores = (
        {score.column: score.value for score in Motion().scores(clips, {})}
        for clips in (slow, fast)
    )
    doubled = pytest.approx(2 * slow_scores["motion_diagonals"])
    assert fast_scores["motion_diagonals"] == doubled
    assert fast_scores["motion"] == slow_scores["motion"]


@pytest.mark.parametrize("name", ["quick", "tracking_lag"])
def test_ids_and_protocols_of_committed_results_are_unchanged(name):
    """A field added later enters ids and protocols only if it differs from its default."""
    lines = list(csv.DictReader((ROOT / "results" / name / "runs.csv").open()))
    configs = load_sweep(ROOT / "sweeps" / f"{name}.yaml").expand()
    assert {run_id(config) for config in configs} == {
        line["run_id"] for line in lines if line["status"] != "reference"
    }
    assert {protocol_hash(config) for config in configs} == {line["protocol"] for line in lines}


def test_the_default_rate_is_not_in_the_id():
    plain, default_fps, other_fps = (
        run_id(resolve({"method": "dmd2", "protocol": protocol_keys}))
        for protocol_keys in ({}, {"fps": 8.0}, {"fps": 16.0})
    )
    assert plain == default_fps != other_fps


def test_corruptions_change_what_they_name():
    frames, _ = controls.rendered(3, 0)
    assert (controls.backwards(controls.backwards(frames)) == frames).all()
    noisy = controls.noisy(frames, 1)
    assert noisy.std() > frames.std()
    assert (noisy == controls.noisy(frames, 1)).all()
    edges, blurred_edges = (
        np.abs(np.diff(clips.astype(int))).mean() for clips in (frames, controls.blurred(frames))
    )
    assert blurred_edges < edges


def test_rendered_controls_change_speed_and_colours_but_not_captions():
    full_speed, captions = controls.rendered(72, 0)
    half_speed, slow_captions = controls.rendered(72, 0, pace=0.5)
    expected = shapes.centroid_speed(full_speed).mean() / 2
    assert shapes.centroid_speed(half_speed).mean() == pytest.approx(expected, rel=0.02)
    without_red, red_captions = controls.rendered(72, 0, without="red")
    assert "red" not in {attributes.colour for attributes in shapes.read(without_red)}
    assert any(" red " in caption for caption in red_captions)
    assert captions == slow_captions == red_captions


def test_a_folder_without_a_run_ends_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path)])
    message = capsys.readouterr().err
    assert ended.value.code == 2
    assert "it has no run.yaml" in message
    assert message.count("\n") == 1


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
    """Sampling that was interrupted in its third batch makes only this batch when it resumes."""
    monkeypatch.setattr(pipelines, "CLIPS_PER_BATCH", 2)
    (folder,) = sample(trained)
    uninterrupted = (folder / "clips.npy").read_bytes()
    shutil.rmtree(folder)
    decode, batch_sizes = DiffusersPipeline.decode, []

    def count(self, latents):
        batch_sizes.append(len(latents))
        return decode(self, latents)

    def count_until_third(self, latents):
        if len(batch_sizes) == 2:
            raise KeyboardInterrupt
        return count(self, latents)

    monkeypatch.setattr(DiffusersPipeline, "decode", count_until_third)
    with pytest.raises(KeyboardInterrupt):
        sample(trained)
    assert not folder.exists()
    assert batch_sizes == [2, 2]
    monkeypatch.setattr(DiffusersPipeline, "decode", count)
    assert sample(trained) == [folder]
    assert batch_sizes == [2, 2, 1]
    assert (folder / "clips.npy").read_bytes() == uninterrupted
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]
    assert sorted(path.name for path in (folder / "videos").iterdir()) == [
        f"{i:06d}.mp4" for i in range(5)
    ]


def test_a_folder_that_lost_its_clips_is_made_again(trained):
    """As in a store that went to another machine without its clips; their scores went along."""
    (folder,) = sample(trained)
    clips = (folder / "clips.npy").read_bytes()
    (folder / "clips.npy").unlink()
    (folder / "metrics.jsonl").write_text("{}\n")
    assert sample(trained) == [folder]
    assert (folder / "clips.npy").read_bytes() == clips
    assert not (folder / "metrics.jsonl").exists(), "scored again"


def test_ranks_share_the_batches_and_rank_0_assembles_the_folder(trained, monkeypatch):
    """Ranks as torchrun starts them; rank 0 does not repeat the batch of rank 1."""
    monkeypatch.setattr(pipelines, "CLIPS_PER_BATCH", 2)
    (folder,) = sample(trained)
    by_one_process = (folder / "clips.npy").read_bytes()
    shutil.rmtree(folder)
    decode, batch_sizes = DiffusersPipeline.decode, []

    def count(self, latents):
        batch_sizes.append(len(latents))
        return decode(self, latents)

    monkeypatch.setattr(DiffusersPipeline, "decode", count)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, expected in (("1", [2]), ("0", [2, 2, 1])):
        monkeypatch.setenv("RANK", rank)
        sample(trained)
        assert batch_sizes == expected
        assert folder.exists() == (rank == "0")
    assert (folder / "clips.npy").read_bytes() == by_one_process


def test_rank_0_makes_batches_that_other_ranks_do_not(trained, monkeypatch):
    monkeypatch.setattr(pipelines, "CLIPS_PER_BATCH", 2)
    monkeypatch.setattr(write_folder, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setenv("WORLD_SIZE", "3")
    (folder,) = sample(trained)
    assert len(load_clips(folder).frames) == 5
