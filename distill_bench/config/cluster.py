"""`cluster` of a sweep file, and the user's cluster profiles."""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from distill_bench.config.errors import ConfigError
from distill_bench.config.validation import Count, StrictModel, validate
from distill_bench.config.yaml_files import load_yaml


def processes_per_node(runs_per_job: int, tasks: int | None, gpus: int) -> int:
    """Processes on a node: one if runs share a job, else `tasks`, or one per GPU."""
    return 1 if runs_per_job != 1 else tasks or max(1, gpus)


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
    """sbatch options by name, which replace those of the other keys; false removes an option."""

    @model_validator(mode="before")
    @classmethod
    def _follow_sbatch(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("sbatch"), dict):
            return data
        sbatch = canonical_options(data["sbatch"])
        return data | _stated_by(sbatch, data) | {"sbatch": sbatch}

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
        return processes_per_node(self.runs_per_job, self.tasks, self.gpus)

    def with_one_process(self) -> "ClusterConfig":
        """The same resources for a job of one process on one node."""
        sbatch = {k: v for k, v in self.sbatch.items() if k not in ("nodes", *_TASKS)}
        if isinstance(total := sbatch.get("gpus"), str | int) and total is not False:
            share = math.ceil(_count_gpus("gpus", total) / self.nodes)
            sbatch["gpus"] = re.sub(r"\d+$", str(share), str(total))
        return self.model_copy(update={"nodes": 1, "tasks": 1, "sbatch": sbatch})


# --- sbatch options ---

_SHORT = {
    "A": "account",
    "B": "extra-node-info",
    "C": "constraint",
    "D": "chdir",
    "F": "nodefile",
    "G": "gpus",
    "H": "hold",
    "J": "job-name",
    "L": "licenses",
    "M": "clusters",
    "N": "nodes",
    "Q": "quiet",
    "S": "core-spec",
    "W": "wait",
    "a": "array",
    "b": "begin",
    "c": "cpus-per-task",
    "d": "dependency",
    "e": "error",
    "i": "input",
    "k": "no-kill",
    "m": "distribution",
    "n": "ntasks",
    "o": "output",
    "p": "partition",
    "q": "qos",
    "s": "oversubscribe",
    "t": "time",
    "w": "nodelist",
    "x": "exclude",
}
_ALIASES = {"tasks-per-node": "ntasks-per-node", "cluster": "clusters", "workdir": "chdir"}
_REFUSED = {
    "array": "the sweep numbers its jobs; set cluster.jobs, the jobs at once",
    "clusters": "a sweep uses one cluster; start it where that cluster's sbatch is",
    "parsable": "the sweep reads the job's id from sbatch's message",
    "quiet": "the sweep reads the job's id from sbatch's message",
    "test-only": "use --dry-run",
    "wait": "use --wait of the sweep",
    "gpus-per-socket": "the sweep must know the GPUs of a node; set gpus-per-node",
    **dict.fromkeys(
        ("tres-per-job", "tres-per-node", "tres-per-socket", "tres-per-task"),
        "the sweep must know GPUs and CPUs; set gpus-per-node or gres, and cpus-per-task",
    ),
    "wrap": "the sweep writes the script; put shell lines into cluster.setup",
}
_TEXTS = ("partition", "account", "qos", "constraint")
_GPUS = ("gpus-per-node", "gpus", "gpus-per-task", "gres")
_TASKS = ("ntasks-per-node", "ntasks", "ntasks-per-gpu")
_CPUS = ("cpus-per-task", "cpus-per-gpu")
_MEMORY = ("mem", "mem-per-cpu", "mem-per-gpu")
_OTHERS = ("nodes", "time", "signal", "requeue", "no-requeue", "job-name", "output", "open-mode")
_KNOWN = {*_TEXTS, *_GPUS, *_TASKS, *_CPUS, *_MEMORY, *_OTHERS}
_OPTIONS_OF = {  # key of `cluster` -> the options that state it too
    **{key: (key,) for key in (*_TEXTS, "nodes")},
    "gpus": _GPUS,
    "tasks": _TASKS,
    "cpus": _CPUS,
    "mem_gb": _MEMORY,
    "hours": ("time",),
    "signal_seconds": ("signal",),
}
# the first option of a group replaces, and is replaced by, the others
EXCLUSIVE = (_GPUS, _TASKS, _CPUS, _MEMORY)


def canonical_options(sbatch: Mapping[str, Any]) -> dict[str, str | int | bool]:
    """sbatch options by their long names with hyphens; "p", "-p" and "--partition" are one option.

    Raises:
        ValueError: for an option given twice, abbreviated, without a value, or that breaks a sweep.
    """
    options: dict[str, str | int | bool] = {}
    for key, value in sbatch.items():
        name = key.strip().lstrip("-").replace("_", "-")
        name = _SHORT.get(name, name.lower())
        name = _ALIASES.get(name, name)
        if not isinstance(value, str | int) or value == "":
            raise ValueError(
                f"sbatch.{key} = {value!r}: expected text, an integer or true; false removes it"
            )
        if name in options:
            raise ValueError(f"sbatch.{key}: --{name} is given twice; give it once")
        if name in _REFUSED and value is not False:
            raise ValueError(f"sbatch.{key}: {_REFUSED[name]}")
        full = sorted(known for known in _KNOWN if known.startswith(name))
        if full and name not in full:
            raise ValueError(f"sbatch.{key} is abbreviated; write {' or '.join(full)}")
        options[name] = value
    if options.get("requeue") is True and options.get("no-requeue") is True:
        raise ValueError("sbatch: requeue and no-requeue exclude each other; give one of them")
    if options.pop("no-requeue", False):
        options["requeue"] = False
    return options


def _stated_by(sbatch: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of `cluster` that sbatch options state, so that the numbers of a job are known.

    Raises:
        ValueError: for an option that the sweep must know but cannot read.
    """
    given = {key: value for key, value in sbatch.items() if value is not False}
    flags = [key for key in given if key in _KNOWN - {"requeue"} and given[key] is True]
    if flags:
        raise ValueError(f"sbatch.{flags[0]} = true: it needs a value; false removes it")
    stated = {key: str(given[key]) if key in given else None for key in _TEXTS if key in sbatch}
    # each step reads the numbers that the steps before it have stated
    for step in (_nodes_and_tasks, _gpus, _cpus, _memory, _times):
        stated |= step(sbatch, given, {"nodes": 1, "gpus": 0, "cpus": 2} | data | stated)
    return stated


UNLIMITED_HOURS = 365.0 * 24  # of a job without a limit
_Options = Mapping[str, Any]  # all, those that are not false, or the keys of `cluster` so far


def _nodes_and_tasks(sbatch: _Options, given: _Options, keys: _Options) -> dict[str, Any]:
    stated: dict[str, Any] = {}
    nodes = keys["nodes"]
    if "nodes" in sbatch:
        nodes = stated["nodes"] = _integer("nodes", given.get("nodes", 1))
    if "ntasks-per-node" in given:
        stated["tasks"] = _integer("ntasks-per-node", given["ntasks-per-node"])
    elif "ntasks" in given:
        stated["tasks"] = _per_node("ntasks", given["ntasks"], nodes)
    elif "ntasks-per-node" in sbatch and "ntasks-per-gpu" not in given:
        stated["tasks"] = 1  # srun's default
    return stated


def _gpus(sbatch: _Options, given: _Options, keys: _Options) -> dict[str, Any]:
    stated: dict[str, Any] = {}
    gpus = _gpus_per_node(given, keys["nodes"], keys.get("tasks"))
    if gpus is not None or sbatch.get("gpus-per-node") is False:
        stated["gpus"] = gpus or 0
    if "ntasks-per-gpu" in given:
        share = _integer("ntasks-per-gpu", given["ntasks-per-gpu"])
        stated["tasks"] = share * max(1, stated.get("gpus", keys["gpus"]))
    return stated


def _processes(keys: _Options) -> int:
    return processes_per_node(keys.get("runs_per_job", 1), keys.get("tasks"), keys["gpus"])


def _cpus(sbatch: _Options, given: _Options, keys: _Options) -> dict[str, Any]:
    if "cpus-per-task" in sbatch:
        return {"cpus": _integer("cpus-per-task", given.get("cpus-per-task", 1))}
    if "cpus-per-gpu" in given:
        on_node = _integer("cpus-per-gpu", given["cpus-per-gpu"]) * keys["gpus"]
        return {"cpus": max(1, on_node // _processes(keys))}
    return {}


def _memory(sbatch: _Options, given: _Options, keys: _Options) -> dict[str, Any]:
    counts = {
        "mem": 1,
        "mem-per-cpu": keys["cpus"] * _processes(keys),
        "mem-per-gpu": keys["gpus"],
    }
    for key in _MEMORY:
        if key in given:
            gigabytes = math.ceil(_megabytes(key, given[key]) * counts[key] / 1024)
            return {"mem_gb": gigabytes or None}  # 0: all memory of the node
    return {"mem_gb": None} if "mem" in sbatch else {}


def _times(sbatch: _Options, given: _Options, keys: _Options) -> dict[str, Any]:
    stated: dict[str, Any] = {}
    if "time" in given:
        try:
            hours = slurm_hours(str(given["time"]))
        except ValueError as error:
            raise ValueError(f"sbatch.time = {error}") from error
        stated["hours"] = UNLIMITED_HOURS if hours is None else hours
    if "signal" in given:
        match = re.fullmatch(r"(?:R:)?(?:SIG)?USR2@([1-9]\d*)", str(given["signal"]))
        if match is None:
            raise ValueError(
                f"sbatch.signal = {given['signal']!r}: runs save on USR2 only; write USR2@SECONDS, "
                "or set cluster.signal_seconds"
            )
        stated["signal_seconds"] = int(match[1])
    return stated


def _gpus_per_node(given: Mapping[str, Any], nodes: int, tasks: int | None) -> int | None:
    """GPUs per node that sbatch options ask for; None if they name none."""
    if "gpus-per-node" in given:
        return _count_gpus("gpus-per-node", given["gpus-per-node"])
    if "gpus" in given:
        return _per_node("gpus", _count_gpus("gpus", given["gpus"]), nodes)
    if "gpus-per-task" in given:
        return _count_gpus("gpus-per-task", given["gpus-per-task"]) * (tasks or 1)
    if asks_for_gpus(given):
        parts = str(given["gres"]).split(",")
        names = [re.fullmatch(r"(?:gres[:/])?gpu(?::(.+))?", part.strip()) for part in parts]
        return sum(_count_gpus("gres", name[1] or 1) for name in names if name)
    return None


def asks_for_gpus(options: Mapping[str, Any]) -> bool:
    """True if `gres` of sbatch options names GPUs."""
    return re.search(r"(^|[,:/\s])gpu(\W|$)", str(options.get("gres", ""))) is not None


def _count_gpus(name: str, value: Any) -> int:
    """Number of GPUs in "2", "a100:2", "a100" (one) or "a100:2,v100:1"."""
    counts = [re.fullmatch(r"(?:[A-Za-z][\w.-]*)?:?(\d*)", part) for part in str(value).split(",")]
    if not all(counts):
        raise ValueError(f"sbatch.{name} = {value!r}: expected COUNT or TYPE:COUNT, e.g. a100:2")
    return sum(int(count[1] or 1) for count in counts if count)


def _integer(name: str, value: Any) -> int:
    if not re.fullmatch(r"[1-9]\d*", str(value)):
        raise ValueError(
            f"sbatch.{name} = {value!r}: expected an integer above 0, because the number of "
            "processes of a run depends on it"
        )
    return int(value)


def _per_node(name: str, value: Any, nodes: int) -> int:
    """Largest share of a node; SLURM itself refuses a total below the number of nodes."""
    return math.ceil(_integer(name, value) / nodes)


def _megabytes(name: str, value: Any) -> float:
    match = re.fullmatch(r"(\d+)([KMGT]?)B?", str(value).upper())
    if match is None:
        raise ValueError(f"sbatch.{name} = {value!r}: expected a size, e.g. 500M or 64G")
    return int(match[1]) * 1024 ** ("KMGT".index(match[2] or "M") - 1)


def slurm_hours(limit: str) -> float | None:
    """Hours of SLURM's MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS or DAYS-HOURS[:MINUTES...].

    None for no limit.

    Raises:
        ValueError: for another format.
    """
    if limit.upper() in ("0", "UNLIMITED", "INFINITE"):
        return None
    days, dash, clock = limit.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdecimal() for part in [*parts, days or "0"]) or len(parts) > 3:
        raise ValueError(f"{limit!r}: expected minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS")
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    seconds = sum(int(part) * unit for part, unit in zip(parts, units, strict=False))
    return (int(days or 0) * 86400 + seconds) / 3600


# --- profiles ---


def profiles_file() -> Path:
    """The user's file of cluster profiles, a mapping of names to settings; it may not exist."""
    default = "~/.config/distill-bench/clusters.yaml"
    # without a home, os.path leaves "~" in place, and the file does not exist
    return Path(os.path.expanduser(os.environ.get("DISTILL_BENCH_CLUSTERS", default)))


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
    own = {key: value for key, value in cluster.items() if key != "profile"}
    if isinstance(profile.get("sbatch"), dict):
        replaced = {option for key in own for option in _OPTIONS_OF.get(key, ())}
        options = canonical_options(profile["sbatch"]).items()
        profile = profile | {"sbatch": {k: v for k, v in options if k not in replaced}}
    return {**profile, **own}
