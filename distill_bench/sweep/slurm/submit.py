"""Submit runs as SLURM arrays through Submitit: the sbatch lines, setup and teardown of a job.

A job runs the functions of node.py. Submitit only submits: its job states hang without accounting
and are wrong after a lost node, so states come from run folders and queue.py.
"""

import contextlib
import logging
import os
import shlex
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import submitit
from submitit.core import utils
from submitit.helpers import clean_env

from distill_bench.config.cluster import EXCLUSIVE, ClusterConfig, asks_for_gpus
from distill_bench.config.errors import ConfigError
from distill_bench.store.files import text_lines, write_json
from distill_bench.store.runs import call_file
from distill_bench.store.stop import DRIVER
from distill_bench.sweep.slurm.node import LAUNCH_FOLDER, do_runs, prepare_shared
from distill_bench.sweep.slurm.queue import SchedulerError, read_partition, scancel

T = TypeVar("T")

JOBS_AT_ONCE = 16  # if cluster.jobs is not set
KILLED_RETRIES = 3  # of a job killed by a signal (lost rank, out of memory); requeues do not count

HERE = Path("/proc/self/cwd")  # a process's current folder, under a name without patterns
ENVIRONMENT = [
    "export SUBMITIT_EXECUTOR=slurm",
    # srun does not inherit the CPUs per task in every SLURM version
    '[ -z "$SLURM_CPUS_PER_TASK" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK',
    # python -m looks for modules in the folder where it starts, which is the jobs' and not this one
    f'export {LAUNCH_FOLDER}="$PWD" PYTHONPATH="$PWD${{PYTHONPATH:+:$PYTHONPATH}}"',
]


def submit(
    run_dirs: Sequence[Path],
    cluster: ClusterConfig,
    store: Path,
    prepare: Sequence[Path] = (),
    allow_changed_code: bool = False,
    name: str = "distill-bench",
    initial: Mapping[str, str] = {},
    queued: Mapping[str, str] = {},
) -> list[str]:
    """Submit runs as arrays of at most MaxArraySize jobs; returns each run's job id.

    Runs that wait for others have arrays of their own, one stage after the other.

    The ids are also recorded in store/submissions/, one file per array, for `queue.read_queue`.

    Args:
        prepare: runs whose shared artefacts a separate job makes first; the arrays wait for it.
        name: name of the jobs.
        initial: run -> the run that it waits for, which is submitted too or in the queue.
        queued: such a run in the queue -> its job.

    Raises:
        ConfigError: if SLURM refuses an array; arrays accepted before stay submitted.
    """
    if "\\" in str(store.resolve()):  # in a file name pattern, it turns the patterns off
        raise ConfigError(f"--store {store}: SLURM cannot write logs below a path with a backslash")
    logging.getLogger("submitit").setLevel(logging.ERROR)
    limit = read_partition(cluster.partition).max_array  # the largest index is one less
    arrays = [
        packs
        for stage in in_stages(run_dirs, initial)
        for packs in _split(_split(stage, cluster.runs_per_job), limit)
    ]
    parallel = shares(cluster.jobs or JOBS_AT_ONCE, len(arrays))
    prepare_job = _submit_prepare(cluster, store, prepare, name) if prepare else None
    # afterany: if the prepare job fails, a run makes the artefacts itself or reports the reason; if
    # an initial run fails, the runs that wait for it end before their first attempt
    after = [f"afterany:{prepare_job}"] if prepare_job else []
    ids: dict[Path, str] = {}
    for array, at_once in zip(arrays, parallel, strict=True):
        job_of = dict(queued) | {run.name: job for run, job in ids.items()}
        runs = [run.name for pack in array for run in pack]
        awaited = dict.fromkeys(job_of[initial[run]] for run in runs if run in initial)
        dependency = ",".join([*after, *(f"afterany:{job}" for job in awaited)]) or None
        executor = make_executor(cluster, store, name, at_once, dependency=dependency)
        try:
            jobs = _submit_array(executor, array, allow_changed_code)
        except ConfigError as error:
            if prepare_job and not ids:
                with contextlib.suppress(SchedulerError):
                    scancel([prepare_job])  # no array waits for it
            raise ConfigError(
                f"{error} ({len(ids)} of {len(run_dirs)} runs are submitted; "
                "the same command submits the rest)"
            ) from error
        accepted = {run: job for pack, job in zip(array, jobs, strict=True) for run in pack}
        record: dict[str, Any] = {"jobs": {run.name: job for run, job in accepted.items()}}
        if after:
            record["dependency"] = after[0]
        write_json(call_file(store / "submissions"), record)
        ids |= accepted
    return [ids[run] for run in run_dirs]


def in_stages(run_dirs: Sequence[Path], initial: Mapping[str, str]) -> list[list[Path]]:
    """Split runs so that those of a stage wait only for runs of the stages before it.

    Args:
        run_dirs: run folders, each after the run that it waits for.
        initial: run -> the run that it waits for.
    """
    stage_of: dict[str, int] = {}
    stages: dict[int, list[Path]] = {}
    for run in run_dirs:
        waits = run.name in initial
        stage_of[run.name] = stage_of.get(initial[run.name], 0) + 1 if waits else 0
        stages.setdefault(stage_of[run.name], []).append(run)
    return [stages[stage] for stage in sorted(stages)]


def _split(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Consecutive pieces of at most `size` items."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def shares(jobs: int, arrays: int) -> list[int]:
    """Split the limit of `jobs` at once over the arrays: SLURM limits each array separately."""
    share, rest = divmod(jobs, arrays)
    return [max(1, share + (index < rest)) for index in range(arrays)]


def _submit_array(
    executor: submitit.SlurmExecutor, array: Sequence[Sequence[Path]], allow_changed_code: bool
) -> list[str]:
    work = [[str(run.resolve()) for run in pack] for pack in array]
    flags, times = [allow_changed_code] * len(work), [time.time()] * len(work)
    return _job_ids(lambda: executor.map_array(do_runs, work, flags, times))


def _submit_prepare(cluster: ClusterConfig, store: Path, runs: Sequence[Path], name: str) -> str:
    """Submit the prepare job, which always has one process."""
    executor = make_executor(cluster.with_one_process(), store, name, 1)
    executor.options["job-name"] = f"{executor.options.get('job-name', name)}-prepare"
    (job,) = _job_ids(lambda: [executor.submit(prepare_shared, [str(r.resolve()) for r in runs])])
    return job


def _job_ids(call: Callable[[], list[submitit.Job]]) -> list[str]:
    """Submit and return the job ids.

    Raises:
        ConfigError: if SLURM refuses the job; the message has SLURM's reason.
    """
    try:
        with _clean_env():
            return [job.job_id for job in call()]
    except (
        utils.FailedJobError,
        utils.FailedSubmissionError,
        subprocess.CalledProcessError,
    ) as error:
        raise ConfigError(f"SLURM refused the job: {sbatch_errors(str(error))}") from error


def sbatch_errors(output: str) -> str:
    """The error lines of sbatch's output; its last line is often only a hint."""
    lines = [line.strip() for line in text_lines(output)]
    lines = [line for line in lines if line and not line.startswith("Try ")]
    errors = [line for line in lines if "error" in line.lower()] or lines[-1:]
    texts = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in errors]
    return "; ".join(texts) or "no reason given"


@contextlib.contextmanager
def _clean_env() -> Iterator[None]:
    """Hide SLURM's variables, so that a job can submit jobs, but keep SLURM_CONF."""
    conf = os.environ.get("SLURM_CONF")
    with clean_env(extra_names=(DRIVER,)):
        if conf is not None:
            os.environ["SLURM_CONF"] = conf
        yield


# --- the batch script ---


def batch_script(cluster: ClusterConfig, store: Path, name: str = "distill-bench") -> str:
    """The batch script of a job, for --dry-run; works without SLURM."""
    executor = make_executor(cluster, store, name, cluster.jobs or JOBS_AT_ONCE, _OfflineExecutor)
    return executor._make_submission_file_text("python ...", "plan")


class Executor(submitit.SlurmExecutor):
    """Submitit's executor with a batch script of our own.

    Submitit replaces patterns such as %j in the paths that it is given, and a store's path may hold
    them. So this process submits from the folder of the jobs, the runs start in it, and Submitit
    knows the folder as HERE.
    """

    def __init__(
        self, cluster: ClusterConfig, folder: Path, options: dict[str, Any], parallel: int
    ) -> None:
        super().__init__(folder=HERE / "%A")
        self.cluster = cluster
        self.options = options
        self.parallel = parallel  # jobs of an array at once
        self.jobs_folder = folder
        self.launch_folder = Path(str(options.pop("chdir", Path.cwd())))
        self.count = 1  # jobs of the array

    def _internal_process_submissions(
        self, delayed_submissions: list[utils.DelayedSubmission]
    ) -> list[submitit.Job[Any]]:
        self.jobs_folder.mkdir(parents=True, exist_ok=True)
        self.count = len(delayed_submissions)
        with contextlib.chdir(self.jobs_folder):
            pickles = []
            for submission in delayed_submissions:
                pickles.append(HERE / f"{uuid.uuid4().hex}.pkl")
                submission.set_timeout(round(60 * self.cluster.hours), self.max_num_timeout)
                submission.dump(pickles[-1])
            first = self._submit_command(self._submitit_command_str)
            ids = [f"{first.job_id}_{index}" for index in range(self.count)]
            jobs = [self.job_class(self.folder, job) for job in ids] if self.count > 1 else [first]
            for job, pickle in zip(jobs, pickles, strict=True):
                job.paths.move_temporary_file(pickle, "submitted_pickle")
            for link in HERE.glob(".submission_file_*.sh"):
                if link.is_symlink():  # Submitit's, to a path that only this process understands
                    link.unlink()
        return jobs

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        """Write the batch script: options, the user's setup, the runs, and what follows them."""
        options = dict(self.options)
        job = "%j"
        if self.count > 1:
            options["array"] = f"0-{self.count - 1}%{min(self.count, self.parallel)}"
            job = "%A_%a"
        options = {"output": f"{escaped(self.jobs_folder)}/%A/{job}_0_log.out"} | options
        for name in ("output", "error", "input"):  # a relative path of the user's
            if name in self.options and not str(options[name]).startswith("/"):
                options[name] = f"{escaped(self.launch_folder)}/{options[name]}"
        # relative: in a folder's name, srun would replace %t even if it is escaped
        log = f"--output=%A/{job}_%t_log.out"
        srun = ["srun", "--unbuffered", log, "--kill-on-bad-exit=1"]
        lines = ["#!/bin/bash", *(_option_line(*option) for option in sorted(options.items())), ""]
        start, jobs = (shlex.quote(str(path)) for path in (self.launch_folder, self.jobs_folder))
        lines += ["set -e", f"cd {start} || cd /tmp", *self.cluster.setup, *ENVIRONMENT]
        lines += [_threads(self.cluster), f"cd {jobs}", "set +e", ""]
        lines += [f"{shlex.join(srun)} {command}", "", *_teardown(self.jobs_folder)]
        return "\n".join(lines) + "\n"


class _OfflineExecutor(Executor):
    """An executor for machines without SLURM."""

    @classmethod
    def affinity(cls) -> int:
        return 1


def make_executor(
    cluster: ClusterConfig,
    store: Path,
    name: str,
    parallel: int,
    kind: type[Executor] = Executor,
    dependency: str | None = None,
) -> Executor:
    """Submitit's executor with the sbatch lines, setup and teardown of a job.

    Args:
        parallel: number of jobs of an array that run at once.
        dependency: jobs that this one waits for, as sbatch names them.
    """
    options = sbatch_options(cluster, name, dependency)
    return kind(cluster, (store / "slurm").resolve(), options, parallel)


def sbatch_options(
    cluster: ClusterConfig, name: str, dependency: str | None = None
) -> dict[str, Any]:
    """sbatch options of a job by long name; the user's replace ours, and false removes one."""
    minutes = max(1, round(60 * cluster.hours))
    options: dict[str, Any] = {
        "job-name": name,
        "time": minutes,
        # SLURM may signal a minute early: leave most of the time to training
        "signal": f"USR2@{min(cluster.signal_seconds, 15 * minutes)}",
        "nodes": cluster.nodes,
        "ntasks-per-node": cluster.processes,
        "cpus-per-task": cluster.cpus,
        "gpus-per-node": cluster.gpus or None,
        "mem": f"{cluster.mem_gb}GB" if cluster.mem_gb else None,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "open-mode": "append",
        "requeue": True,
        "kill-on-invalid-dep": "yes",
        "dependency": dependency,
    }
    user = dict(cluster.sbatch)
    for group in EXCLUSIVE:
        others = [key for key in group[1:] if user.get(key, False) is not False]
        if "gres" in others and not asks_for_gpus(user):
            others.remove("gres")
        if others:
            options.pop(group[0])
    if dependency and isinstance(user.get("dependency"), str):
        user["dependency"] = f"{dependency},{user['dependency']}"
    if user.get("requeue") is False:
        options["no-requeue"] = True  # without either, the cluster's default would apply
    options |= user
    removed = (None, False)
    return {k: v for k, v in options.items() if not any(v is none for none in removed)}


def escaped(path: Path) -> str:
    """A path as part of one of SLURM's file name patterns."""
    return str(path).replace("%", "%%")


def _option_line(name: str, value: Any) -> str:
    return f"#SBATCH --{name}" + ("" if value is True else f"={shlex.quote(str(value))}")


def _threads(cluster: ClusterConfig) -> str:
    """Shell line with one thread per core; idle threads that spin would take others' cores."""
    threads = f"${{OMP_NUM_THREADS:-${{SLURM_CPUS_PER_TASK:-{cluster.cpus}}}}}"
    return f"export OMP_NUM_THREADS={threads} OMP_WAIT_POLICY=PASSIVE"


def _teardown(folder: Path) -> list[str]:
    """Shell lines after srun: requeue a job that a signal killed, unless it is being cancelled."""
    killed = shlex.quote(str(folder)) + "/${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}/$SLURM_JOB_ID.killed"
    few_kills = f"[ $(cat {killed} 2>/dev/null | wc -l) -lt {KILLED_RETRIES} ]"
    is_running = '[ "$(squeue --noheader --jobs=$SLURM_JOB_ID --format=%T)" = RUNNING ]'
    requeue = (
        f"if [ $code -gt 128 ] && {few_kills} && {is_running} && echo $code >>{killed}; then"
        " scontrol requeue $SLURM_JOB_ID; fi"
    )
    return ["code=$?", requeue, "exit $code"]
