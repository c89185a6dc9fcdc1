"""Sweep files: a question, a base run and a grid, expanded into a list of resolved runs."""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from distill_bench.config.analysis.contrasts import (
    SAMPLING,
    ContrastConfig,
    Selectable,
    check_contrasts,
    contrast_terms,
)
from distill_bench.config.checks import check_guidance
from distill_bench.config.cluster import ClusterConfig, profiles_file, with_profile
from distill_bench.config.conditions import check_condition, holds
from distill_bench.config.errors import ConfigError
from distill_bench.config.identity import RUN_ID, canonical_text, group_id, run_id
from distill_bench.config.overrides import (
    apply_overrides,
    beside,
    check_run_keys,
    flat_keys,
    has_values,
    override_sweep,
    run_value,
)
from distill_bench.config.resolve import DEFAULT_TEACHER, resolve
from distill_bench.config.rows.row import ReleasedRow, RowConfig, released_rows, sampled_rows
from distill_bench.config.rows.sampling import SamplingConfig, further_samplings, own_sampling
from distill_bench.config.schema import RunConfig
from distill_bench.config.validation import StrictModel, validate
from distill_bench.config.yaml_files import load_yaml
from distill_bench.teachers.kinds import find_teacher

LABEL = "label"  # key of a cell that is not a key of its run
_MISSING = object()
# Values in conditions for keys that a cell omits; keys without a default are null.
DEFAULTS = {
    name: field.default
    for name, field in RunConfig.model_fields.items()
    if isinstance(field.default, (int, float, str))
}


@dataclass(frozen=True)
class CellLabel:
    """`label` of a cell of zip or include, and the dotted keys that it stands for."""

    text: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class _ResolvedCell:
    config: RunConfig  # with the default seed
    preset: str | None  # resolved runs do not record it
    label: CellLabel | None


class PlateauConfig(StrictModel):
    """`plateau`: when a row counts as converged."""

    window: float = Field(1 / 3, gt=0, lt=1)
    """Share of the training, from its end, over which the change of a score is judged."""
    tolerance: float = Field(1.0, gt=0)
    """Largest change, in standard deviations over seeds of the score at the end."""


class SweepConfig(StrictModel):
    """A sweep file."""

    name: str = Field(pattern=r"^\w[\w .-]*$")
    """Name of the results folder; by default the name of the file."""
    question: str
    """Question that the sweep answers; heads its report."""
    defaults: Any = None
    """Free space for YAML anchors; ignored."""
    base: dict[str, Any] = {}
    """Keys of a run, for all runs."""
    grid: dict[str, list[Any]] = {}
    """Dotted key: values; every combination is a cell."""
    zip: list[list[dict[str, Any]]] = []
    """Axes of keys that vary together; a single axis needs no outer list."""
    include: list[dict[str, Any]] = []
    """Cells in addition to the grid; `label` in a cell of zip or include names it in tables."""
    stages: dict[str, dict[str, Any]] = {}
    """Name: dotted keys, over `base`, of a run from whose student others start; see below."""
    exclude: list[str] = []
    """Conditions on dotted keys that remove cells, e.g. "method == 'a' and nfe > 2"."""
    seeds: int | list[int] = 1
    """Number of seeds, or the seeds, of every cell."""
    sampling: list[SamplingConfig] = []
    """Further ways to sample students, the untrained network and the teacher; see below."""
    rows: list[ReleasedRow] = []
    """Networks that were trained elsewhere, as further rows; see below."""
    baseline: dict[str, Any] | None = None
    """Dotted keys of the row that other rows are compared with; null: the first row."""
    contrasts: dict[str, ContrastConfig] = {}
    """Name: difference that the sweep is to show, declared before its runs; see below."""
    plateau: PlateauConfig = PlateauConfig()
    """Rule by which a row's score curves have reached a plateau; see below."""
    cluster: ClusterConfig = ClusterConfig()
    """Resources of the jobs."""

    @field_validator("zip", mode="before")
    @classmethod
    def _wrap_single_axis(cls, value: Any) -> Any:
        return zip_axes(value)

    def expand(self) -> list[RunConfig]:
        """Every run of the sweep, resolved, without duplicates."""
        return list(self.expand_by_id().values())

    def expand_by_id(self) -> dict[str, RunConfig]:
        """Every run of the sweep, resolved, by id.

        Raises:
            ConfigError: for a cell that cannot be run, or if no run is left.
        """
        empty = [key for key, values in self.grid.items() if not values]
        if empty:
            raise ConfigError(f"{self.name}: grid.{empty[0]} is empty: give at least one value")
        seeds = list(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds
        for cell in self._resolved_cells[:1]:
            for seed in seeds:  # other cells differ in nothing that could make a seed invalid
                validate(RunConfig, cell.config.model_dump(mode="json") | {"seed": seed}, "run")
        runs: dict[str, RunConfig] = {}
        # seeds outermost: a sweep that is stopped early has every row, with fewer seeds
        for seed in seeds:
            for cell in self._resolved_cells:
                config = self._with_seed(cell.config, seed)
                runs.setdefault(run_id(config), config)
        if not runs:
            raise ConfigError(
                f"{self.name}: the grid is empty: every cell is excluded, or there are no seeds"
            )
        self._check_baseline(runs.values())
        if self.contrasts:
            contrast_terms(self.contrasts, self._candidates(runs), self.name)
        return runs

    def untrained_rows(self, runs: Sequence[RunConfig]) -> dict[str, tuple[RowConfig, RunConfig]]:
        """Rows that train nothing, by id, each with one of the expanded runs (`rows.row`).

        Raises:
            ConfigError: if a row cannot be sampled.
        """
        scales = {f"rows: {row.name}: guidance_scale": row.guidance_scale for row in self.rows}
        stated = [scale for entry in self.sampling for scale in entry.guidance_scale]
        scales |= {f"sampling.guidance_scale {scale}": scale for scale in stated}
        for teacher in dict.fromkeys(config.teacher for config in runs):
            check_guidance(scales, find_teacher(teacher), teacher)
        return sampled_rows(self.sampling, runs) | released_rows(self.rows, runs[0])

    @cached_property
    def _resolved_cells(self) -> list[_ResolvedCell]:
        """The cells, each resolved once for all its seeds; `model_copy` must not follow."""
        stages = self._resolved_stages
        configs = {name: stage.config for name, stage in stages.items()}
        cells = [_resolved(data, label, configs) for data, label in self._unresolved()]
        return [*cells, *stages.values()]  # the first row, often the baseline, is not a stage

    @cached_property
    def _resolved_stages(self) -> dict[str, _ResolvedCell]:
        """The stages by name, each after the stage that it starts from."""
        stages: dict[str, _ResolvedCell] = {}
        for name in _in_order(self.stages):
            label = CellLabel(name, tuple(flat_keys(self.stages[name])))
            configs = {name: stage.config for name, stage in stages.items()}
            data = apply_overrides(self.base, self._stage_cell(name))
            stages[name] = _resolved(data, label, configs)
        return stages

    def _stage_cell(self, name: str) -> dict[str, Any]:
        """Dotted overrides of a stage, which does not start as `base` says."""
        return {"init": None} | self.stages[name]

    def _with_seed(self, config: RunConfig, seed: int) -> RunConfig:
        """A resolved run with another seed; a stage that it starts from has the same seed."""
        keys: dict[str, Any] = {"seed": seed}
        if config.init in self.stages:
            stage = self._with_seed(self._resolved_stages[config.init].config, seed)
            keys["init_run"] = run_id(stage)
        return config.model_copy(update=keys)

    def _candidates(self, runs: Mapping[str, RunConfig]) -> dict[str, Selectable]:
        """The runs, and their students sampled in further ways, as contrasts select them."""
        presets = self.presets()
        candidates = {}
        for run, config in runs.items():
            row = group_id(config)
            data = _with_preset(config, presets.get(row))
            further = further_samplings(self.sampling, config)
            own = {SAMPLING: own_sampling(config).model_dump()} if self.sampling else {}
            candidates[run] = Selectable(data | own, row)
            for way in further:
                sampled = data | {SAMPLING: way.model_dump()}
                place = f"{run}/samplings/{way.name}"
                candidates[place] = Selectable(sampled, f"{row}/{way.name}", as_trained=False)
        return candidates

    def _check_baseline(self, runs: Iterable[RunConfig]) -> None:
        """Raise ConfigError unless the baseline is one row, as the report requires."""
        if not self.baseline:
            return
        presets = self.presets()
        rows: dict[str, RunConfig] = {}
        for config in runs:
            row = group_id(config)
            if has_values(_with_preset(config, presets.get(row)), self.baseline):
                rows.setdefault(row, config)
        if not rows:
            raise ConfigError(
                f"{self.name}: no run matches the baseline {self.baseline}; "
                f"the runs have {_known_values(self.baseline, runs)}"
            )
        if len(rows) > 1:
            axes = self.axes(rows.values())
            varying = [key for key, values in axes.items() if len(values) > 1]
            raise ConfigError(
                f"{self.name}: the baseline {self.baseline} fits {len(rows)} rows, but must be "
                f"one; also give {' and '.join(varying) or 'the preset'}"
            )

    def cells(self) -> list[dict[str, Any]]:
        """Keys of each cell that is not excluded, and of each stage."""
        cells = [data for data, _ in self._unresolved()]
        stages = (self._stage_cell(name) for name in self.stages)
        return cells + [apply_overrides(self.base, stage) for stage in stages]

    def _unresolved(self) -> Iterator[tuple[dict[str, Any], CellLabel | None]]:
        """Keys of each cell that is not excluded, with its label in tables."""
        axes = [[{key: value} for value in values] for key, values in self.grid.items()]
        axes += self.zip
        grid = itertools.product(*axes) if axes or not self.include else []
        for parts in [*grid, *((cell,) for cell in self.include)]:
            cell = {key: value for part in parts for key, value in part.items() if key != LABEL}
            # unresolved: a cell may be excluded because it cannot be resolved
            data = apply_overrides(self.base, cell)
            known = apply_overrides(DEFAULTS, data) if self.exclude else data
            if not any(holds(condition, known) for condition in self.exclude):
                yield data, _cell_label(parts)

    def pipelines(self) -> tuple[list[str], list[str]]:
        """Names of teachers, and of the pipelines that students start from (`teachers.hub`)."""
        cells = self.cells()
        teachers = [str(cell.get("teacher", DEFAULT_TEACHER)) for cell in cells]
        students = [str(cell["student"]) for cell in cells if cell.get("student") is not None]
        return teachers, students

    def presets(self) -> dict[str, str]:
        """Group id -> preset of the group's cell; resolved runs do not record it."""
        return {group_id(cell.config): cell.preset for cell in self._resolved_cells if cell.preset}

    def labels(self) -> dict[str, CellLabel]:
        """Group id -> label of the group's cell, for cells with a `label`."""
        return {group_id(cell.config): cell.label for cell in self._resolved_cells if cell.label}

    def axes(self, runs: Iterable[RunConfig]) -> dict[str, list[Any]]:
        """Dotted key -> its values among the runs, for every key that varies except the seed."""
        cells = [*itertools.chain(*self.zip), *self.include]
        keys = dict.fromkeys([*self.grid, *(key for cell in cells for key in cell if key != LABEL)])
        return {key: _distinct_values(runs, key) for key in keys}


def load_sweep(path: Path, overrides: Mapping[str, Any] = {}) -> SweepConfig:
    """The sweep file at a path.

    Args:
        overrides: dotted keys of a run, which replace those of base and of every cell; also
            `cluster.KEY`, `seeds` and `name`.

    Raises:
        ConfigError: if the file cannot be read or is invalid.
    """
    data = load_yaml(path)
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: a sweep file is a mapping with question, base, grid, seeds; "
            f"found {type(data).__name__}"
        )
    data = beside(path.absolute().parent, data)
    data = override_sweep({"name": path.stem} | data, overrides, path)
    if "cluster" in data or profiles_file().is_file():
        data["cluster"] = with_profile(data.get("cluster") or {})
    sweep = validate(SweepConfig, data, str(path))
    _check_axes(sweep, path)
    for condition in sweep.exclude:
        check_condition(condition)
    check_contrasts(sweep.contrasts, str(path))
    return sweep


def _resolved(
    data: dict[str, Any], label: CellLabel | None, stages: Mapping[str, RunConfig]
) -> _ResolvedCell:
    method = data.get("method")
    preset = method.get("preset") if isinstance(method, dict) else None
    return _ResolvedCell(resolve(data, stages), preset, label)


def _with_preset(config: RunConfig, preset: str | None) -> dict[str, Any]:
    """Keys of a run, with the preset of its cell, which a resolved run does not record."""
    data = config.model_dump(mode="json")
    return data | {"method": {"preset": preset} | data["method"]}


def _cell_label(parts: Sequence[Mapping[str, Any]]) -> CellLabel | None:
    """Label of a cell made of parts, which stands for the keys of the parts that state one."""
    labelled = [part for part in parts if LABEL in part]
    keys = [key for part in labelled for key in flat_keys(part) if key != LABEL]
    text = ", ".join(part[LABEL] for part in labelled)
    return CellLabel(text, tuple(keys)) if labelled else None


def _in_order(stages: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names of stages, each after the stage that it starts from.

    Raises:
        ConfigError: if a stage has the form of a run's id, or stages start from each other.
    """
    for name in stages:
        if not name.strip() or RUN_ID.fullmatch(name):
            raise ConfigError(f"stages.{name}: a name is a text that is not the id of a run")
    ordered: list[str] = []
    waiting = dict(stages)
    while waiting:
        ready = [name for name, keys in waiting.items() if keys.get("init") not in list(waiting)]
        if not ready:
            raise ConfigError(
                f"stages {', '.join(waiting)} start from each other in a circle; leave `init` out "
                "of one of them"
            )
        ordered += ready
        waiting = {name: keys for name, keys in waiting.items() if name not in ready}
    return ordered


def zip_axes(value: Any) -> Any:
    """Axes of `zip`; a plain list of mappings becomes a single axis."""
    if isinstance(value, list) and any(isinstance(cell, dict) for cell in value):
        return [value]
    return value


def _distinct_values(runs: Iterable[RunConfig], key: str) -> list[Any]:
    """The values of a dotted key among runs; runs without the key do not count."""
    values: dict[str, Any] = {}
    for config in runs:
        value = run_value(config, key, missing=_MISSING)
        if value is not _MISSING:
            values.setdefault(canonical_text(value), value)
    return list(values.values())


def _known_values(keys: Mapping[str, Any], runs: Iterable[RunConfig]) -> str:
    """Values of keys among runs, as YAML: "ema 0.5 or null, nfe 4"."""
    known = {key: map(json.dumps, _distinct_values(runs, key)) for key in flat_keys(keys)}
    return ", ".join(f"{key} {' or '.join(values) or 'nowhere'}" for key, values in known.items())


def _check_axes(sweep: SweepConfig, path: Path) -> None:
    """Check that every key of the cells exists, varies along one axis, and is not the seed."""
    cells = [*itertools.chain(*sweep.zip), *sweep.include]
    for label in (cell[LABEL] for cell in cells if LABEL in cell):
        if not isinstance(label, str) or not label.strip():
            raise ConfigError(f"{path}: label is {label!r}: write a text, or leave it out")
    zipped = [
        list(dict.fromkeys(key for cell in axis for key in cell if key != LABEL))
        for axis in sweep.zip
    ]
    axes = [*sweep.grid, *itertools.chain(*zipped)]
    repeated = [key for key, count in Counter(axes).items() if count > 1]
    if repeated:
        raise ConfigError(
            f"{path}: {repeated[0]} is on two axes of grid and zip; a key can vary along only one"
        )
    keys = [*axes, *(key for cell in sweep.include for key in cell if key != LABEL)]
    keys += [key for stage in sweep.stages.values() for key in stage]
    if "seed" in [*sweep.base, *keys]:
        raise ConfigError(
            f"{path}: seed cannot be set per cell: give `seeds`, a number or a list, for all cells"
        )
    check_run_keys([*keys, *(sweep.baseline or {})], str(path))
