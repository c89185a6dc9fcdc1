"""Cores, GPUs and memory of this process: a share of the machine, on a shared node."""

import contextlib
import ctypes
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

from distill_bench.store.files import text_lines

PROC = Path("/proc")
GPUS = Path("/proc/driver/nvidia/gpus")  # one folder per GPU of the machine
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def usable_cores() -> int:
    """Number of cores that this process may keep busy, at least 1.

    The least of its CPU affinity, the CPU quotas of its control groups (containers), and the CPUs
    that SLURM gave to its task.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS
    limits = [len(affinity(0)) if affinity else os.cpu_count() or 1]
    limits += [int(quota) for quota in _cpu_quotas()]
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        if os.environ.get(name, "").isdigit():
            limits.append(int(os.environ[name]))
            break
    return max(1, min(limits))


def _cpu_quotas() -> Iterator[float]:
    """CPU quotas, in cores, of this process's control groups and of the groups around them.

    cgroup v2 writes "QUOTA PERIOD" or "max PERIOD" to cpu.max; v1 has a file for each, -1 for none.
    """
    for folder in _cpu_groups():
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            if (folder / "cpu.max").is_file():
                quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
            else:
                quota = (folder / "cpu.cfs_quota_us").read_text(encoding="utf-8")
                period = (folder / "cpu.cfs_period_us").read_text(encoding="utf-8")
            if int(quota) > 0:
                yield int(quota) / int(period)


def _cpu_groups() -> Iterator[Path]:
    """Folders of the control groups that limit this process's CPU time.

    In a container, the path of a group may be the host's: then only the root is visible.
    """
    with contextlib.suppress(OSError):
        mounts = [line.split() for line in _lines("self/mounts")]
        groups = [line.split(":", 2) for line in _lines("self/cgroup")]
        for _, mount, kind, options, *_ in mounts:
            for _, controllers, path in groups:
                v2 = kind == "cgroup2" and controllers == ""
                v1 = kind == "cgroup" and "cpu" in set(options.split(",")) & set(
                    controllers.split(",")
                )
                if v1 or v2:
                    root = Path(mount)
                    folder = root / path.strip("/")
                    parents = [p for p in folder.parents if p.is_relative_to(root)]
                    yield from dict.fromkeys([folder, *parents])


def _lines(name: str) -> list[str]:
    return text_lines((PROC / name).read_text(encoding="utf-8", errors="replace"))


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them.

    CUDA's rules: the list ends before its first invalid entry, e.g. -1 or NoDevFiles, and a GPU
    that is listed twice makes the whole list invalid.
    """
    machine = [str(i) for i, _ in enumerate(GPUS.glob("*"))]
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return machine
    visible: list[str] = []
    kind = re.match(r"\s*(GPU-|MIG-|)", names)[1]
    for name in map(str.strip, names.split(",")):
        if kind:
            valid = name.startswith(kind)
        else:
            name = name.lstrip("+").lstrip("0") or "0" if name else name
            valid = name.isdecimal() and (not machine or int(name) < len(machine))
        if not valid:
            break
        if name in visible:
            return []
        visible.append(name)
    return visible


def keep_freed_memory() -> None:
    """Keep freed memory in this process for its next allocations, if it computes on processors.

    Each update allocates the same buffers again. By default glibc returns large freed blocks to the
    kernel, which then has to clear and map their pages again. Does nothing with another C library,
    or if the environment has settings of glibc's allocator.
    """
    stated = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    if stated or visible_gpus() or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)  # no mappings of single blocks, which end when they are freed
    libc.mallopt(M_TRIM_THRESHOLD, -1)  # the end of the heap stays
