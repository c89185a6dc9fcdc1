"""TODO: config.sweep_file."""

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from distill_bench.config.conditions import check_condition, evaluate_expression
from distill_bench.config.errors import ConfigError, hint
from distill_bench.config.identity import group_id, method_label, run_id
from distill_bench.config.loading import load_yaml
from distill_bench.config.overrides import lookup, merge
from distill_bench.config.resolve import resolve
from distill_bench.config.schema import (
    AdapterConfig,
    ClusterConfig,
    ProtocolConfig,
    RunConfig,
    StrictModel,
    validate,
)

DEFAULTS = {
    k: f.default
    for k, f in RunConfig.model_fields.items()
    if isinstance(f.default, (int, float, str))
}


class SweepConfig(StrictModel):
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
        return zip_axes(value)

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
        if self.baseline and not any(has_values(config, self.baseline) for config in runs.values()):
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
                evaluate_expression(e, merge(DEFAULTS, merge(self.base, cell)))
                for e in self.exclude
            ):
                yield cell

    def pipelines(self) -> tuple[list[str], list[str]]:
        """Names of the teachers and of the students' pipelines that the cells use, for `teachers.hub.make_local`."""
        cells = [merge(self.base, cell) for cell in self.cells()]
        default = RunConfig.model_fields["teacher"].default
        teachers = [str(cell.get("teacher", default)) for cell in cells]
        students = [str(cell["student"]) for cell in cells if cell.get("student") is not None]
        return teachers, students

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
                data["zip"] = _without(zip_axes(data["zip"]), key)
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
    check_keys([*keys, *(sweep.baseline or {})], str(path))
    for condition in sweep.exclude:
        check_condition(condition)
    return sweep


def zip_axes(value: Any) -> Any:
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


def has_values(config: RunConfig, wanted: Mapping[str, Any]) -> bool:
    """Whether a run has the values of some dotted keys."""
    found = {key: lookup(config, key) for key in wanted}
    return all(
        found[key] == value or (key == "method" and method_label(found[key]) == value)
        for key, value in wanted.items()
    )


def check_keys(keys: list[str], where: str) -> None:
    nested = {"protocol": ProtocolConfig, "adapter": AdapterConfig}
    known = [
        *RunConfig.model_fields,
        *(f"{key}.{f}" for key, model in nested.items() for f in model.model_fields),
    ]
    for key in keys:
        if key not in known and not key.startswith("method."):
            raise ConfigError(f"{where}: unknown key {key!r} in the grid{hint(key, known)}")
