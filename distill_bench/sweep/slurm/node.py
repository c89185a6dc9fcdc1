"""Code of a SLURM job on its node: do the runs, save on a signal, requeue the job.

Submitit imports these functions by name and passes run folders. Signals, as tested on SLURM:

- After SIGUSR2 (the job's --signal: a time limit or a preemption is near), save, requeue the job
  and wait to be killed.
- After SIGTERM (preemption without a warning, `scontrol requeue`, `scancel`), save and wait to be
  killed. SLURM decides whether the job comes back; a job that exits by itself counts as failed.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from submitit.helpers import TorchDistributedEnvironment

from distill_bench.store.claims import attempts
from distill_bench.store.files import append_jsonl, read_json, read_jsonl
from distill_bench.store.runs import error_path, requested_samplings, run_state
from distill_bench.store.stop import Stopped, StopRequest, slurm_job
from distill_bench.sweep.local.workers import (
    CLAIMED_ELSEWHERE,
    FAILED,
    STOPPED,
    Task,
    python_command,
    run_tasks,
)

LAUNCH_FOLDER = "DISTILL_BENCH_LAUNCH_FOLDER"  # environment variable: relative paths start here
PATIENCE_SECONDS = 900.0  # for SLURM to kill a job that it has told to stop


def do_runs(run_dirs: list[str], allow_changed_code: bool, submitted: float) -> None:
    """Body of a job: one run with all its processes, or several runs side by side.

    Args:
        submitted: seconds since the epoch. A run that failed after this time is not retried.
    """
    stop = StopRequest().listen()
    os.chdir(os.environ.get(LAUNCH_FOLDER, "."))
    processes = int(os.environ.get("SLURM_NTASKS", 1))
    # with several ranks, rank 0 decides (job.execute)
    left = [run for run in run_dirs if processes > 1 or _is_left(Path(run), submitted)]
    if not left:
        print("nothing to do: the runs are done or claimed by other processes", flush=True)
        return
    if len(left) > 1:
        codes = _side_by_side([Path(run) for run in left], stop, allow_changed_code)
    else:
        from distill_bench.sweep.job import execute  # takes seconds: after the handlers

        if processes > 1:
            # its CUDA_VISIBLE_DEVICES would send two jobs of a node to the same GPU
            TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        codes = [execute(Path(left[0]), stop, allow_changed_code)]
    if stop() and STOPPED in codes:
        end_stopped_job(stop)
    raise SystemExit(max((code for code in codes if code != CLAIMED_ELSEWHERE), default=0))


def _is_left(run_dir: Path, submitted: float) -> bool:
    """True if the run is not done, not running, and has not failed since `submitted`."""
    state = run_state(run_dir, samplings=requested_samplings(run_dir))
    if state == "failed":
        records = [attempt / "exit.json" for attempt in attempts(run_dir)[-1:]]
        records.append(error_path(run_dir))
        return not any((read_json(path) or {}).get("time", 0) > submitted for path in records)
    return state not in ("done", "collapsed", "running")


def _side_by_side(
    run_dirs: Sequence[Path], stop: StopRequest, allow_changed_code: bool
) -> list[int]:
    """Do each run in its own process, sharing cores and GPUs; returns their exit codes."""
    flags = ["--allow-changed-code"] if allow_changed_code else []
    tasks = []
    for run_dir in run_dirs:
        argv = python_command("distill_bench.sweep.job", str(run_dir), *flags)
        tasks.append(Task(run_dir.name, argv, run_dir / "log.txt"))
    run_tasks(tasks, len(tasks), stop=stop)
    # a task may be stopped before it starts, or before it installs its handlers
    early = {None, -signal.SIGTERM, -signal.SIGUSR2} if stop() else set()
    codes = [STOPPED if task.exit_code in early else task.exit_code for task in tasks]
    return [128 - code if code < 0 else code for code in codes]


def prepare_shared(run_dirs: list[str]) -> None:
    """Body of the prepare job: make the shared artefacts of these runs."""
    stop = StopRequest().listen()
    # Submitit writes its result into the folder in which the job started
    with contextlib.chdir(os.environ.get(LAUNCH_FOLDER, ".")):
        _prepare([Path(run) for run in run_dirs], stop)


def _prepare(run_dirs: Sequence[Path], stop: StopRequest) -> None:
    from distill_bench.sweep.job import MORE_TIME, STOPS_WITHOUT_PROGRESS  # takes seconds
    from distill_bench.sweep.prepare import bytes_in, prepare_run

    store = run_dirs[0].parent
    try:
        with stop.at_once():
            for run in run_dirs:
                prepare_run(run)
    except Stopped:
        record = store / "slurm" / f"prepare-{slurm_job()}.jsonl"
        made = bytes_in(store / "references", store / "extras")
        if is_stuck(record, made, STOPS_WITHOUT_PROGRESS):
            message = f"stopped {STOPS_WITHOUT_PROGRESS} times without progress: {MORE_TIME}"
            print(message, flush=True)
            raise SystemExit(FAILED) from None  # the runs will make the artefacts, or fail
        end_stopped_job(stop)
        raise SystemExit(STOPPED) from None


def is_stuck(record: Path, made: int, limit: int) -> bool:
    """Record the bytes made so far; returns True if the last `limit` records are equal."""
    append_jsonl(record, made)
    ends = read_jsonl(record)[-limit:]
    return len(ends) == limit and len(set(ends)) == 1


def end_stopped_job(stop: StopRequest, patience_seconds: float = PATIENCE_SECONDS) -> None:
    """Requeue a saved job after SIGUSR2, and wait for SLURM to kill it.

    Returns if SLURM refuses to requeue; the run stays stopped and the sweep's next call resumes it.
    """
    if stop.signal != signal.SIGUSR2:
        # SLURM kills the job meanwhile, unless the signal was sent by hand
        _sleep(patience_seconds)
    if int(os.environ.get("SLURM_PROCID", 0)) == 0:
        print(f"saved; {slurm_job()} goes back into the queue", flush=True)
        done = subprocess.run(
            ["scontrol", "requeue", slurm_job()],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
        if done.returncode:
            print(f"SLURM does not requeue {slurm_job()}: {done.stderr.strip()}", flush=True)
            return
    _sleep(patience_seconds)


def _sleep(seconds: float) -> None:
    """Sleep for the whole time, even if signals arrive."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        time.sleep(left)
