"""SLURM's refusals and pending reasons in one line, without SLURM; tests/slurm uses a real one."""

from dataclasses import replace

import pytest

from distill_bench.config.cluster import ClusterConfig
from distill_bench.sweep.slurm.queue import Partition, Queue
from distill_bench.sweep.slurm.submit import batch_script, sbatch_errors, shares
from distill_bench.sweep.status import ManifestEntry, read_statuses

RUN = "dmd2-s0-0"


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


def test_the_batch_script_has_the_cluster_block_and_the_user_s_sbatch_last(tmp_path):
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
