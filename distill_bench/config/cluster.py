"""`cluster` of a sweep file, and the user's cluster profiles."""

import os
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from distill_bench.config.errors import ConfigError
from distill_bench.config.validation import Count, StrictModel, validate
from distill_bench.config.yaml_files import load_yaml


class ClusterConfig(StrictModel):
    """`cluster`: resources and limits of jobs, or the name of a profile; not part of a run's id."""

    partition: str | None = None
    """SLURM partition."""
    account: str | None = None
    """SLURM account."""
    qos: str | None = None
    """SLURM quality of service."""
    constraint: str | None = None
    """SLURM constraint on nodes."""
    nodes: Count = 1
    """Nodes per job."""
    gpus: int = Field(0, ge=0)
    """GPUs per node."""
    tasks: int | None = Field(None, ge=1)
    """Processes per node that train one run together; null: one per GPU."""
    cpus: Count = 2
    """Cores per process."""
    mem_gb: Count | None = 8
    """Memory per node, in GB; null: the cluster's default, or the value in `sbatch`."""
    hours: float = Field(1.0, gt=0)
    """Time limit of a job, in hours."""
    runs_per_job: Count = 1
    """Small runs that share a job and its GPUs, side by side."""
    jobs: int | None = Field(None, ge=1)
    """Jobs at once; null: on this machine as many as fit its GPUs or cores, on SLURM 16."""
    signal_seconds: Count = 120
    """Seconds before the time limit at which runs are told to save."""
    setup: tuple[str, ...] = ()
    """Shell lines that run before each job."""
    sbatch: dict[str, str | int | bool] = {}
    """Further sbatch options by name; false removes an option."""

    @model_validator(mode="after")
    def _packed_runs_train_alone(self) -> "ClusterConfig":
        if self.runs_per_job > 1 and (self.nodes > 1 or (self.tasks or 1) > 1):
            raise ValueError(
                f"runs_per_job {self.runs_per_job} needs nodes 1 and tasks 1, "
                "because each run of a shared job is one process"
            )
        return self

    @property
    def processes(self) -> int:
        """Processes per node."""
        return 1 if self.runs_per_job > 1 else self.tasks or max(1, self.gpus)


def profiles_file() -> Path:
    """The user's file of cluster profiles, a mapping of names to settings; it may not exist."""
    default = "~/.config/distill-bench/clusters.yaml"
    return Path(os.environ.get("DISTILL_BENCH_CLUSTERS", default)).expanduser()


def with_profile(cluster: Any) -> Any:
    """Merge `cluster` of a sweep file with its profile; the sweep file's keys win.

    A string, or the key `profile`, names the profile. Without a name, the profile `default` is used
    if the user has one.

    Raises:
        ConfigError: if the profile is missing or malformed.
    """
    if isinstance(cluster, str):
        cluster = {"profile": cluster}
    if not isinstance(cluster, dict):
        return cluster
    path = profiles_file()
    profiles = (load_yaml(path) if path.is_file() else None) or {}
    if not isinstance(profiles, dict):
        raise ConfigError(
            f"{path}: profiles are a mapping of names to settings; found {type(profiles).__name__}"
        )
    name = cluster.get("profile", "default")
    if name not in profiles and "profile" in cluster:
        raise ConfigError(
            f"cluster.profile {name!r} is not in {path}; known: {', '.join(profiles) or 'none'}"
        )
    profile = profiles.get(name, {})
    if not isinstance(profile, dict):
        raise ConfigError(
            f"{path}: profile {name} = {profile!r}: a profile is a mapping of settings, "
            "for instance {partition: gpu}"
        )
    # validated separately, so that an error names the profile's file and not the sweep's
    validate(ClusterConfig, profile, f"{path}: profile {name}")
    return {**profile, **{key: value for key, value in cluster.items() if key != "profile"}}
