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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core import utils
from submitit.helpers import clean_env

from distill_bench.config.cluster import ClusterConfig
from distill_bench.config.errors import ConfigError
from distill_bench.store.files import text_lines, write_json
from distill_bench.store.runs import call_file
from distill_bench.store.stop import DRIVER
from distill_bench.sweep.slurm.node import do_runs, prepare_shared
from distill_bench.sweep.slurm.queue import SchedulerError, read_partition, scancel

JOBS_AT_ONCE = 16  # if cluster.jobs is not set
KILLED_RETRIES = 3  # of a job killed by a signal (lost rank, out of memory); requeues do not count

# srun does not inherit the CPUs per task in every SLURM version; idle OpenMP threads that spin
# would take the cores from other processes
ENVIRONMENT = [
    "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}",
    "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}} OMP_WAIT_POLICY=PASSIVE",
]


def submit(
    run_dirs: Sequence[Path],
    cluster: ClusterConfig,
    store: Path,
    prepare: Sequence[Path] = (),
    allow_changed_code: bool = False,
) -> list[str]:
    """Submit runs as arrays of at most MaxArraySize jobs; returns each run's job id.

    The ids are also recorded in store/submissions/, one file per array, for `queue.read_queue`.

    Args:
        prepare: runs whose shared artefacts a separate job makes first; the arrays wait for it.

    Raises:
        ConfigError: if SLURM refuses an array; arrays accepted before stay submitted.
    """
    logging.getLogger("submitit").setLevel(logging.ERROR)
    size = cluster.runs_per_job
    packs = [run_dirs[i : i + size] for i in range(0, len(run_dirs), size)]
    limit = read_partition(cluster.partition).max_array  # the largest index is one less
    arrays = [packs[i : i + limit] for i in range(0, len(packs), limit)]
    parallel = shares(cluster.jobs or JOBS_AT_ONCE, len(arrays))
    prepare_job = _submit_prepare(cluster, store, prepare) if prepare else None
    # afterany: if the prepare job fails, a run makes the artefacts itself or reports the reason
    after = {"dependency": f"afterany:{prepare_job}"} if prepare_job else {}
    ids: dict[Path, str] = {}
    for array, at_once in zip(arrays, parallel, strict=True):
        executor = make_executor(cluster, store, "distill-bench", at_once, **after)
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
        record = {"jobs": {run.name: job for run, job in accepted.items()}, **after}
        write_json(call_file(store / "submissions"), record)
        ids |= accepted
    return [ids[run] for run in run_dirs]


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


def _submit_prepare(cluster: ClusterConfig, store: Path, runs: Sequence[Path]) -> str:
    """Submit the prepare job, which always has one process."""
    single = cluster.model_copy(update={"nodes": 1, "tasks": 1})
    executor = make_executor(single, store, "distill-bench-prepare", 1)
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


def batch_script(cluster: ClusterConfig, store: Path) -> str:
    """The batch script of a job, for --dry-run; works without SLURM."""
    parallel = cluster.jobs or JOBS_AT_ONCE
    executor = make_executor(cluster, store, "distill-bench", parallel, kind=_OfflineExecutor)
    return executor._make_submission_file_text("python ...", "plan")


class _OfflineExecutor(submitit.SlurmExecutor):
    """An executor for machines without SLURM."""

    @classmethod
    def affinity(cls) -> int:
        return 1


def make_executor(
    cluster: ClusterConfig,
    store: Path,
    name: str,
    parallel: int,
    kind: type[submitit.SlurmExecutor] = submitit.SlurmExecutor,
    **more: str,
) -> submitit.SlurmExecutor:
    """Submitit's executor with the sbatch lines, setup and teardown of a job.

    Args:
        parallel: number of jobs of an array that run at once.
        more: further parameters of Submitit's executor.
    """
    executor = kind(folder=(store / "slurm" / "%A").resolve())
    executor.update_parameters(
        job_name=name,
        array_parallelism=parallel,
        stderr_to_stdout=True,
        setup=["set -e", *cluster.setup, *ENVIRONMENT, "set +e"],
        teardown=_teardown(store),
        srun_args=["--kill-on-bad-exit=1"],
        additional_parameters=_further_parameters(cluster),
        **_resources(cluster),
        **more,
    )
    return executor


def _resources(cluster: ClusterConfig) -> dict[str, Any]:
    """Time and resources of a job, as parameters of Submitit's executor."""
    minutes = max(1, round(60 * cluster.hours))
    resources = {
        "time": minutes,
        # SLURM may signal a minute early: leave most of the time to training
        "signal_delay_s": min(cluster.signal_seconds, 15 * minutes),
        "nodes": cluster.nodes,
        "ntasks_per_node": cluster.processes,
        "cpus_per_task": cluster.cpus,
        "gpus_per_node": cluster.gpus or None,
        "mem": f"{cluster.mem_gb}GB" if cluster.mem_gb else None,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
    }
    return {key: value for key, value in resources.items() if value is not None}


def _further_parameters(cluster: ClusterConfig) -> dict[str, Any]:
    """Parameters unknown to Submitit; the user's `sbatch` overrides them, false removes one."""
    parameters = {"requeue": True, "kill-on-invalid-dep": "yes", **cluster.sbatch}
    if parameters["requeue"] is False:
        parameters["no-requeue"] = True  # without either, the cluster's default would apply
    return {key: value for key, value in parameters.items() if value is not False}


def _teardown(store: Path) -> list[str]:
    """Shell lines after srun: requeue a job that a signal killed, unless it is being cancelled."""
    folder = shlex.quote(str((store / "slurm").resolve()))
    killed = folder + "/${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}/$SLURM_JOB_ID.killed"
    few_kills = f"[ $(cat {killed} 2>/dev/null | wc -l) -lt {KILLED_RETRIES} ]"
    is_running = '[ "$(squeue --noheader --jobs=$SLURM_JOB_ID --format=%T)" = RUNNING ]'
    requeue = (
        f"if [ $code -gt 128 ] && {few_kills} && {is_running} && echo $code >>{killed}; then"
        " scontrol requeue $SLURM_JOB_ID; fi"
    )
    return ["code=$?", requeue, "exit $code"]
