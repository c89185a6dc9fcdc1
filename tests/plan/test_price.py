"""Device-hours of a sweep by stage: from similar finished runs, or from FLOPs and a stated MFU."""

import json

import pytest
from torch.utils.flop_counter import FlopCounterMode

from distill_bench.config.cluster import ClusterConfig
from distill_bench.config.identity import cost_key, run_id
from distill_bench.config.protocol import protocol, protocol_hash
from distill_bench.config.resolve import resolve
from distill_bench.config.sweep_file import load_sweep
from distill_bench.plan import command, price, sampling
from distill_bench.plan.cost import step_flops
from distill_bench.plan.memory import predicted
from distill_bench.sample.sampler import Sampler
from distill_bench.sweep.__main__ import main as sweep_main
from distill_bench.teachers.folder import teacher_folder

RUN = {"method": "dmd2", "student_updates": 10, "batch_size": 8, "nfe": 2, "trackers": []}
SWEEP = """
question: What does it cost?
base: {method: dmd2, student_updates: 10, trackers: [], protocol: {clips: 8, teacher_steps: 4}}
grid: {fake_score_updates: [1, 5]}
seeds: 3
cluster: {nodes: 2, gpus: 4}
"""


def finished(store, config, name, train, evaluate, sample=None):
    """Write the result of a run like `config`."""
    folder = store / name
    folder.mkdir(parents=True)
    result = {
        "run_id": name,
        "status": "done",
        "student_updates": 5,
        "train_seconds": train,
        "evaluate_seconds": evaluate,
        "cost_key": cost_key(config),
    }
    (folder / "result.json").write_text(
        json.dumps(result if sample is None else result | {"sample_seconds": sample})
    )
    (folder / "run.yaml").write_text(json.dumps(config.model_dump(mode="json")))


def test_a_run_costs_the_median_of_similar_runs_by_stage(tmp_path):
    config = resolve(RUN)
    for number, train in enumerate((50.0, 10.0, 20.0)):
        finished(tmp_path, config, f"dmd2-s{number}-abc", train, 7.0 + number, 3.0)
    finished(tmp_path, resolve(RUN | {"batch_size": 16}), "other", 1000.0, 1000.0, 1.0)
    seconds, similar = price.measured_seconds(config, price.history(tmp_path), 10)
    assert similar == 3
    assert seconds == {"train": 40.0, "evaluate": 5.0, "sample": 3.0}
    assert price.measured_seconds(config, {}, 10) == ({}, 0)


def test_clips_cost_by_their_number_and_scores_only_what_the_same_evaluators_cost(tmp_path):
    def drawing(clips, evaluators):
        return resolve(RUN | {"protocol": {"clips": clips, "evaluators": evaluators}})

    finished(tmp_path, drawing(8, ["motion"]), "dmd2-s0-abc", 10.0, 5.0, 3.0)
    runs = price.history(tmp_path)
    seconds, similar = price.measured_seconds(drawing(32, ["motion"]), runs, 5)
    assert (similar, seconds) == (1, {"train": 10.0, "sample": 12.0, "evaluate": 8.0})
    seconds, _ = price.measured_seconds(drawing(32, ["motion", "fvd"]), runs, 5)
    assert seconds == {"train": 10.0, "sample": 12.0}
    finished(tmp_path / "b", drawing(8, ["motion"]), "dmd2-s0-abc", 10.0, 5.0, 3.0)
    (tmp_path / "b" / "dmd2-s0-abc" / "run.yaml").unlink()
    runs = price.history(tmp_path / "b")
    assert price.measured_seconds(drawing(8, ["motion"]), runs, 5) == ({"train": 10.0}, 1)


def test_results_without_seconds_of_sampling_keep_them_in_the_evaluation(tmp_path):
    config = resolve(RUN)
    finished(tmp_path, config, "old", 10.0, 7.0)
    seconds, _ = price.measured_seconds(config, price.history(tmp_path), 5)
    assert seconds == {"train": 10.0, "evaluate": 7.0}


def test_references_cost_what_like_rows_cost_per_clip_and_nothing_if_they_exist(tmp_path):
    config = resolve(RUN | {"protocol": {"clips": 8}})

    def made(like, name, seconds):
        root = tmp_path / "references" / name
        root.mkdir(parents=True)
        (root / "protocol.json").write_text(json.dumps(protocol(like)))
        (root / "ready-nfe2.json").write_text(json.dumps({"seconds": seconds}))

    assert price.reference_seconds(config, tmp_path) is None
    made(resolve(RUN | {"protocol": {"clips": 8, "teacher_steps": 99}}), "slower", 500.0)
    assert price.reference_seconds(config, tmp_path) is None
    made(resolve(RUN | {"protocol": {"clips": 16, "seed": 3}}), "alike", 10.0)
    assert price.reference_seconds(config, tmp_path) == 5.0
    made(config, protocol_hash(config), 4.0)
    assert price.reference_seconds(config, tmp_path) == 0.0


def test_further_ways_and_rows_cost_by_their_forwards_and_decoding(tmp_path, capsys):
    """Per set of clips; a run has four. The networks' clips also cost their decoding."""
    (tmp_path / "s.yaml").write_text(
        SWEEP.replace("grid: {fake_score_updates: [1, 5]}", "grid: {fake_score_updates: [1]}")
        + "sampling: [{of: students, nfe: [8]}, {of: teacher, nfe: [8]}]\n"
        + f"rows: [{{name: Other, network: {teacher_folder('mini-wan')}, nfe: 1}}]\n"
    )
    arguments = [str(tmp_path / "s.yaml"), "--hours", "--store", str(tmp_path / "runs")]

    def cells() -> list[list[str]]:
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
        return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]

    protocol_ = {"clips": 8, "teacher_steps": 4}
    config = resolve(RUN | {"nfe": 4, "fake_score_updates": 1, "protocol": protocol_})
    clip = sampling.clip_flops(config)
    own, eight = (nfe * clip.student + clip.decoding for nfe in (4, 8))
    guided, one = 16 * clip.teacher + clip.decoding, clip.teacher + clip.decoding
    device = price.Device(1e-3, 0.5)
    assert command.main([*arguments, "--tflops", "1e-3", "--mfu", "0.5"]) == 0
    run, teacher, other, *_ = cells()
    hours = device.seconds(8) / 3600
    # the cells of run and rows: method, K, runs, train, sample, evaluate, sum, source
    assert float(run[4]) == pytest.approx(3 * hours * (4 * own + eight), rel=0.01)
    assert teacher[:3] == ["teacher, ODE, 8 steps", "", ""]
    assert float(teacher[4]) == pytest.approx(hours * guided, rel=0.01)
    assert float(other[4]) == pytest.approx(hours * one, rel=0.01)
    assert other[0] == "Other" and other[5] == "-"

    finished(tmp_path / "runs", config, "dmd2-s9-abc", 10.0, 7200.0, 3600.0)
    assert command.main(arguments) == 0
    run, teacher, other, _, total = cells()
    set_ = 8 * 0.25  # GPU-hours of sampling, or of scoring, one set of clips
    assert float(run[4]) == pytest.approx(3 * set_ * (4 + eight / own), rel=0.01)
    assert float(run[5]) == pytest.approx(3 * set_ * 5, rel=0.01)
    assert float(teacher[4]) == pytest.approx(set_ * guided / own, rel=0.01)
    assert float(other[4]) == pytest.approx(set_ * one / own, rel=0.01)
    assert float(teacher[5]) == float(other[5]) == pytest.approx(set_)
    assert float(total[5]) == pytest.approx(17 * set_, rel=0.01)


def test_a_preview_prices_what_is_left_of_further_ways_and_rows(tmp_path, capsys):
    """In closed form a clip costs its forwards: here 2 of a run, 4 of its further way."""
    (tmp_path / "s.yaml").write_text(
        "question: What is left?\n"
        "base: {method: dmd2, teacher: gaussian, student_updates: 8, nfe: 2, trackers: [],\n"
        "  protocol: {clips: 8, teacher_steps: 4}}\n"
        "sampling: [{of: students, nfe: [4]}, {of: teacher, nfe: [3]}]\n"
        "grid: {nfe: [2]}\nseeds: 2\ncluster: {cpus: 1, tasks: 1}\n"
    )
    sweep = load_sweep(tmp_path / "s.yaml")
    first, _ = sweep.expand()
    finished(tmp_path / "runs", first, run_id(first), 50.0, 28800.0, 14400.0)
    folders = [f"--store={tmp_path / 'runs'}", f"--out={tmp_path / 'results'}"]
    assert sweep_main([str(tmp_path / "s.yaml"), "--cluster=local", "--dry-run", *folders]) == 0
    out = " ".join(capsys.readouterr().out.split())
    # per set of clips 1 hour of sampling and 1 of scoring: the other run takes 4 + 2 and 4 + 1,
    # the further way of the finished one 2 and 1, the guided teacher's row 3 and 1
    assert "cost of 3 of them" in out
    assert "sample 11, evaluate 7" in out
    assert "unknown" not in out


def test_gpu_hours_count_the_gpus_of_a_run_and_core_hours_its_cores():
    assert price.devices(ClusterConfig(nodes=2, gpus=4)) == (8, "GPU-hours")
    assert price.devices(ClusterConfig(gpus=1, runs_per_job=4)) == (0.25, "GPU-hours")
    assert price.devices(ClusterConfig(cpus=3)) == (3, "core-hours")


@pytest.mark.slow
def test_flops_by_stage_are_those_of_the_networks_and_the_autoencoder():
    """Against the prediction of `--memory` for training, and counted passes for the clips."""
    config = resolve(RUN | {"protocol": {"clips": 6, "teacher_steps": 3}, "evaluations": 2})
    flops = price.stage_flops(config)
    training = sum(step_flops(predicted(config).flops, config))
    assert flops["train"] == pytest.approx(10 * training, rel=1e-9)

    sampler = Sampler(config, prompts=["a red circle moving left slowly"])
    student = sampler.placed(sampler.pipeline.student())
    source, teacher = sampler.student(student), sampler.teacher(3, [0])
    with FlopCounterMode(display=False) as counter:
        source.frames(0, 1)
    clip = counter.get_total_flops()
    assert flops["sample"] == pytest.approx(2 * 6 * clip, rel=0.01)
    with FlopCounterMode(display=False) as counter:
        teacher.frames(0, 1)
    few = sampler.teacher(2, [0])
    with FlopCounterMode(display=False) as counter_few:
        few.frames(0, 1)
    rows = 2 * counter.get_total_flops() + counter_few.get_total_flops() + clip
    assert flops["references"] == pytest.approx(6 * rows, rel=0.01)


@pytest.mark.slow
def test_flops_are_linear_in_the_blocks(monkeypatch):
    few = sampling.clip_flops(resolve(RUN))
    monkeypatch.setattr(sampling, "FEW_BLOCKS", (2, 4))
    assert sampling.clip_flops(resolve(RUN)) == few


def test_the_price_of_a_sweep_is_the_sum_of_its_cells_and_says_its_source(tmp_path, capsys):
    (tmp_path / "s.yaml").write_text(SWEEP)
    arguments = [str(tmp_path / "s.yaml"), "--hours", "--store", str(tmp_path / "runs")]
    assert command.main(arguments) == 2
    assert "no run in" in (error := capsys.readouterr().err) and "--tflops 989 --mfu 0.4" in error
    assert error.count("\n") == 1

    protocol_ = {"clips": 8, "teacher_steps": 4}
    sweep_run = {"method": "dmd2", "student_updates": 10, "trackers": [], "protocol": protocol_}
    config = resolve(sweep_run | {"fake_score_updates": 1})
    # 8 GPUs for 2 * 180 + 90 s: one GPU-hour per run
    finished(tmp_path / "runs", config, "dmd2-s0-abc", 180.0, 90.0, 45.0)
    assert command.main(arguments) == 0
    out = capsys.readouterr().out
    assert "GPU-hours of s" in out
    rows = [line.strip("│ ").split("│") for line in out.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert cells[0] == ["dmd2", "1", "3", "2.4", "0.3", "0.3", "3", "1 similar runs"]
    assert cells[1] == ["dmd2", "5", "3", "-", "-", "-", "-", "unknown"]
    assert cells[-1][-2:] == ["3", "without what is unknown"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--tflops 989", "--tflops and --mfu belong together"),
        ("--tflops 989 --mfu 40", "the share in (0, 1]"),
        ("--tflops 0 --mfu 0.4", "the peak must be positive"),
    ],
)
def test_a_wrong_speed_is_an_error_of_one_line(options, message, tmp_path, capsys):
    (tmp_path / "s.yaml").write_text(SWEEP)
    assert command.main([str(tmp_path / "s.yaml"), "--hours", *options.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_flops_price_what_no_similar_run_does(tmp_path, capsys):
    (tmp_path / "s.yaml").write_text(SWEEP)
    arguments = [str(tmp_path / "s.yaml"), "--hours", "--store", str(tmp_path / "runs")]
    assert command.main([*arguments, "--tflops", "1", "--mfu", "0.5"]) == 0
    once = capsys.readouterr().out
    assert "FLOPs at 50% of 1 TFLOP/s" in once
    config = resolve(
        {"method": "dmd2", "student_updates": 10, "trackers": [], "fake_score_updates": 1}
        | {"protocol": {"clips": 8, "teacher_steps": 4}}
    )
    hours = 3 * price.Device(1, 0.5).seconds(price.stage_flops(config)["train"]) / 3600
    assert f" {hours:.3g} " in once
