"""Worker processes of this machine, and how one is asked to stop."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from distill_bench.store.stop import DRIVER, Stopped, StopRequest
from distill_bench.sweep import workers as local
from distill_bench.sweep.workers import Task, python, run_queue

SHOW = "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['OMP_NUM_THREADS'], flush=True); time.sleep(0.3)"


def tasks(folder: Path, count: int, code: str = SHOW) -> list[Task]:
    return [Task(str(i), [sys.executable, "-c", code], folder / f"{i}.txt") for i in range(count)]


def test_tasks_share_cores_and_gpus_and_wait_for_each_other(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    running, most = set(), 0

    def changed(task: Task) -> None:
        nonlocal most
        (running.add if task.code is None else running.discard)(task.name)
        most = max(most, len(running))

    queue = tasks(tmp_path, 5)
    run_queue(queue, 2, changed)
    assert most == 2 and not running and [task.code for task in queue] == [0] * 5
    shown = [task.log.read_text().split() for task in queue]
    assert {gpu for gpu, _ in shown} == {"3", "5"}
    assert {int(threads) for _, threads in shown} == {max(1, len(os.sched_getaffinity(0)) // 2)}


def test_a_task_that_cannot_start_says_why_and_the_others_run(tmp_path):
    (tmp_path / "file").touch()
    queue = [
        Task("gone", ["/nowhere/python"], tmp_path / "gone.txt"),
        Task("unwritable", [sys.executable, "-c", ""], tmp_path / "file" / "log.txt"),
        *tasks(tmp_path, 1, "pass"),
    ]
    run_queue(queue, 1)
    assert [task.code for task in queue] == [127, 127, 0]
    assert (
        queue[0].error == "cannot start: No such file or directory: /nowhere/python"
        and "file" in queue[1].error
    )


OWN = """
import json, os, sys

ours = [name for name in sys.modules if name.startswith("distill_bench.")]
watched = os.environ["DISTILL_BENCH_DRIVER"] == str(os.getppid())
leads = os.getsid(0) == os.getpid()
print(json.dumps([leads, watched, os.environ["OMP_NUM_THREADS"], sys.argv[1:], __name__, "torch" in sys.modules, ours]))
os.kill(os.getpid(), 9) if "die" in sys.argv else sys.exit(3)
"""


def test_a_fork_is_a_process_of_its_own_with_the_libraries_and_none_of_our_code(
    tmp_path, monkeypatch
):
    """As `python -m` runs a module: its session, output, cores, arguments and exit code; where there is a GPU it is no fork."""
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    before, cores = dict(os.environ), len(os.sched_getaffinity(0))
    jobs = cores // int(
        (local._threads_of_forks or [cores])[0]
    )  # forks of one process have one number of threads
    for devices, argument, code in (("", "a", 3), ("", "die", -signal.SIGKILL), ("0", "a", 3)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
        task = Task(
            "own", python("own", argument), tmp_path / f"{argument}{devices}.txt", forks=True
        )
        run_queue([task], jobs)
        assert task.code == code
        if argument == "a":
            *said, ours = json.loads(task.log.read_text())
            assert said == [True, True, str(cores // jobs), ["a"], "__main__", not devices]
            assert set(ours) <= {"distill_bench.sweep.workers", "distill_bench.store.stop"}
    assert os.environ | {"CUDA_VISIBLE_DEVICES": ""} == before | {"CUDA_VISIBLE_DEVICES": ""}


SAVES = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), sys.exit(3)))
print("up", flush=True)
time.sleep(60)
"""


def up(task: Task) -> bool:
    return task.log.exists() and "up" in task.log.read_text()


def test_a_queue_that_is_stopped_asks_the_running_and_starts_no_more(tmp_path):
    queue = tasks(tmp_path, 3, SAVES)
    run_queue(queue, 1, stop=lambda: up(queue[0]))
    assert [task.code for task in queue] == [3, None, None]


def test_a_task_to_drop_is_asked_to_save_or_never_started_and_the_others_run(tmp_path):
    queue = [*tasks(tmp_path, 2, SAVES), *tasks(tmp_path / "more", 1, "pass")]
    run_queue(queue, 1, drop=lambda task: task.log.parent == tmp_path and up(queue[0]))
    assert [task.code for task in queue] == [3, None, 0]


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


def ranks(folder: Path, count: int, *arguments: str) -> list[Task]:
    return [
        Task(str(i), [sys.executable, "-c", RANK, *arguments], folder / f"{i}.txt", True, 2)
        for i in range(count)
    ]


def test_processes_of_one_task_have_a_gpu_each_and_know_of_each_other(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    queue = ranks(tmp_path, 3)
    run_queue(queue, 2)
    assert [task.code for task in queue] == [0, 0, 0]
    threads = max(1, len(os.sched_getaffinity(0)) // 4)
    seen = [sorted(task.log.read_text().splitlines()) for task in queue]
    of = {
        devices: [f"{rank} {rank} 2 {devices} {threads}" for rank in (0, 1)]
        for devices in ("3,5", "6,7")
    }
    assert seen[0] == of["3,5"] and seen[1] == of["6,7"] and seen[2] in of.values()


def test_a_task_is_stopped_with_all_of_its_processes(tmp_path):
    (task,) = queue = ranks(tmp_path, 1, "save")
    run_queue(queue, 1, stop=lambda: task.log.exists() and task.log.read_text().count("up") == 2)
    assert task.code == 3


@pytest.mark.parametrize(("how", "code"), [("die", -signal.SIGKILL), ("fail", 1)])
def test_where_one_process_of_a_task_dies_the_others_are_ended(how, code, tmp_path, monkeypatch):
    """Its code is the task's, not that of those that are killed for it."""
    monkeypatch.setattr(local, "GRACE_SECONDS", 0.2)
    (task,) = queue = ranks(tmp_path, 1, how)
    began = time.monotonic()
    run_queue(queue, 1)
    assert task.code == code and time.monotonic() - began < 30
    with pytest.raises(ProcessLookupError):
        os.killpg(task.process.pid, 0)


def test_ctrl_c_lets_the_running_save(tmp_path):
    queue = tasks(tmp_path, 3, SAVES)

    def changed(task: Task) -> None:
        while not up(task):
            time.sleep(0.01)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_queue(queue, 1, changed)
    assert [task.code for task in queue] == [3, None, None]


@pytest.fixture
def stop():
    """A listening request; the handlers of before are put back."""
    numbers = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield StopRequest().listen()
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_a_request_is_noted_and_the_scheduler_s_own_signal_wins(stop):
    assert not stop()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop() and stop.signal == signal.SIGTERM
    os.kill(os.getpid(), signal.SIGUSR2)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.signal == signal.SIGUSR2


def test_outside_training_a_request_ends_the_stage_and_a_second_ctrl_c_everything(stop):
    with pytest.raises(Stopped), stop.at_once():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    with pytest.raises(Stopped), stop.at_once():
        pytest.fail("a stage begins though a request is there")
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_a_worker_whose_driver_is_gone_stops(monkeypatch):
    monkeypatch.setenv(DRIVER, str(os.getppid()))
    assert not StopRequest()()
    monkeypatch.setenv(DRIVER, "1" if os.getppid() != 1 else "2")
    assert StopRequest()()
