"""Cores, GPUs and memory of this process: affinity, control groups, SLURM, CUDA's rules, glibc."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from distill_bench.store import machine
from distill_bench.store.machine import usable_cores, visible_gpus

AFFINITY = 64
V2 = "cgroup2 {root} cgroup2 rw,nosuid 0 0\n"
V1 = "tmpfs {root} tmpfs rw 0 0\ncgroup {root}/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0\n"


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Function that puts this process into a control group, with files of these contents."""
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    monkeypatch.setattr(machine, "PROC", proc)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(AFFINITY)), raising=False)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)

    def join(mounts: str, groups: str, files: dict[str, str]) -> None:
        (proc / "self/mounts").write_text("proc /proc proc rw 0 0\n" + mounts.format(root=root))
        (proc / "self/cgroup").write_text(groups)
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)

    return join


@pytest.mark.parametrize(
    ("mounts", "groups", "files", "cores"),
    [
        (V2, "0::/a/b\n", {"a/b/cpu.max": "max 100000\n"}, AFFINITY),
        (V2, "0::/a/b\n", {"a/b/cpu.max": "400000 100000\n"}, 4),
        (V2, "0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "200000 100000"}, 2),
        (V2, "0::/\n", {"cpu.max": "150000 100000\n"}, 1),  # in a container
        (V2, "0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        (V2, "0::/../gone\n", {"cpu.max": "300000 100000\n"}, 3),
        (
            V1,
            "4:memory:/docker/1\n3:cpuacct,cpu:/docker/1\n",  # the path on the host
            {"cpu,cpuacct/cpu.cfs_quota_us": "300000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            3,
        ),
        (
            V1,
            "3:cpu,cpuacct:/slurm/job_7\n",
            {
                "cpu,cpuacct/cpu.cfs_quota_us": "-1",
                "cpu,cpuacct/cpu.cfs_period_us": "100000",
                "cpu,cpuacct/slurm/job_7/cpu.cfs_quota_us": "800000",
                "cpu,cpuacct/slurm/job_7/cpu.cfs_period_us": "100000",
            },
            8,
        ),
        (V2, "0::/a\n", {"a/cpu.max": "unreadable"}, AFFINITY),
        ("", "", {}, AFFINITY),
    ],
)
def test_the_quota_of_a_control_group_or_of_one_around_it_limits_the_cores(
    mounts, groups, files, cores, group
):
    group(mounts, groups, files)
    assert usable_cores() == cores


@pytest.mark.parametrize(
    ("variables", "cores"),
    [
        ({"SLURM_CPUS_PER_TASK": "4", "SLURM_CPUS_ON_NODE": "16"}, 4),
        ({"SLURM_CPUS_ON_NODE": "16"}, 16),
        ({"SLURM_CPUS_PER_TASK": "128"}, AFFINITY),
        ({"SLURM_CPUS_PER_TASK": ""}, AFFINITY),
    ],
)
def test_slurm_limits_the_cores_even_without_binding(variables, cores, group, monkeypatch):
    group("", "", {})
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert usable_cores() == cores


@pytest.mark.skipif(sys.platform != "linux", reason="needs CPU affinity")
def test_an_affinity_limits_the_cores():
    core = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, [{core}])\n"
    code += "from distill_bench.store.machine import usable_cores; print(usable_cores())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ["0", "1", "2", "3"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("none", []),
        ("3,1", ["3", "1"]),
        (" 0 , 2 ", ["0", "2"]),
        ("0,-1,1", ["0"]),
        ("0,4,1", ["0"]),  # the machine has four
        ("0,,1", ["0"]),
        ("0,0", []),
        ("00,0", []),
        ("GPU-8f2a,GPU-11cd", ["GPU-8f2a", "GPU-11cd"]),
        ("GPU-8f2a,1", ["GPU-8f2a"]),
        ("1,GPU-8f2a", ["1"]),
        ("MIG-5c,MIG-GPU-8f2a/1/0", ["MIG-5c", "MIG-GPU-8f2a/1/0"]),
        ("MIG-5c,MIG-5c", []),
    ],
)
def test_gpus_are_visible_by_cuda_s_rules(visible, expected, tmp_path, monkeypatch):
    for index in range(4):
        (tmp_path / f"0000:0{index}:00.0").mkdir()
    monkeypatch.setattr(machine, "GPUS", tmp_path)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_gpus() == expected


def test_without_the_driver_s_list_any_number_is_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "GPUS", tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,5")
    assert visible_gpus() == ["0", "5"]


FREE_A_LARGE_BLOCK = """
import sys
from pathlib import Path
from distill_bench.store import machine

machine.GPUS = Path(sys.argv[1])
machine.keep_freed_memory()
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1])
block = bytearray(2**28)
before = resident()
del block
print(before - resident() < 2**15)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets glibc's allocator")
@pytest.mark.parametrize(
    ("variables", "gpus", "kept"),
    [
        ({}, [], True),
        ({"MALLOC_TRIM_THRESHOLD_": "131072"}, [], False),
        ({"GLIBC_TUNABLES": "glibc.malloc.check=0"}, [], False),
        ({}, ["0000:01:00.0"], False),
    ],
)
def test_freed_memory_is_kept_unless_the_user_or_a_gpu_says_otherwise(
    variables, gpus, kept, tmp_path
):
    for gpu in gpus:
        (tmp_path / gpu).mkdir()
    done = subprocess.run(
        [sys.executable, "-c", FREE_A_LARGE_BLOCK, str(tmp_path)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{kept}\n"
