"""Runs as SLURM arrays through Submitit. What became of them is read from the run folders and `distill_bench.sweep.queue`.

Submitit's own view of a job is never asked: without accounting it hangs, after a lost node it is wrong.
"""

import contextlib
import logging
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import submitit
from submitit.core import utils
from submitit.helpers import TorchDistributedEnvironment, clean_env

from distill_bench.config.cluster import ClusterConfig
from distill_bench.config.errors import ConfigError
from distill_bench.store.claims import attempts
from distill_bench.store.files import append_jsonl, read_json, read_jsonl, write_json
from distill_bench.store.runs import file_of_call, state
from distill_bench.store.stop import DRIVER, Stopped, StopRequest, obey, slurm_job
from distill_bench.sweep.queue import SchedulerError, cancel
from distill_bench.sweep.queue import cluster as cluster_facts
from distill_bench.sweep.workers import Task, python, run_queue

KILLED_RETRIES = 3  # of a job that lost a process to a signal (a dead rank, memory); preemptions and the like do not count


def submit(
    run_dirs: Sequence[Path],
    cluster: ClusterConfig,
    store: Path,
    prepare: Sequence[Path] = (),
    allow_changed_code: bool = False,
) -> list[str]:
    """Submit the runs as arrays below MaxArraySize and return each run's job id.

    `prepare` are runs whose shared data is to be made first, by a job of its own that the arrays wait for. The ids are also
    written into store/submissions/, one file a call, for `scheduler.read_queue`.

    Raises:
        ConfigError: if SLURM refuses a job; what it has accepted before stays.
    """
    logging.getLogger("submitit").setLevel(logging.ERROR)
    packs = [
        run_dirs[i : i + cluster.runs_per_job]
        for i in range(0, len(run_dirs), cluster.runs_per_job)
    ]
    size = cluster_facts(cluster.partition).max_array  # the largest index is one less
    chunks = [packs[i : i + size] for i in range(0, len(packs), size)]
    after: dict[str, str] = {}
    if prepare:
        # alone in its job; one process, whatever a run has
        first = _executor(
            cluster.model_copy(update={"nodes": 1, "tasks": 1}), store, "distill-bench-prepare", 1
        )
        (job,) = _submitted(
            lambda: [first.submit(prepare_shared, [str(run.resolve()) for run in prepare])]
        )
        after = {
            "dependency": f"afterany:{job}"
        }  # any: a run that finds nothing prepared makes it, or says why not
    ids: dict[Path, str] = {}
    for index, chunk in enumerate(chunks):
        share, rest = divmod(
            cluster.jobs or 16, len(chunks)
        )  # SLURM bounds an array, not several together
        parallel = max(1, share + (index < rest))
        executor = _executor(cluster, store, "distill-bench", parallel, **after)
        work = [[str(run.resolve()) for run in pack] for pack in chunk]
        try:
            jobs = _submitted(
                lambda e=executor, w=work: e.map_array(
                    do_runs, w, [allow_changed_code] * len(w), [time.time()] * len(w)
                )
            )
        except ConfigError as error:
            if after and not ids:
                with contextlib.suppress(SchedulerError):
                    cancel([job])  # nobody waits for it
            rest = f"{len(ids)} of {len(run_dirs)} runs are submitted, the same command submits the rest"
            raise ConfigError(f"{error} ({rest})") from error
        accepted = {run: job for pack, job in zip(chunk, jobs, strict=True) for run in pack}
        found = {"jobs": {run.name: job for run, job in accepted.items()}, **after}
        write_json(file_of_call(store / "submissions"), found)
        ids |= accepted
    return [ids[run] for run in run_dirs]


def script(cluster: ClusterConfig, store: Path) -> str:
    """The batch script of a job, for the plan; also where SLURM is not."""
    executor = _executor(cluster, store, "distill-bench", cluster.jobs or 16, kind=_Planned)
    return executor._make_submission_file_text("python ...", "plan")


class _Planned(submitit.SlurmExecutor):
    """One that is not asked whether SLURM is here."""

    @classmethod
    def affinity(cls) -> int:
        return 1


def _executor(
    cluster: ClusterConfig,
    store: Path,
    name: str,
    parallel: int,
    kind: type = submitit.SlurmExecutor,
    **more: str,
) -> submitit.SlurmExecutor:
    executor = kind(folder=(store / "slurm" / "%A").resolve())
    minutes = max(1, round(60 * cluster.hours))
    optional = {key: getattr(cluster, key) for key in ("partition", "account", "qos", "constraint")}
    optional |= {"mem": cluster.mem_gb and f"{cluster.mem_gb}GB"}
    asked = {"requeue": True, "kill-on-invalid-dep": "yes", **cluster.sbatch}
    if asked["requeue"] is False:
        asked["no-requeue"] = True  # left out it would be the cluster's default
    killed = (
        shlex.quote(str((store / "slurm").resolve()))
        + "/${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}/$SLURM_JOB_ID.killed"
    )
    executor.update_parameters(
        job_name=name,
        time=minutes,
        nodes=cluster.nodes,
        ntasks_per_node=cluster.processes,
        cpus_per_task=cluster.cpus,
        array_parallelism=parallel,
        signal_delay_s=min(
            cluster.signal_seconds, 15 * minutes
        ),  # SLURM may be a minute early: leave most of the time
        stderr_to_stdout=True,
        setup=[
            "set -e",
            *cluster.setup,
            # srun does not inherit it in every version; idle OpenMP threads that spin would take the cores from other processes
            "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}",
            "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}} OMP_WAIT_POLICY=PASSIVE",
            "set +e",
        ],
        # a process that a signal killed (a lost rank, memory) comes back; a job that is being cancelled does not
        teardown=[
            "code=$?",
            f"if [ $code -gt 128 ] && [ $(cat {killed} 2>/dev/null | wc -l) -lt {KILLED_RETRIES} ] &&"
            ' [ "$(squeue --noheader --jobs=$SLURM_JOB_ID --format=%T)" = RUNNING ] &&'
            f" echo $code >>{killed}; then scontrol requeue $SLURM_JOB_ID; fi",
            "exit $code",
        ],
        srun_args=["--kill-on-bad-exit=1"],
        additional_parameters={key: value for key, value in asked.items() if value is not False},
        **({"gpus_per_node": cluster.gpus} if cluster.gpus else {}),
        **{key: value for key, value in optional.items() if value is not None},
        **more,
    )
    return executor


def _submitted(call: Callable[[], list[submitit.Job]]) -> list[str]:
    """Job ids of a submission.

    Raises:
        ConfigError: with what SLURM said.
    """
    try:
        with _clean_env():
            return [job.job_id for job in call()]
    except (
        utils.FailedJobError,
        utils.FailedSubmissionError,
        subprocess.CalledProcessError,
    ) as error:
        raise ConfigError(f"SLURM refused the job: {_telling(str(error))}") from error


def _telling(said: str) -> str:
    """What of sbatch's words says what is wrong, in a line; the last one is often of no use."""
    lines = [
        line.strip() for line in said.splitlines() if line.strip() and not line.startswith("Try ")
    ]
    errors = [line for line in lines if "error" in line.lower()] or lines[-1:]
    return (
        "; ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in errors)
        or "without a word"
    )


@contextlib.contextmanager
def _clean_env() -> Iterator[None]:
    """Submitit's clean_env, so that a job may submit jobs, but SLURM_CONF stays: it says which cluster."""
    conf = os.environ.get("SLURM_CONF")
    with clean_env(extra_names=(DRIVER,)):
        if conf is not None:
            os.environ["SLURM_CONF"] = conf
        yield


# --- what runs on a node; imported there by name, given run folders only ---


def do_runs(run_dirs: list[str], allow_changed_code: bool, submitted: float) -> None:
    """One job: one run with all its processes, or several side by side. Ends by the protocol of `distill_bench.store.stop`."""
    stop = StopRequest().listen()
    ranks = int(os.environ.get("SLURM_NTASKS", 1))
    left = [
        run for run in run_dirs if ranks > 1 or _left_to_do(Path(run), submitted)
    ]  # of several ranks the first decides
    if not left:
        print("done, or in other hands", flush=True)  # another sweep was quicker
        return
    from distill_bench.sweep.job import (  # takes seconds: after the handlers
        ELSEWHERE,
        STOPPED,
        execute,
    )

    if len(left) == 1:
        if ranks > 1:
            # never CUDA_VISIBLE_DEVICES: it would send two jobs of a node to one GPU
            TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        codes = [execute(Path(left[0]), stop, allow_changed_code)]
    else:
        codes = _side_by_side([Path(run) for run in left], stop, allow_changed_code)
    if stop() and STOPPED in codes:
        obey(stop)
    raise SystemExit(
        max(code for code in codes if code != ELSEWHERE) if set(codes) - {ELSEWHERE} else 0
    )


def _left_to_do(run_dir: Path, submitted: float) -> bool:
    """Whether a run has no end yet; one that has failed since this job was submitted waits for --retry-failed."""
    now = state(run_dir)
    if now == "failed":
        errors = [attempt / "exit.json" for attempt in attempts(run_dir)[-1:]]
        errors.append(run_dir.parent / "errors" / f"{run_dir.name}.json")
        return not any((read_json(path) or {}).get("time", 0) > submitted for path in errors)
    return now not in ("done", "collapsed", "running")


def prepare_shared(run_dirs: list[str]) -> None:
    """Make what these runs share with others."""
    stop = StopRequest().listen()
    from distill_bench.sweep.job import (
        FAILED,
        LIVES_WITHOUT_PROGRESS,
        MORE_TIME,
        STOPPED,
        bytes_in,
        prepare_run,
    )

    store = Path(run_dirs[0]).parent
    try:
        with stop.at_once():
            for run in run_dirs:
                prepare_run(Path(run))
    except Stopped:
        if _stuck(
            store / "slurm" / f"prepare-{slurm_job()}.jsonl",
            bytes_in(store / "references", store / "extras"),
        ):
            print(
                f"stopped {LIVES_WITHOUT_PROGRESS} times with nothing new: {MORE_TIME}", flush=True
            )
            raise SystemExit(FAILED) from None  # the runs will make it themselves, or say so
        obey(stop)
        raise SystemExit(STOPPED) from None


def _stuck(lives: Path, made: int) -> bool:
    """Whether a job that is stopped again and again makes nothing: by the bytes that there were at the end of each life."""
    from distill_bench.sweep.job import LIVES_WITHOUT_PROGRESS

    append_jsonl(lives, made)
    ends = read_jsonl(lives)[-LIVES_WITHOUT_PROGRESS:]
    return len(ends) == LIVES_WITHOUT_PROGRESS and len(set(ends)) == 1


def _side_by_side(
    run_dirs: Sequence[Path], stop: StopRequest, allow_changed_code: bool
) -> list[int]:
    """Each run in a process of its own, sharing the job's cores and GPUs; their exit codes."""
    from distill_bench.sweep.job import STOPPED

    flags = ["--allow-changed-code"] if allow_changed_code else []
    tasks = [
        Task(run.name, python("distill_bench.sweep.job", str(run), *flags), run / "log.txt")
        for run in run_dirs
    ]
    run_queue(tasks, len(tasks), stop=stop)
    stopped = (
        {None, -signal.SIGTERM, -signal.SIGUSR2} if stop() else set()
    )  # before or in its imports
    return [
        STOPPED if task.code in stopped else 128 - task.code if task.code < 0 else task.code
        for task in tasks
    ]
