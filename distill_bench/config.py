"""The border: YAML and command lines become frozen, validated configs; a resolved config is a run's identity.

Unknown keys, wrong types and impossible combinations end in a `ConfigError` of one line that names the key, the value and
what is allowed, before anything runs.
"""

import ast
import dataclasses
import difflib
import hashlib
import importlib.util
import itertools
import json
import operator
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from distill_bench.registry import RegistryError, find_evaluator, find_method
from distill_bench.teacher import (
    check_parts,
    content_hash,
    frames_a_second,
    is_gaussian,
    is_outline,
    read_config,
    teacher_folder,
    unfit,
    weights_of,
)
from distill_bench.texts import prompts_hash, read_prompts

if TYPE_CHECKING:
    from distill_bench.method import Method  # torch takes seconds, `--status` has none

SCHEMA_VERSION = 1  # part of every run's identity: raise it when the meaning of a field changes


class ConfigError(ValueError):
    """Bad input; the message is one line for the reader."""


class MissingPackage(ConfigError):
    """A run that asks for a package which is not installed."""


def identity(
    default: Any = ..., *, counts: bool = True, came_later: bool = False, **constraints: Any
) -> Any:
    """A field of the schema that says whether it is part of a run's identity.

    Args:
        came_later: it counts only away from its default, which is what runs did before there was the field: they keep their ids.
    """
    return Field(
        default, json_schema_extra={"identity": counts, "came_later": came_later}, **constraints
    )


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Positive = Annotated[int, Field(ge=1)]


class ProtocolConfig(_Model):
    """How rows are sampled and scored; equal for every row of a table."""

    clips: int = identity(
        256, ge=2
    )  # two a prompt; below 256 distances are mostly bias (eval/README.md)
    seed: int = identity(1000, ge=0)
    teacher_steps: Positive = identity(32)
    teacher_guidance: float = identity(3.0, ge=0)
    # of the networks that sample, weights and passes; noise levels, latents and autoencoder stay in float32
    precision: Literal["float32", "bfloat16"] = identity("float32", came_later=True)
    fps: float = identity(
        8.0, gt=0, came_later=True
    )  # at which clips play; unsaid: the teacher's own, where it is known
    evaluators: tuple[str, ...] | None = identity(
        None, counts=False
    )  # None: every one that applies


class AdapterConfig(_Model):
    """Low-rank adapters (Hu et al., 2021): weight + alpha / rank * B A, of which A and B alone are trained."""

    rank: Positive = identity(32)
    alpha: float = identity(32.0, gt=0)
    targets: tuple[str, ...] = identity(
        ("to_q", "to_k", "to_v", "to_out.0"), min_length=1
    )  # ends of the names of linear layers


class RunConfig(_Model):
    """One run, resolved: `run.yaml`. Every field is equal between methods unless it is swept."""

    method: dict[str, Any] = identity()  # name and every field of the method
    method_version: int = identity(1)  # written on resolving
    teacher: str = identity("mini-wan", counts=False)  # counts by content
    teacher_hash: str = identity("")  # written on resolving
    student: str | None = identity(
        None, counts=False
    )  # a pipeline that student and fake score begin from; None: the teacher
    student_hash: str = identity("", came_later=True)  # written on resolving
    prompts: str | None = identity(
        None, counts=False
    )  # a file: `distill_bench.texts`; None: the teacher's prompts.txt
    prompts_hash: str = identity("", came_later=True)  # written on resolving
    seed: int = identity(0, ge=0)
    student_updates: Positive = identity(200)
    fake_score: Literal["trained", "exact"] = identity(
        "trained"
    )  # exact: in closed form, where the teacher offers it
    fake_score_updates: Positive | None = identity(
        5
    )  # a student update; None, written on resolving: there is none to train
    batch_size: Positive = identity(8)
    accumulation: Positive = identity(1)
    frames: Positive = identity(8)
    height: Positive = identity(32)
    width: Positive = identity(32)
    nfe: Positive = identity(4)
    shift: float = identity(2.0, gt=0)
    stepping: Literal["renoise", "ode"] = identity("renoise")
    exit_step: Literal["random", "last"] = identity("random")
    student_input: Literal["rollout", "real_data"] = identity(
        "rollout"
    )  # real_data: noised to one of the student's levels
    data: str | None = identity(
        None, counts=False
    )  # a folder of real clips; counts by content; None: see `distill_bench.extras`
    data_hash: str = identity("")  # written on resolving
    reuse_rollout: bool | Literal["graph"] = identity(
        False
    )  # by the first fake-score update; graph: with its forward, too
    guidance_scale: float = identity(3.0, ge=0)  # uncond + g (cond - uncond); 1 is none
    score_shift: float = identity(2.0, gt=0)
    sigma_min: float = identity(0.02, gt=0, lt=1)
    sigma_max: float = identity(0.98, gt=0, lt=1)
    student_lr: float = identity(1e-4, gt=0)
    fake_score_lr: float = identity(1e-4, gt=0)
    beta1: float = identity(0.0, ge=0, lt=1)
    beta2: float = identity(0.999, ge=0, lt=1)
    weight_decay: float = identity(0.0, ge=0)
    grad_clip: float = identity(10.0, gt=0)
    ema: float | None = identity(0.98, ge=0, lt=1)
    precision: Literal["float32", "bfloat16", "float64"] = identity("float32")
    evaluations: Positive = identity(
        4
    )  # evenly spaced student updates at which the student is kept and scored
    protocol: ProtocolConfig = identity(ProtocolConfig())
    checkpoint_every: Positive = identity(50, counts=False)
    log_every: Positive = identity(10, counts=False)
    signals_every: Positive | None = identity(
        20, counts=False
    )  # student updates; not part of a run's cost or seconds
    trackers: tuple[str, ...] = identity(("tensorboard",), counts=False)
    threads: int | None = identity(None, counts=False, ge=1)
    # how the networks are held and run; `distill-bench cost SWEEP --memory` says what each buys
    adapter: AdapterConfig | None = identity(
        None, came_later=True
    )  # of student and fake score; None: full weights
    weights: Literal["float32", "bfloat16"] = identity(
        "float32", came_later=True
    )  # bfloat16: masters are float32
    gradient_checkpointing: bool = identity(False, counts=False)
    guidance_forwards: Literal["batched", "sequential"] = identity("batched", counts=False)
    teacher_offload: bool = identity(
        False, counts=False
    )  # the teacher's weights stay in host memory between its uses
    sharding: bool = identity(
        False, counts=False
    )  # FSDP2: the processes of a run share each role's weights
    compile: bool = identity(
        False, came_later=True
    )  # the blocks by torch.compile: fewer kernels, other rounding


_DEFAULTS = {
    k: f.default
    for k, f in RunConfig.model_fields.items()
    if isinstance(f.default, (int, float, str))
}


class ClusterConfig(_Model):
    """Where and how jobs run: never part of a run's identity."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    nodes: Positive = 1
    gpus: int = Field(0, ge=0)  # a node
    tasks: int | None = Field(
        None, ge=1
    )  # processes a node that train a run together; None: one a GPU
    cpus: Positive = 2  # a process
    mem_gb: Positive | None = 8  # a node; None: the cluster's default, or what `sbatch` says
    hours: float = Field(1.0, gt=0)
    runs_per_job: Positive = 1  # small runs that share a job and its GPUs, side by side
    jobs: int | None = Field(
        None, ge=1
    )  # at once; None: the GPUs or cores of this machine, or 16 in an array
    signal_seconds: Positive = 120  # before the time limit, to save in
    setup: tuple[str, ...] = ()  # shell lines before each job
    sbatch: dict[
        str, str | int | bool
    ] = {}  # any further sbatch parameter; false: none of that name

    @model_validator(mode="after")
    def _packed_runs_train_alone(self) -> "ClusterConfig":
        if self.runs_per_job > 1 and (self.nodes > 1 or (self.tasks or 1) > 1):
            raise ValueError(
                f"runs_per_job {self.runs_per_job} needs nodes 1 and tasks 1: runs that share a job train alone"
            )
        return self

    @property
    def processes(self) -> int:
        """Processes a node."""
        return 1 if self.runs_per_job > 1 else self.tasks or max(1, self.gpus)


class SweepConfig(_Model):
    """A sweep file: a question, a base run, and what varies."""

    name: str = Field(pattern=r"^\w[\w .-]*$")  # of a folder of results
    question: str
    base: dict[str, Any] = {}
    grid: dict[str, list[Any]] = {}
    zip: list[
        list[dict[str, Any]]
    ] = []  # axes of keys that vary together; one axis may stand without its list
    include: list[dict[str, Any]] = []  # further cells beside the grid
    exclude: list[
        str
    ] = []  # expressions over dotted keys, for instance "method == 'a' and nfe > 2"
    seeds: int | list[int] = 1
    baseline: dict[str, Any] | None = (
        None  # keys and values of the row that differences are taken to; None: the first row
    )
    cluster: ClusterConfig = ClusterConfig()

    @field_validator("zip", mode="before")
    @classmethod
    def _one_axis(cls, value: Any) -> Any:
        return _zipped(value)

    def expand(self) -> list[RunConfig]:
        """Every run of the sweep, resolved, without duplicates, seed by seed.

        Raises:
            ConfigError: for a cell that cannot be run, or when nothing is left.
        """
        empty = [key for key, values in self.grid.items() if not values]
        if empty:
            raise ConfigError(f"{self.name}: grid.{empty[0]} is empty: give at least one value")
        seeds = list(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds
        runs: dict[str, RunConfig] = {}
        for seed in seeds:  # outermost: a sweep that is cut short has every row, of fewer seeds
            for cell in self.cells():
                config = resolve(merge(self.base, cell | {"seed": seed}))
                runs.setdefault(run_id(config), config)
        if not runs:
            raise ConfigError(
                f"{self.name}: the grid is empty: every cell is excluded or there are no seeds"
            )
        if self.baseline and not any(_is(config, self.baseline) for config in runs.values()):
            raise ConfigError(f"{self.name}: no run is the baseline {self.baseline}")
        return list(runs.values())

    def cells(self) -> Iterator[dict[str, Any]]:
        """The dotted overrides of each cell, without those that `exclude` names."""
        axes = [[{key: value} for value in values] for key, values in self.grid.items()]
        axes += self.zip
        grid = [
            {k: v for part in parts for k, v in part.items()} for parts in itertools.product(*axes)
        ]
        for cell in [*(grid if axes or not self.include else []), *self.include]:
            # not the resolved run: what is excluded may be what cannot be resolved
            if not any(
                evaluate_expression(e, merge(_DEFAULTS, merge(self.base, cell)))
                for e in self.exclude
            ):
                yield cell

    def presets(self) -> dict[str, str]:
        """Group of runs (`group_id`) -> the preset that its cell names: a reader calls it so; a run says only its fields."""
        merged = [merge(self.base, cell) for cell in self.cells()]
        named = [
            data
            for data in merged
            if isinstance(data.get("method"), dict) and data["method"].get("preset")
        ]
        return {group_id(resolve(data)): data["method"]["preset"] for data in named}

    def axes(self, runs: Iterable[RunConfig]) -> dict[str, list[Any]]:
        """What the sweep varies among its expanded runs: dotted key -> its values, in their order; the seed is no axis."""
        keys = dict.fromkeys(
            [
                *self.grid,
                *(k for cell in [*itertools.chain(*self.zip), *self.include] for k in cell),
            ]
        )
        values: dict[str, list[Any]] = {key: [] for key in keys}
        for config in runs:
            for key in keys:
                value = lookup(config, key)
                if value is not None and value not in values[key]:
                    values[key].append(value)
        return values


def load_sweep(path: Path, overrides: Mapping[str, Any] = {}) -> SweepConfig:  # noqa: B006 - never changed
    """The sweep file at `path` with `key=value` overrides laid over its base (or `cluster.key`, `seeds`, `name`)."""
    data = load_yaml(path)
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: a sweep file is a mapping with question, base, grid, seeds; found {type(data).__name__}"
        )
    data = {"name": path.stem} | data
    base = data.get("base") or {}
    if not isinstance(base, dict):
        raise ConfigError(f"{path}: base = {base!r}: a mapping of keys of a run to their values")
    for key, value in overrides.items():
        if key in ("seeds", "name"):
            data[key] = value
        elif key.startswith("cluster."):
            cluster = data.get("cluster") or {}
            cluster = {"profile": cluster} if isinstance(cluster, str) else cluster
            data["cluster"] = {**cluster, key.removeprefix("cluster."): value}
        else:
            base = merge(base, {key: value})
            data["grid"] = {k: v for k, v in (data.get("grid") or {}).items() if k != key}
            if "zip" in data:
                data["zip"] = _without(_zipped(data["zip"]), key)
    data["base"] = base
    if "cluster" in data or _profiles_path().is_file():
        data["cluster"] = _with_profile(data.get("cluster") or {})
    sweep = validate(SweepConfig, data, str(path))
    zipped = [list(dict.fromkeys(key for cell in axis for key in cell)) for axis in sweep.zip]
    keys = [
        *sweep.grid,
        *(key for cell in sweep.include for key in cell),
        *itertools.chain(*zipped),
    ]
    twice = [key for key, n in Counter([*sweep.grid, *itertools.chain(*zipped)]).items() if n > 1]
    if twice:
        raise ConfigError(
            f"{path}: {twice[0]} is on two axes of grid and zip: it can vary along one"
        )
    if "seed" in [*sweep.base, *keys]:
        raise ConfigError(
            f"{path}: seed is no key of a cell: every cell is run with each of `seeds`, a number or a list"
        )
    _check_keys([*keys, *(sweep.baseline or {})], str(path))
    for condition in sweep.exclude:
        check_condition(condition)
    return sweep


def _zipped(value: Any) -> Any:
    """The axes of `zip`: a list of mappings is one axis."""
    return (
        [value]
        if isinstance(value, list) and any(isinstance(cell, dict) for cell in value)
        else value
    )


def _without(axes: Any, key: str) -> Any:
    """The axes of `zip` without a key; what is no axis is left for validation to name."""
    if not isinstance(axes, list) or not all(isinstance(axis, list) for axis in axes):
        return axes
    return [
        [{k: v for k, v in c.items() if k != key} if isinstance(c, dict) else c for c in axis]
        for axis in axes
    ]


def override(text: str) -> tuple[str, Any]:
    """`key=value` of a command line."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {text!r}: write key=value")
    return key.strip(), parse_yaml(value)


def evaluated_updates(config: RunConfig) -> list[int]:
    """The student updates at which a run's student is kept and scored; the last is the end of the run."""
    n = config.evaluations
    return sorted({-(-config.student_updates * i // n) for i in range(1, n + 1)})


def _profiles_path() -> Path:
    return Path(
        os.environ.get("DISTILL_BENCH_CLUSTERS", "~/.config/distill-bench/clusters.yaml")
    ).expanduser()


def _with_profile(cluster: Any) -> Any:
    """`cluster:` laid over the profile that it names, by default over the profile `default` where there is one.

    Profiles are the user's, in one file (DISTILL_BENCH_CLUSTERS), so that a sweep moves between clusters unchanged.
    """
    if isinstance(cluster, str):
        cluster = {"profile": cluster}
    if not isinstance(cluster, dict):
        return cluster
    path = _profiles_path()
    profiles = (load_yaml(path) if path.is_file() else None) or {}
    if not isinstance(profiles, dict):
        raise ConfigError(
            f"{path}: profiles are a mapping of names to settings of a cluster; found {type(profiles).__name__}"
        )
    name = cluster.get("profile", "default")
    if name not in profiles and "profile" in cluster:
        raise ConfigError(
            f"cluster.profile {name!r} is not in {path}; known: {', '.join(profiles) or 'none'}"
        )
    profile = profiles.get(name, {})
    if not isinstance(profile, dict):
        raise ConfigError(
            f"{path}: profile {name} = {profile!r}: a mapping of settings, for instance {{partition: gpu}}"
        )
    validate(
        ClusterConfig, profile, f"{path}: profile {name}"
    )  # what is wrong here is not the sweep's fault
    return {**profile, **{key: value for key, value in cluster.items() if key != "profile"}}


def load_run(run_dir: Path) -> RunConfig:
    """The resolved config of a run folder."""
    path = run_dir / "run.yaml"
    if not path.is_file():
        raise ConfigError(
            f"no run at {run_dir}: it has no run.yaml (folders of runs lie under runs/)"
        )
    return validate(RunConfig, load_yaml(path), str(path))


def resolve(data: Mapping[str, Any]) -> RunConfig:
    """A run with every default written out: those of the schema, of the method, and the teacher's content hash."""
    method = data.get("method")
    if method is None:
        raise ConfigError(
            "method is missing: name one, for instance `method: NAME` (see `distill-bench list`)"
        )
    fields = {"name": method} if not isinstance(method, dict) else method
    if not isinstance(fields.get("name"), str):
        raise ConfigError(f"method.name is {fields.get('name')!r}: it must name a method")
    try:
        method_class = find_method(fields["name"])
        folder = teacher_folder(str(data.get("teacher", "mini-wan")))
        fps = frames_a_second(folder)
    except (RegistryError, ValueError) as error:
        raise ConfigError(str(error)) from error
    data = _with_preset(method_class, dict(data) | {"method": fields})
    fields = data["method"]
    instance = _method(method_class, {k: v for k, v in fields.items() if k != "name"})
    data["method"] = {"name": fields["name"]} | dataclasses.asdict(instance)
    data["method_version"], data["teacher_hash"] = method_class.version, content_hash(folder)
    if fps is not None and isinstance(data.get("protocol", {}), dict):
        data["protocol"] = {"fps": fps} | data.get("protocol", {})
    student = _student(data)
    data["student_hash"] = "" if student is None else content_hash(student / "transformer")
    data["prompts_hash"] = (
        "" if data.get("prompts") is None else _prompts_hash(folder, Path(str(data["prompts"])))
    )
    data["data_hash"] = "" if data.get("data") is None else _clips_hash(Path(data["data"]))
    if not method_class.has_fake_score or data.get("fake_score") == "exact":
        data["fake_score_updates"] = None
    config = validate(RunConfig, data, "run")
    if (
        config.fake_score_updates is None
        and method_class.has_fake_score
        and config.fake_score == "trained"
    ):
        raise ConfigError(
            "fake_score_updates is null: give a number, or `fake_score: exact` where the teacher offers it"
        )
    if config.fake_score_updates is None and len(instance.modules(8)):
        why = "has modules of its own, which are trained in the fake score's updates, and the run has none"
        raise ConfigError(
            f"fake_score {config.fake_score!r}: {fields['name']} {why}; `fake_score: trained`"
        )
    if config.reuse_rollout == "graph" and not method_class.shares_graph:
        raise ConfigError(
            f"reuse_rollout 'graph': {fields['name']} needs a forward of its own for the fake score; true or false"
        )
    for package in sorted(instance.packages):
        if importlib.util.find_spec(package) is None:
            raise MissingPackage(
                f"method {config.method} needs the package {package!r}: pip install {package}"
            )
    if config.fake_score == "exact" and method_class.has_fake_score and not is_gaussian(folder):
        raise ConfigError(
            f"fake_score 'exact': teacher {config.teacher!r} has none in closed form; `teacher: gaussian` has"
        )
    _check_named(config)
    try:
        check_parts(folder, student)
        why = unfit(folder, config.frames, config.height, config.width, student)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if why is not None:
        raise ConfigError(why)
    if student is not None and len(instance.modules(8)) and _width(folder) != _width(student):
        raise ConfigError(
            f"student {config.student}: {fields['name']} has heads on features of width {_width(folder)}, the teacher's; the "
            f"student's are of {_width(student)}"
        )
    if config.prompts is None and not is_outline(folder):
        _check_prompts(config.teacher, folder / "prompts.txt")
    if config.sigma_min >= config.sigma_max:
        raise ConfigError(
            f"sigma_min {config.sigma_min} must be below sigma_max {config.sigma_max}"
        )
    if config.batch_size % config.accumulation:
        raise ConfigError(
            f"batch_size {config.batch_size} must be a multiple of accumulation {config.accumulation}"
        )
    _check_held(config, folder, method_class)
    if (
        config.fake_score_updates is None
    ):  # what says how a fake score is trained is no part of a run that trains none
        kind = config.fake_score if method_class.has_fake_score else "trained"
        config = config.model_copy(update={"fake_score": kind, "reuse_rollout": False})
    return config


def _student(data: Mapping[str, Any]) -> Path | None:
    """The folder that a run's student begins from, where it is not the teacher's."""
    try:
        return None if data.get("student") is None else teacher_folder(str(data["student"]))
    except ValueError as error:
        raise ConfigError(f"student: {error}") from error


def _width(folder: Path) -> int:
    config = read_config(folder / "transformer")
    return config["num_attention_heads"] * config["attention_head_dim"]


def _check_prompts(teacher: str, path: Path) -> None:
    """ConfigError where a teacher has no prompts of its own."""
    if not path.is_file():
        raise ConfigError(
            f"teacher {teacher} has no prompts.txt: name a file of prompts in the key `prompts`"
        )
    try:
        read_prompts(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _prompts_hash(teacher: Path, prompts: Path) -> str:
    if is_gaussian(teacher):
        raise ConfigError(f"prompts {prompts}: a gaussian teacher has prompts of its own")
    try:
        return prompts_hash(prompts)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_held(config: RunConfig, folder: Path, method_class: "type[Method]") -> None:
    """ConfigError for a way to hold the networks that the run cannot have."""
    if config.weights == "bfloat16" and config.precision != "bfloat16":
        raise ConfigError(
            f"weights 'bfloat16' needs precision 'bfloat16', not {config.precision!r}"
        )
    held = ("adapter", "gradient_checkpointing", "sharding", "teacher_offload", "compile")
    asked = [key for key in held if getattr(config, key)] + ["weights"] * (
        config.weights != "float32"
    )
    asked += ["protocol.precision"] * (config.protocol.precision != "float32")
    if is_gaussian(folder) and asked:
        raise ConfigError(f"{asked[0]} needs a transformer: the teacher {config.teacher!r} is none")
    if is_gaussian(folder) and method_class.mixes_weights:
        raise ConfigError(
            f"teacher {config.teacher!r}: {config.method['name']} averages weights of two roles, which are networks of two kinds "
            "there; name a transformer"
        )
    if config.adapter and method_class.mixes_weights:
        raise ConfigError(
            f"adapter: {config.method['name']} averages weights of two roles, and products of factors do not average"
        )
    if config.adapter:
        _check_targets(config.adapter, folder)
    for key, other in (
        ("sharding", "adapter"),
        ("teacher_offload", "adapter"),
        ("student", "adapter"),
    ):
        if getattr(config, key) and getattr(config, other):
            raise ConfigError(
                f"{key} with {other}: one set of base weights serves all roles; leave {key} out"
            )
    for key in ("adapter", "sharding", "teacher_offload"):
        if config.compile and getattr(config, key):
            raise ConfigError(
                f"compile with {key}: blocks that change between forwards would be compiled again; leave one out"
            )
    if config.compile and config.reuse_rollout == "graph":
        raise ConfigError(
            "compile with reuse_rollout 'graph': a compiled backward runs once for a forward; reuse_rollout true"
        )
    if config.sharding and config.reuse_rollout == "graph":
        raise ConfigError(
            "sharding with reuse_rollout 'graph': shards are gathered for one phase at a time; reuse_rollout true"
        )


def _check_targets(adapter: AdapterConfig, folder: Path) -> None:
    """ConfigError for the name of no layer: peft passes over it where there is another that it finds."""
    shapes = weights_of(folder / "transformer").items()
    layers = [
        name.removesuffix(".weight")
        for name, shape in shapes
        if name.endswith(".weight") and len(shape) > 1
    ]
    for target in adapter.targets if layers else ():
        if not any(f".{layer}".endswith(f".{target}") for layer in layers):
            ends = sorted(
                {re.sub(r"^\w+\.\d+\.", "", layer) for layer in layers}
            )  # without the block
            raise ConfigError(
                f"adapter.targets {target}: no layer is called so; linear layers end in: {', '.join(ends)}"
            )


def _check_named(config: RunConfig) -> None:
    """ConfigError for an evaluator or a tracker that is not there: a job would find out when its training is done, or never."""
    try:
        for name in config.protocol.evaluators or ():
            find_evaluator(name)
    except RegistryError as error:
        raise ConfigError(f"protocol.evaluators: {error}") from error
    if set(config.trackers) - {"tensorboard"}:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

        here = [str(tracker) for tracker in get_available_trackers()]
        for name in config.trackers:
            if name not in here:
                why = (
                    "is not installed"
                    if name in LOGGER_TYPE_TO_CLASS
                    else "is none of accelerate's"
                )
                raise ConfigError(f"trackers: {name!r} {why}; here: {', '.join(here)}")


def _with_preset(method_class: "type[Method]", data: dict[str, Any]) -> dict[str, Any]:
    """The run with the preset of its method written out, under everything that is stated in the run itself."""
    fields = dict(data["method"])
    name = fields.pop("preset", None)
    if name is None:
        return data
    preset = method_class.presets.get(name) if isinstance(name, str) else None
    if preset is None:
        known = ", ".join(method_class.presets) or "none"
        raise ConfigError(
            f"method.preset is {name!r}: {fields['name']} has no such preset; known: {known}"
        )
    written = merge({"method": {"name": fields["name"]}}, preset.overrides)
    return written | data | {"method": written["method"] | fields}


def _clips_hash(folder: Path) -> str:
    """A digest of a folder of clips (12 digits)."""
    files = [folder / "clips.npy", folder / "manifest.jsonl"]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ConfigError(f"data {folder} is no folder of clips: it lacks {', '.join(missing)}")
    return hashlib.sha256(
        b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)
    ).hexdigest()[:12]


def method_of(config: RunConfig) -> "Method":
    """The method of a run, with its hyper-parameters."""
    fields = dict(config.method)
    return _method(find_method(fields.pop("name")), fields)


def method_label(name: str) -> str:
    """A method's name as it stands in ids and tables: the file's or the class's own for `path/file.py:Class`."""
    return name.rpartition(":")[2].lower() if ":" in name else name


def run_id(config: RunConfig) -> str:
    """`<method>-s<seed>-<hash>`: the hash is of the resolved config, never of its difference from defaults."""
    return f"{method_label(config.method['name'])}-s{config.seed}-{_digest(identity_of(config))}"


def called(config: RunConfig, presets: Mapping[str, str]) -> str:
    """What a reader calls a run's method: its name and, of `SweepConfig.presets`, its preset."""
    return " ".join(filter(None, [config.method["name"], presets.get(group_id(config))]))


def group_id(config: RunConfig) -> str:
    """The identity without the seed: what a table aggregates over."""
    return _digest({k: v for k, v in identity_of(config).items() if k != "seed"})


def identity_of(config: BaseModel) -> dict[str, Any]:
    """The fields that count, nested models likewise."""
    fields = {}
    for name, field in type(config).model_fields.items():
        value, about = getattr(config, name), field.json_schema_extra
        if about["identity"] and not (about["came_later"] and value == field.default):
            fields[name] = identity_of(value) if isinstance(value, BaseModel) else value
    return fields


def cost_key(config: RunConfig) -> str:
    """Runs that cost the same a student update: alike but for seed, length, prompts, optimiser and protocol."""
    unlike = {
        "seed",
        "student_updates",
        "student_lr",
        "fake_score_lr",
        "beta1",
        "beta2",
        "weight_decay",
        "grad_clip",
        "protocol",
    }
    unlike.add("prompts_hash")
    return _digest({key: value for key, value in identity_of(config).items() if key not in unlike})


def _digest(value: Any) -> str:
    text = json.dumps([SCHEMA_VERSION, _canonical(value)], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _canonical(value: Any) -> Any:
    """1.0 and 1 are equal, True and 1 are not, tuples are lists."""
    if isinstance(value, dict):
        return {str(k): _canonical(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(v) for v in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def lookup(config: RunConfig, key: str) -> Any:
    """The value of a dotted key of a run; `method` is its name; None where the run has no such key."""
    value: Any = config.model_dump(mode="json")
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value["name"] if key == "method" else value


def _is(config: RunConfig, wanted: Mapping[str, Any]) -> bool:
    """Whether a run has the values of some dotted keys."""
    found = {key: lookup(config, key) for key in wanted}
    return all(
        found[key] == value or (key == "method" and method_label(found[key]) == value)
        for key, value in wanted.items()
    )


def merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with dotted keys laid over it; `method: name` is the same as `method.name: name`."""
    merged = json.loads(json.dumps(base))
    for key, value in overrides.items():
        *parents, leaf = key.split(".")
        at = merged
        for part in parents:
            if isinstance(at.get(part), str) and part == "method":
                at[part] = {"name": at[part]}
            at = at.setdefault(part, {})
        if key == "method" and isinstance(value, str) and isinstance(at.get("method"), dict):
            at["method"]["name"] = value
        else:
            at[leaf] = value
    return merged


def _method(method_class: "type[Method]", fields: dict[str, Any]) -> "Method":
    known = [f.name for f in dataclasses.fields(method_class)]
    for key in fields:
        if key not in known:
            raise ConfigError(
                f"method.{key}: {method_class.__name__} has no such field{_hint(key, known)}"
            )
        try:
            json.dumps(fields[key], allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"method.{key} = {fields[key]!r}: {error}") from error
    try:  # as `validate` does: "0.2" and true are no numbers, 8.0 is no integer
        return TypeAdapter(method_class).validate_json(json.dumps(fields), strict=True)
    except ValidationError as error:
        raise ConfigError(_one_line(error, "method")) from error


def _check_keys(keys: list[str], where: str) -> None:
    nested = {"protocol": ProtocolConfig, "adapter": AdapterConfig}
    known = [
        *RunConfig.model_fields,
        *(f"{key}.{f}" for key, model in nested.items() for f in model.model_fields),
    ]
    for key in keys:
        if key not in known and not key.startswith("method."):
            raise ConfigError(f"{where}: unknown key {key!r} in the grid{_hint(key, known)}")


def validate(model: type[BaseModel], data: Any, where: str) -> Any:
    """`data` as a `model`, or a ConfigError of one line."""
    try:
        # through JSON: lists are tuples there, while "fast" is still no number and 5.5 no integer
        return model.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise ConfigError(_one_line(error, where, model)) from error
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error


def _one_line(error: ValidationError, where: str, model: type[BaseModel] | None = None) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden" and model is not None:
        at = model
        for part in first["loc"][:-1]:
            annotation = at.model_fields[part].annotation
            at = next(
                kind
                for kind in (annotation, *get_args(annotation))
                if hasattr(kind, "model_fields")
            )
        return f"{where}: unknown key {key!r}{_hint(str(first['loc'][-1]), list(at.model_fields))}"
    msgs, (*parents, last) = [first["msg"]], first["loc"] or [""]
    if re.fullmatch(
        r"bool|int|float|str|literal\[.*\]", str(last)
    ):  # one kind of several that the key may have
        key = ".".join(map(str, parents))
        msgs = [each["msg"] for each in error.errors() if list(each["loc"][:-1]) == parents]
    said = " or ".join([msgs[0], *(msg.removeprefix("Input should be ") for msg in msgs[1:])])
    said = said.removeprefix("Value error, ").replace("a valid boolean", "true or false")
    if not key:  # of several fields together
        return f"{where}: {said}"
    given = "" if first["type"] == "missing" else f" = {first['input']!r}"
    return f"{where}: {key}{given}: {said}"


def _hint(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else f"; known: {', '.join(known)}"


class _Loader(yaml.SafeLoader):
    """YAML with the numbers and booleans of YAML 1.2, and duplicate keys refused."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, regexp)
        for tag, regexp in pairs
        if tag.rsplit(":", 1)[1] not in {"bool", "int", "float", "timestamp"}
    ]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _first in (
    ("bool", r"^(?:true|false)$", "tf"),
    ("int", r"^[-+]?[0-9]+$", "-+0123456789"),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    keys = [loader.construct_object(key) for key, _ in node.value]
    twice = [key for key in keys if keys.count(key) > 1]
    if twice:
        raise yaml.constructor.ConstructorError(
            None, None, f"key {twice[0]!r} stands twice", node.start_mark
        )
    return {
        key: loader.construct_object(value, deep=True)
        for key, (_, value) in zip(keys, node.value, strict=True)
    }


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(node.value))


def load_yaml(path: Path) -> Any:
    """The YAML of a file.

    Raises:
        ConfigError: if it cannot be read or is no YAML.
    """
    try:
        return parse_yaml(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or error}"
        ) from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse_yaml(text: str) -> Any:
    """The YAML in a string, as `load_yaml`."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a subclass of SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"not YAML{where}: {getattr(error, 'problem', None) or 'unreadable'}"
        ) from error


_COMPARE = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}


def check_condition(text: str) -> None:
    """ConfigError where an expression names a key that no run has: it would hold for none, and say nothing.

    What is wrong with its form is said when it is evaluated.
    """
    try:
        names = [
            node.id for node in ast.walk(ast.parse(text, mode="eval")) if isinstance(node, ast.Name)
        ]
    except SyntaxError as error:
        raise ConfigError(f"cannot evaluate {text!r}: {error.msg}") from error
    for name in names:
        if name not in RunConfig.model_fields:
            raise ConfigError(
                f"{text!r}: unknown key {name!r}{_hint(name, list(RunConfig.model_fields))}"
            )


def evaluate_expression(text: str, data: Mapping[str, Any]) -> bool:
    """A condition over dotted keys, literals, comparisons, `and`, `or`, `not`; nothing else is run."""

    def value(node: ast.AST) -> Any:
        match node:
            case ast.Expression():
                return value(node.body)
            case ast.Constant():
                return node.value
            case ast.List() | ast.Tuple():
                return [value(e) for e in node.elts]
            case ast.Name():
                found = data.get(node.id)
                return (
                    found.get("name") if node.id == "method" and isinstance(found, dict) else found
                )
            case ast.Attribute():
                found = (
                    data.get(node.value.id)
                    if isinstance(node.value, ast.Name)
                    else value(node.value)
                )
                return found.get(node.attr) if isinstance(found, dict) else None
            case ast.BoolOp():
                return (all if isinstance(node.op, ast.And) else any)(value(v) for v in node.values)
            case ast.UnaryOp(op=ast.Not()):
                return not value(node.operand)
            case ast.Compare():
                terms = [value(node.left), *(value(c) for c in node.comparators)]
                pairs = zip(node.ops, terms[:-1], terms[1:], strict=True)
                return all(_COMPARE[type(op)](a, b) for op, a, b in pairs)
        raise ConfigError(
            f"{text!r} may hold keys, literals, comparisons, and, or, not; not {type(node).__name__}"
        )

    try:
        return bool(value(ast.parse(text, mode="eval")))
    except (SyntaxError, TypeError) as error:
        raise ConfigError(f"cannot evaluate {text!r}: {error}") from error
