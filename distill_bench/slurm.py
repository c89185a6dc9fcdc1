"""Runs as a SLURM array through Submitit.

What became of them is read from the run folders and one `squeue`, never from Submitit, whose view hangs or lies.
"""

import contextlib
import logging
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import submitit
from submitit.helpers import clean_env

from distill_bench.config import ClusterConfig, ConfigError
from distill_bench.store import read_json, write_json


def available() -> bool:
    """Whether this machine belongs to a cluster: `sbatch` is there and configured (its controller may be down)."""
    if shutil.which("sbatch") is None:
        return False
    done = subprocess.run(["squeue", "--me", "--noheader"], capture_output=True, text=True)
    return "configuration source" not in done.stderr


def work(run_dir: str) -> int:
    """What one task of the array does; imported by name on the node."""
    from distill_bench.job import StopRequest, execute

    return execute(Path(run_dir), StopRequest())


def submit(run_dirs: Sequence[Path], cluster: ClusterConfig, store: Path) -> list[str]:
    """Submit one array over the run folders and return its job ids, in their order.

    The ids are also written into store/submissions/, one file a call, for `queued_runs`.

    Raises:
        ConfigError: if SLURM refuses the job.
    """
    logging.getLogger("submitit").setLevel(logging.ERROR)
    executor = submitit.SlurmExecutor(folder=store / "slurm" / "%A")
    optional = {key: getattr(cluster, key) for key in ("partition", "account", "qos", "constraint")}
    executor.update_parameters(
        job_name="distill-bench",
        time=max(1, round(60 * cluster.hours)),
        nodes=1,
        ntasks_per_node=1,
        cpus_per_task=cluster.cpus,
        mem=f"{cluster.mem_gb}GB",
        array_parallelism=cluster.jobs or 16,
        stderr_to_stdout=True,
        setup=["set -e", *cluster.setup, "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}"],
        srun_args=["--kill-on-bad-exit=1"],
        additional_parameters={"requeue": True, **cluster.sbatch},
        **({"gpus_per_node": cluster.gpus} if cluster.gpus else {}),
        **{key: value for key, value in optional.items() if value is not None},
    )
    try:
        with clean_env():
            jobs = executor.map_array(work, [str(run.resolve()) for run in run_dirs])
    except (submitit.core.utils.FailedJobError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"SLURM refused the job: {str(error).strip().splitlines()[-1]}") from error
    ids = [job.job_id for job in jobs]
    write_json(store / "submissions" / f"{ids[0]}.json", {"jobs": dict(zip([run.name for run in run_dirs], ids, strict=True))})
    return ids


def queued_runs(store: Path) -> set[str]:
    """Run ids that have a job in SLURM's queue.

    Raises:
        ConfigError: if the scheduler does not answer: then nothing is known, and nothing may be launched.
    """
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or "no message").splitlines()[-1]
        raise ConfigError(f"squeue does not answer ({said}), so nothing is launched; --cluster local runs on this machine")
    alive = set(done.stdout.split())
    queued = set()
    with contextlib.suppress(FileNotFoundError):
        for path in (store / "submissions").iterdir():
            jobs = (read_json(path) or {}).get("jobs", {})
            queued |= {run for run, job in jobs.items() if job in alive}
    return queued
