"""SLURM's refusals and pending reasons in one line, without SLURM; tests/slurm uses a real one."""

import json
import os
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from distill_bench.config.cluster import ClusterConfig, with_profile
from distill_bench.config.errors import ConfigError
from distill_bench.config.sweep_file import load_sweep
from distill_bench.config.validation import validate
from distill_bench.store.files import read_json
from distill_bench.sweep import launch
from distill_bench.sweep.launch import LaunchOptions, run_slurm
from distill_bench.sweep.manifest import open_sweep
from distill_bench.sweep.slurm import submit
from distill_bench.sweep.slurm.queue import Partition, Queue
from distill_bench.sweep.slurm.submit import batch_script, sbatch_errors, sbatch_options, shares
from distill_bench.sweep.status import ManifestEntry, read_statuses

RUN = "dmd2-s0-0"
SBATCH = """#!/bin/sh
# keeps the scripts that it is given; their numbers are the jobs' ids
job=1
while [ -e "$0.$job" ]; do job=$((job + 1)); done
cp "$1" "$0.$job"
echo "Submitted batch job $job"
"""
STAGED = {
    "question": "Where should students start?",
    "base": {"teacher": "gaussian", "student_updates": 4, "nfe": 1},
    "stages": {
        "first": {"method": "sgmd"},
        "second": {"method": "sgmd", "init": "first", "student_updates": 2},
    },
    "grid": {"method": ["dmd2"], "init": [None, "first", "second"]},
    "seeds": 2,
}


def test_the_error_lines_of_sbatch_are_shown_and_not_its_hints():
    unknown = (
        "sbatch: unrecognized option '--foo=bar'\nTry \"sbatch --help\" for more information\n"
    )
    assert sbatch_errors(unknown) == "unrecognized option '--foo=bar'"
    refused = (
        "sbatch: error: Failed to validate job spec, --gpus < -N\n"
        "sbatch: error: Invalid generic resource\n"
    )
    assert sbatch_errors(refused) == (
        "Failed to validate job spec, --gpus < -N; Invalid generic resource"
    )


@pytest.mark.parametrize(
    ("reason", "forever"),
    [
        ("Priority", False),
        ("Resources", False),
        ("BeginTime", False),
        ("PartitionNodeLimit", True),
        ("PartitionConfig", True),
        ("QOSMaxWallDurationPerJobLimit", True),
        ("launch failed requeued held", True),
    ],
)
def test_a_job_that_can_never_start_is_named(reason, forever, tmp_path):
    queue = Queue({"7_0": "PENDING"}, {RUN: ["7_0"]}, {"7_0": tmp_path / "log"}, {"7_0": reason})
    (status,) = read_statuses(tmp_path, {RUN: ManifestEntry("dmd2", 9)}, queue)
    assert status.state == "queued"
    assert status.note == (f"SLURM will not start it: {reason}" if forever else "")


LARGE = Partition("p", 9, 99, 999.0, 8, 1001, None, True, True, True, True)


@pytest.mark.parametrize(
    ("limits", "shortfall"),
    [
        ({}, None),
        ({"max_hours": 2.0}, "24 h is over the partition's 2.0 h"),
        ({"nodes": 1}, "2 nodes are more than the partition's 1"),
        ({"cpus": 16}, "4 x 8 CPUs are more than any node's 16"),
        ({"mem_gb": 32.0}, "64 GB are more than any node's 32"),
        ({"gpus": 2}, "4 GPUs are more than any node's 2"),
        ({"preemption_signal": False}, "preemption sends no signal"),
        ({"requeue": False}, "does not requeue jobs"),
        ({"accounting": False}, "no accounting"),
    ],
)
def test_a_partition_says_what_it_cannot_do(limits, shortfall):
    wanted = ClusterConfig(nodes=2, gpus=4, cpus=8, mem_gb=64, hours=24)
    shortfalls = replace(LARGE, **limits).shortfalls(wanted)
    assert len(shortfalls) == (shortfall is not None)
    assert all(shortfall in text for text in shortfalls)


def test_jobs_at_once_are_shared_between_arrays():
    assert [shares(16, arrays) for arrays in (1, 3, 20)] == [[16], [6, 5, 5], [1] * 20]


def test_the_batch_script_has_the_cluster_block_and_the_user_s_sbatch(tmp_path):
    cluster = ClusterConfig(
        partition="a,b",
        mem_gb=None,
        hours=0.5,
        setup=("module load cuda",),
        sbatch={"mem-per-cpu": 500, "requeue": False, "exclusive": False},
    )
    lines = batch_script(cluster, tmp_path).splitlines()
    assert {
        "#SBATCH --partition=a,b",
        "#SBATCH --time=30",
        "#SBATCH --signal=USR2@120",
        "#SBATCH --mem-per-cpu=500",
        "#SBATCH --no-requeue",
        "module load cuda",
    } <= set(lines)
    assert not any("exclusive" in line or "--mem=" in line for line in lines)
    assert "#SBATCH --requeue" not in lines


def options_of(tmp_path: Path, **cluster) -> list[str]:
    """sbatch options of a job's script, without their hyphens."""
    lines = batch_script(ClusterConfig(**cluster), tmp_path, "my sweep").splitlines()
    return [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]


@pytest.mark.parametrize(
    ("sbatch", "present", "absent"),
    [
        (
            {"gpus-per-node": "a100:2", "cpus-per-task": 16, "job-name": "mine"},
            ["gpus-per-node=a100:2", "cpus-per-task=16", "job-name=mine", "ntasks-per-node=2"],
            [],
        ),
        ({"gpus_per_node": "a100:2"}, ["gpus-per-node=a100:2", "ntasks-per-node=2"], []),
        ({"ntasks-per-node": False}, ["gpus-per-node=4"], ["ntasks-per-node"]),
        ({"p": "other", "-J": "x", "--time": "2:00:00"}, ["partition=other", "time=2:00:00"], []),
        ({"gres": "gpu:a100:2"}, ["gres=gpu:a100:2", "ntasks-per-node=2"], ["gpus-per-node"]),
        ({"gres": "lustre:1"}, ["gres=lustre:1", "gpus-per-node=4"], []),
        ({"gpus": 2}, ["gpus=2", "ntasks-per-node=2"], ["gpus-per-node"]),
        ({"gpus-per-task": 1}, ["gpus-per-task=1", "ntasks-per-node=1"], ["gpus-per-node"]),
        ({"gpus-per-node": False}, ["ntasks-per-node=1"], ["gpus-per-node"]),
        ({"cpus-per-gpu": 8}, ["cpus-per-gpu=8"], ["cpus-per-task"]),
        ({"ntasks-per-gpu": 1}, ["ntasks-per-gpu=1"], ["ntasks-per-node"]),
        ({"ntasks": 2}, ["ntasks=2"], ["ntasks-per-node"]),
        ({"mem-per-gpu": "20G"}, ["mem-per-gpu=20G"], ["mem"]),
        ({"mem": 0}, ["mem=0"], []),
        ({"nodes": 2}, ["nodes=2"], []),
        ({"nodes": False, "time": False}, [], ["nodes", "time"]),
        ({"requeue": False}, ["no-requeue"], ["requeue"]),
        ({"no_requeue": True}, ["no-requeue"], ["requeue"]),
        ({"job-name": False, "signal": False}, [], ["job-name", "signal"]),
        (
            {"open-mode": "truncate", "o": "/x/%j.log"},
            ["open-mode=truncate", "output=/x/%j.log"],
            [],
        ),
        ({"signal": "USR2@300"}, ["signal=USR2@300"], []),
        ({"exclusive": True}, ["exclusive", "job-name='my sweep'"], []),
    ],
)
def test_an_sbatch_option_of_the_user_replaces_ours_in_any_spelling(
    sbatch, present, absent, tmp_path
):
    options = options_of(tmp_path, gpus=4, mem_gb=8, sbatch=sbatch)
    names = [option.partition("=")[0] for option in options]
    assert set(present) <= set(options)
    assert not set(absent) & set(names)
    assert len(names) == len(set(names)), "each option once"


@pytest.mark.parametrize(
    ("sbatch", "numbers"),
    [
        ({"gpus-per-node": "a100:2", "cpus-per-task": 16}, {"gpus": 2, "processes": 2, "cpus": 16}),
        ({"gpus-per-node": "a100"}, {"gpus": 1, "processes": 1}),
        ({"gres": "lustre:1,gpu:v100:2"}, {"gpus": 2, "processes": 2}),
        ({"gpus": "v100:4", "nodes": 2}, {"gpus": 2, "processes": 2, "nodes": 2}),
        ({"ntasks": 5, "nodes": "3"}, {"processes": 2, "nodes": 3}),
        ({"ntasks-per-node": False}, {"gpus": 4, "processes": 1}),
        ({"ntasks-per-gpu": 2}, {"gpus": 4, "processes": 8}),
        ({"gpus-per-task": 1, "ntasks-per-node": 2}, {"gpus": 2, "processes": 2}),
        ({"cpus-per-gpu": 8}, {"cpus": 8}),
        ({"mem-per-gpu": "20G"}, {"mem_gb": 80}),
        ({"mem-per-cpu": 512}, {"mem_gb": 4}),
        ({"mem": "0"}, {"mem_gb": None}),
        ({"time": "1-12"}, {"hours": 36.0}),
        ({"t": 90}, {"hours": 1.5}),
        ({"time": "90:30"}, {"hours": 90.5 / 60}),
        ({"time": "02:30:00"}, {"hours": 2.5}),
        ({"partition": "low", "A": "me", "qos": False}, {"partition": "low", "account": "me"}),
        ({"signal": "USR2@300"}, {"signal_seconds": 300}),
    ],
)
def test_the_numbers_of_a_job_follow_the_user_s_sbatch_options(sbatch, numbers):
    cluster = ClusterConfig(gpus=4, mem_gb=8, sbatch=sbatch)
    assert {key: getattr(cluster, key) for key in numbers} == numbers


@pytest.mark.parametrize(
    ("sbatch", "error"),
    [
        ({"array": "0-3"}, "sbatch.array: the sweep numbers its jobs"),
        ({"parsable": True}, "sbatch.parsable"),
        ({"part": "x"}, "sbatch.part is abbreviated; write partition"),
        ({"gpus-per-node": 1, "gpus_per_node": 2}, "--gpus-per-node is given twice"),
        ({"job-name": None}, "sbatch.job-name = None: expected text, an integer or true"),
        ({"constraint": ["a", "b"]}, "sbatch.constraint = ['a', 'b']"),
        ({"gpus-per-node": True}, "sbatch.gpus-per-node = true: it needs a value"),
        ({"gpus-per-node": "a100:two"}, "expected COUNT or TYPE:COUNT"),
        ({"nodes": "2-4"}, "sbatch.nodes = '2-4': expected an integer above 0"),
        ({"signal": "B:USR1@60"}, "runs save on USR2 only"),
        ({"time": "soon"}, "sbatch.time = 'soon'"),
        ({"mem": "lots"}, "sbatch.mem = 'lots': expected a size"),
        ({"requeue": True, "no-requeue": True}, "exclude each other"),
    ],
)
def test_an_sbatch_option_that_a_sweep_cannot_follow_is_refused_in_one_line(sbatch, error):
    with pytest.raises(ConfigError) as raised:
        validate(ClusterConfig, {"sbatch": sbatch}, "cluster")
    assert error in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_prepare_job_has_one_process_whatever_sbatch_says():
    sbatch = {"nodes": 2, "ntasks-per-node": 2, "gpus": "a100:4", "constraint": "big"}
    cluster = ClusterConfig(sbatch=sbatch).with_one_process()
    options = sbatch_options(cluster, "s")
    assert (options["nodes"], options["ntasks-per-node"]) == (1, 1)
    assert (options["gpus"], options["constraint"]) == ("a100:2", "big")


def test_a_dependency_of_the_user_is_added_to_ours():
    cluster = ClusterConfig(sbatch={"d": "afterok:3"})
    assert sbatch_options(cluster, "s")["dependency"] == "afterok:3"
    assert sbatch_options(cluster, "s", "afterany:7")["dependency"] == "afterany:7,afterok:3"


@pytest.mark.parametrize("name", ["50%j", "%A%a%%", "100%% %t", "a b'c", "$HOME `x`", "ö"])
def test_patterns_and_quotes_in_the_path_of_a_store_are_escaped(name, tmp_path):
    script = batch_script(ClusterConfig(), tmp_path / name).splitlines()
    (output,) = (line for line in script if line.startswith("#SBATCH --output="))
    (pattern,) = shlex.split(output.removeprefix("#SBATCH --output="))
    escaped, _, rest = pattern.partition("/slurm/")
    assert escaped.replace("%%", "%") == str(tmp_path / name)
    assert escaped.count("%") == 2 * name.count("%")
    assert rest == "%A/%j_0_log.out"
    (srun,) = (shlex.split(line) for line in script if line.startswith("srun"))
    # srun replaces %t even if it is escaped, so its path is relative to the folder of the jobs
    assert "--output=%A/%j_%t_log.out" in srun


def test_a_process_without_work_for_its_gpus_is_warned_of():
    (warning,) = LARGE.shortfalls(ClusterConfig(gpus=2, sbatch={"ntasks-per-node": False}))
    assert warning == "a process uses one GPU: 1 of a node's 2 stay idle"
    assert not LARGE.shortfalls(ClusterConfig(gpus=2, runs_per_job=2))


def test_keys_of_a_sweep_replace_the_sbatch_options_of_its_profile(tmp_path, monkeypatch):
    path = tmp_path / "clusters.yaml"
    path.write_text("default: {gpus: 1, sbatch: {gres: 'gpu:a100:2', t: 60, exclude: n7}}")
    monkeypatch.setenv("DISTILL_BENCH_CLUSTERS", str(path))
    assert with_profile({"gpus": 4})["sbatch"] == {"time": 60, "exclude": "n7"}
    assert with_profile({})["sbatch"] == {"gres": "gpu:a100:2", "time": 60, "exclude": "n7"}


@pytest.mark.slow
def test_jobs_of_a_stage_depend_on_the_jobs_of_the_stage_before_it(tmp_path, monkeypatch):
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(SBATCH)
    sbatch.chmod(0o755)
    sbatch.with_name("srun").symlink_to("/bin/true")  # submitit looks for it
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    queue = Queue()
    monkeypatch.setattr(launch, "read_queue", lambda store: queue)
    for module in (launch, submit):
        monkeypatch.setattr(module, "read_partition", lambda name: LARGE)
    (tmp_path / "staged.yaml").write_text(json.dumps(STAGED))
    sweep = open_sweep(load_sweep(tmp_path / "staged.yaml"), tmp_path / "runs", tmp_path / "out")
    run_of: dict[str, str] = {}

    def awaited_by_run() -> dict[str, set[str]]:
        """Run that is submitted now -> the runs and the prepare job that its job waits for."""
        before = set(run_of)
        run_slurm(sweep, LaunchOptions())
        for record in (sweep.store / "submissions").glob("*.json"):
            run_of.update({job: run for run, job in read_json(record)["jobs"].items()})
        awaited = {}
        for job in run_of.keys() - before:
            script = (sbatch.parent / f"sbatch.{job.partition('_')[0]}").read_text()
            jobs = re.findall(r"afterany:(\w+)", script)
            awaited[run_of[job]] = {run_of.get(one, "prepare job") for one in jobs}
        return awaited

    submitted = awaited_by_run()
    assert submitted.keys() == sweep.runs.keys()
    for start in (None, "first", "second"):
        runs = {run: config for run, config in sweep.runs.items() if config.init == start}
        initial = {config.init_run for config in runs.values()} - {None}
        assert len(initial) == (0 if start is None else 2)
        assert all(submitted[run] == initial | {"prepare job"} for run in runs)

    # the same again, when only the runs without `init` are still in the queue
    jobs = {run: [job] for job, run in run_of.items() if sweep.runs[run].init is None}
    states = {job: "PENDING" for (job,) in jobs.values()}
    queue = Queue(states, jobs, dict.fromkeys(states, tmp_path / "log"))
    again = awaited_by_run()
    assert again == {run: awaited for run, awaited in submitted.items() if run not in jobs}
