"""Worker processes on this machine: slots, forks, several ranks per task, stopping."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill_bench.store.machine import usable_cores
from distill_bench.sweep.local import forks, workers
from distill_bench.sweep.local.workers import Task, python_command, run_tasks

CORES = usable_cores()
ROOT = Path(__file__).parents[2]
SHOW = """
import os, time
print(os.environ["CUDA_VISIBLE_DEVICES"], os.environ["OMP_NUM_THREADS"], flush=True)
time.sleep(0.3)
"""
SAVES = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), sys.exit(3)))
print("up", flush=True)
time.sleep(60)
"""


def make_tasks(folder: Path, count: int, code: str) -> list[Task]:
    return [Task(str(i), [sys.executable, "-c", code], folder / f"{i}.txt") for i in range(count)]


def exit_codes(tasks: list[Task]) -> list[int | None]:
    return [task.exit_code for task in tasks]


def is_up(task: Task) -> bool:
    return task.log.exists() and "up" in task.log.read_text()


@pytest.mark.slow
def test_tasks_share_cores_and_gpus_and_no_more_run_at_once_than_jobs(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    running: set[str] = set()
    numbers = []

    def changed(task: Task) -> None:
        (running.add if task.exit_code is None else running.discard)(task.name)
        numbers.append(len(running))

    tasks = make_tasks(tmp_path, 5, SHOW)
    run_tasks(tasks, 2, changed)
    assert exit_codes(tasks) == [0] * 5
    assert max(numbers) == 2
    assert not running
    shown = [task.log.read_text().split() for task in tasks]
    assert {gpu for gpu, _ in shown} == {"3", "5"}
    assert {int(threads) for _, threads in shown} == {max(1, CORES // 2)}


def test_a_task_that_cannot_start_has_a_reason_and_the_others_run(tmp_path):
    (tmp_path / "file").touch()
    tasks = [
        Task("gone", ["/nowhere/python"], tmp_path / "gone.txt"),
        Task("unwritable", [sys.executable, "-c", ""], tmp_path / "file" / "log.txt"),
        *make_tasks(tmp_path, 1, "pass"),
    ]
    run_tasks(tasks, 1)
    assert exit_codes(tasks) == [127, 127, 0]
    assert tasks[0].error == "cannot start: No such file or directory: /nowhere/python"
    assert "file" in tasks[1].error


# --- stopping ---


def test_a_stop_lets_running_tasks_save_and_starts_no_more(tmp_path):
    tasks = make_tasks(tmp_path, 3, SAVES)
    run_tasks(tasks, 1, stop=lambda: is_up(tasks[0]))
    assert exit_codes(tasks) == [3, None, None]


@pytest.mark.slow
def test_a_cancelled_task_saves_or_never_starts_and_the_others_run(tmp_path):
    tasks = [*make_tasks(tmp_path, 2, SAVES), *make_tasks(tmp_path / "more", 1, "pass")]
    run_tasks(tasks, 1, cancelled=lambda task: task.log.parent == tmp_path and is_up(tasks[0]))
    assert exit_codes(tasks) == [3, None, 0]


def test_ctrl_c_lets_running_tasks_save(tmp_path):
    tasks = make_tasks(tmp_path, 3, SAVES)

    def changed(task: Task) -> None:
        while not is_up(task):
            time.sleep(0.01)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tasks(tasks, 1, changed)
    assert exit_codes(tasks) == [3, None, None]


# --- forks ---

MODULE = """
import json, os, signal, sys

print(json.dumps({
    "leads its session": os.getsid(0) == os.getpid(),
    "driver": int(os.environ["DISTILL_BENCH_DRIVER"]),
    "threads": int(os.environ["OMP_NUM_THREADS"]),
    "arguments": sys.argv[1:],
    "name": __name__,
    "libraries are imported": "torch" in sys.modules,
    "own": [name for name in sys.modules if name.startswith("distill_bench.")],
}))
os.kill(os.getpid(), signal.SIGKILL) if "die" in sys.argv else sys.exit(3)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that prints how it was started."""
    (tmp_path / "shows_itself.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    return "shows_itself"


def jobs_of_server() -> int:
    """Jobs at once for which tasks have the thread count of the fork server, if one runs."""
    return CORES // (forks.threads_of_server or [CORES])[0]


@pytest.mark.slow
@pytest.mark.parametrize(("gpus", "forked"), [("", True), ("0", False)])
def test_a_fork_runs_a_module_as_python_m_does(gpus, forked, module, tmp_path, monkeypatch):
    """Own session, log, cores, arguments and exit code; only the libraries are imported before."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    before = dict(os.environ)
    task = Task("fork", python_command(module, "a"), tmp_path / "log.txt", forks=True)
    run_tasks([task], jobs_of_server())
    assert task.exit_code == 3
    assert isinstance(task.process, forks.Fork) == forked
    shown = json.loads(task.log.read_text())
    assert set(shown.pop("own")) <= {
        "distill_bench.store",
        "distill_bench.sweep",
        "distill_bench.sweep.local",
        "distill_bench.sweep.local.forks",
    }
    assert shown == {
        "leads its session": True,
        "driver": os.getpid(),
        "threads": CORES // jobs_of_server(),
        "arguments": ["a"],
        "name": "__main__",
        "libraries are imported": forked,
    }
    assert dict(os.environ) == before


WAITS = """
import sys, time
from pathlib import Path
from distill_bench.store.stop import StopRequest

stop = StopRequest()
Path(sys.argv[1], "up").touch()
while not stop():
    time.sleep(0.05)
Path(sys.argv[1], "stopped").touch()
"""
DRIVES = """
import sys
from pathlib import Path
from distill_bench.sweep.local.workers import Task, python_command, run_tasks

folders = [Path(name) for name in sys.argv[1:]]
command = lambda folder: python_command("waits", str(folder))
run_tasks([Task(f.name, command(f), f / "log.txt", forks=True) for f in folders], 2)
"""


@pytest.mark.slow
def test_forks_stop_when_their_driver_is_killed(tmp_path, monkeypatch):
    """Each fork keeps the fork server alive, so the server's end does not tell them."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "waits.py").write_text(WAITS)
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    driver = subprocess.Popen([sys.executable, "-c", DRIVES, *folders], cwd=ROOT)
    wait_for(folders, "up", 60)
    driver.kill()
    driver.wait()
    wait_for(folders, "stopped", 10)


def wait_for(folders: list[Path], name: str, seconds: float) -> None:
    """Wait until every folder has a file of this name."""
    ends = time.monotonic() + seconds
    while missing := [folder for folder in folders if not (folder / name).exists()]:
        assert time.monotonic() < ends, f"no {name} in {missing}"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_fork_has_the_exit_code_of_its_signal(module, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    task = Task("fork", python_command(module, "die"), tmp_path / "log.txt", forks=True)
    run_tasks([task], jobs_of_server())
    assert task.exit_code == -signal.SIGKILL


def test_a_long_temporary_folder_rules_out_forks(tmp_path, monkeypatch):
    """The fork server's socket lies in it, and the path of a socket has 107 bytes."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("x" * 100)))
    monkeypatch.setattr(forks, "threads_of_server", [])
    assert not forks.can_fork(1)
    monkeypatch.setattr("tempfile.tempdir", "/tmp")
    assert forks.can_fork(1)
    assert not forks.can_fork(2), "the libraries were imported for one thread"


@pytest.mark.parametrize(
    "error",
    [
        OSError("AF_UNIX path too long"),  # no errno, no file name
        OSError(errno.ENOSPC, "No space left on device"),
        EOFError(),
    ],
)
def test_without_a_fork_server_a_task_is_a_plain_process(error, module, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(forks, "threads_of_server", [])
    monkeypatch.setattr(forks, "Fork", fail)
    task = Task("fork", [sys.executable, "-c", "print('up')"], tmp_path / "log.txt", forks=True)
    run_tasks([task], 1)
    assert (task.exit_code, task.error) == (0, None)
    assert is_up(task)


# --- several processes per task ---

RANK = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
keys = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
print(" ".join(os.environ.get(key, "none") for key in keys) + "\\n", end="", flush=True)
if "save" in sys.argv:
    signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.2 * rank), sys.exit(3)))
    print("up", flush=True)
if "die" in sys.argv and rank:
    os.kill(os.getpid(), signal.SIGKILL)
if "fail" in sys.argv and rank:
    sys.exit(1)
time.sleep(0 if len(sys.argv) < 2 else 60)
"""


def make_rank_tasks(folder: Path, count: int, *arguments: str) -> list[Task]:
    argv = [sys.executable, "-c", RANK, *arguments]
    return [Task(str(i), argv, folder / f"{i}.txt", processes=2) for i in range(count)]


def test_the_processes_of_a_task_have_ranks_and_gpus_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    tasks = make_rank_tasks(tmp_path, 3)
    run_tasks(tasks, 2)
    assert exit_codes(tasks) == [0, 0, 0]
    threads = max(1, CORES // 4)
    first, second = (
        [f"{rank} {rank} 2 {gpus} {threads}" for rank in (0, 1)] for gpus in ("3,5", "6,7")
    )
    shown = [sorted(task.log.read_text().splitlines()) for task in tasks]
    assert shown[:2] == [first, second]
    assert shown[2] in (first, second)


def test_a_task_is_stopped_with_all_of_its_processes(tmp_path):
    (task,) = tasks = make_rank_tasks(tmp_path, 1, "save")
    run_tasks(tasks, 1, stop=lambda: task.log.exists() and task.log.read_text().count("up") == 2)
    assert task.exit_code == 3


@pytest.mark.parametrize(("how", "code"), [("die", -signal.SIGKILL), ("fail", 1)])
def test_if_one_process_of_a_task_ends_badly_the_others_are_killed(
    how, code, tmp_path, monkeypatch
):
    """The task has the exit code of the first, not of those killed because of it."""
    monkeypatch.setattr(workers, "GRACE_SECONDS", 0.2)
    (task,) = tasks = make_rank_tasks(tmp_path, 1, how)
    began = time.monotonic()
    run_tasks(tasks, 1)
    assert task.exit_code == code
    assert time.monotonic() - began < 30
    with pytest.raises(ProcessLookupError):
        os.killpg(task.process.pid, 0)
