"""A sweep expanded over a store: its runs by id, and the manifest that records them."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from distill_bench import ROOT
from distill_bench.config.conditions import check_condition, holds
from distill_bench.config.errors import ConfigError
from distill_bench.config.identity import default_title, group_id, short_name
from distill_bench.config.protocol import protocol, protocol_hash
from distill_bench.config.resolve import absolute_paths
from distill_bench.config.rows.row import ROW_FILE, RowConfig
from distill_bench.config.rows.sampling import Sampling, further_samplings
from distill_bench.config.schema import RunConfig
from distill_bench.config.sweep_file import SweepConfig
from distill_bench.config.yaml_files import dump_yaml
from distill_bench.registry import find_method
from distill_bench.store.claims import attempts
from distill_bench.store.failures import failure_kind, os_error
from distill_bench.store.files import read_record, unwritable, write_bytes, write_json
from distill_bench.store.launches import record_launch
from distill_bench.store.nested import describe_differences
from distill_bench.store.runs import read_result, record_error, run_state
from distill_bench.sweep.slurm.queue import Queue
from distill_bench.sweep.status import ManifestEntry
from distill_bench.teachers.prompts import FILE_PREFIX


@dataclass(frozen=True)
class OpenSweep:
    """The runs of a sweep file in a store, by id, and its rows that train nothing."""

    config: SweepConfig
    runs: dict[str, RunConfig]
    store: Path
    out: Path
    # each with a run that states its teacher, sizes and protocol
    rows: dict[str, tuple[RowConfig, RunConfig]] = dataclasses.field(default_factory=dict)
    # runs and rows whose files this process has written, so that none is written twice
    written: set[str] = dataclasses.field(default_factory=set, compare=False)

    @cached_property
    def samplings(self) -> dict[str, list[Sampling]]:
        """Further ways in which the student of each run is sampled."""
        entries = self.config.sampling
        return {run: further_samplings(entries, config) for run, config in self.runs.items()}

    @cached_property
    def groups(self) -> dict[str, str]:
        """Run -> `group_id`, shared by the seeds of a row."""
        return {run: group_id(config) for run, config in self.runs.items()}

    @cached_property
    def entries(self) -> dict[str, ManifestEntry]:
        """The runs and rows as the manifest records them."""
        runs = {
            run: ManifestEntry(
                config.method["name"],
                config.student_updates,
                tuple(way.name for way in self.samplings[run]),
                config.init_run,
            )
            for run, config in self.runs.items()
        }
        return runs | {row: ManifestEntry("", 0) for row in self.rows}

    @cached_property
    def configs(self) -> dict[str, RunConfig]:
        """The configs in the run.yaml of runs and rows."""
        return self.runs | {row: config for row, (_, config) in self.rows.items()}

    def states(self, queue: Queue = Queue()) -> dict[str, str]:  # noqa: B008 - immutable
        """The state of every run and row."""
        return {
            run: run_state(self.store / run, bool(queue.active(run)), entry.samplings)
            for run, entry in self.entries.items()
        }

    def only(self, condition: str | None, initial: bool = True) -> "OpenSweep":
        """Restrict the sweep to runs that satisfy a condition on dotted keys.

        Args:
            initial: also keep the runs from whose students these start.

        Raises:
            ConfigError: if no run satisfies it.
        """
        if condition is None:
            return self
        check_condition(condition)
        selected = {
            run: config
            for run, config in self.runs.items()
            if holds(condition, config.model_dump(mode="json"))
        }
        if not selected:
            raise ConfigError(f"--only {condition!r}: no run of the sweep satisfies it")
        if initial:
            wanted = {run for one in selected for run in self.chain(one)}
            selected = {run: config for run, config in self.runs.items() if run in wanted}
        rows = {
            row: (of_row, config)
            for row, (of_row, config) in self.rows.items()
            if holds(condition, config.model_dump(mode="json"))
        }
        return dataclasses.replace(self, runs=selected, rows=rows)

    @cached_property
    def awaited(self) -> frozenset[str]:
        """Runs from whose students others start."""
        return frozenset(config.init_run for config in self.runs.values() if config.init_run)

    def chain(self, run: str) -> list[str]:
        """A run or row of the sweep, the run from whose student it starts, and so on."""
        config = self.runs.get(run)
        initial = config and config.init_run
        return [run, *(self.chain(initial) if initial in self.runs else [])]

    def write(self) -> None:
        """Write run.yaml into every run folder that lacks it, and the sweep's manifest."""
        self.write_runs()
        presets, baseline, groups = self.config.presets(), self.config.baseline, self.groups
        manifest = {
            "name": self.config.name,
            "question": self.config.question,
            "baseline": baseline and baseline | absolute_paths(baseline),
            "plateau": self.config.plateau.model_dump(mode="json"),
            "axes": self.config.axes(self.runs.values()),
            "presets": {run: presets[group] for run, group in groups.items() if group in presets},
            "titles": self._titles(),
            "contrasts": self.contrasts,
            "labels": self._labels(),
            "run_ids": list(self.runs),
            "groups": groups,
            "references": self._references(),
            "samplings": {
                run: {way.name: way.model_dump(mode="json") for way in further}
                for run, further in self.samplings.items()
                if further
            },
            "rows": {row: of_row.model_dump(mode="json") for row, (of_row, _) in self.rows.items()},
            "spec": spec_digest(self.config),
            "runs": {run: dataclasses.asdict(entry) for run, entry in self.entries.items()},
        }
        write_json(manifest_path(self.store, self.config.name), manifest)

    @property
    def contrasts(self) -> dict[str, dict[str, Any]]:
        """Definitions of the declared contrasts by name."""
        declared = self.config.contrasts.items()
        return {name: contrast.model_dump(mode="json") for name, contrast in declared}

    def record_launch(self, file: Path) -> None:
        """Record the sweep file and its contrasts before a launch; see `store.launches`."""
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        begun = sum(bool(attempts(self.store / run)) for run in self.entries)
        record_launch(self.store, self.config.name, digest, self.contrasts, begun)

    def write_runs(self, starting: Collection[str] = ()) -> None:
        """Write run.yaml, row.yaml and requested samplings into every folder that lacks them.

        Args:
            starting: runs whose files are replaced unless the run has a result: paths and keys of
                memory and logging may have changed.
        """
        rewritten = set(starting) - self.written
        for run, config in self.configs.items():
            replaced = run in rewritten and read_result(self.store / run) is None
            files: dict[str, BaseModel] = {"run.yaml": config}
            files |= {f"samplings/{way.name}.yaml": way for way in self.samplings.get(run, [])}
            if run in self.rows:
                files[ROW_FILE] = self.rows[run][0]
            for name, model in files.items():
                path = self.store / run / name
                missing = not path.is_file()
                if not missing and not replaced:
                    continue
                data = dump_yaml(model.model_dump(mode="json")).encode()
                try:
                    if missing or path.read_bytes() != data:
                        # the next launch replaces a file that a power cut left empty
                        write_bytes(path, data, durable=False)
                except OSError as error:  # affects only this run
                    message = f"cannot write into {path.parent}: {os_error(error)}"
                    record_error(self.store / run, message, failure_kind(error))
                else:
                    self.written.add(run)

    def _titles(self) -> dict[str, str]:
        """Display names of the runs' methods, and of their presets with names of their own."""
        titles = {}
        for name in dict.fromkeys(config.method["name"] for config in self.runs.values()):
            method, short = find_method(name), short_name(name)
            titles[short] = method.title or default_title(short)
            for preset_name, preset in method.presets.items():
                if preset.title:
                    titles[f"{short} {preset_name}"] = f"{titles[short]} {preset.title}"
        return titles

    def _labels(self) -> dict[str, dict[str, Any]]:
        """Run -> `label` of its cell, with the keys that the label stands for."""
        labels = self.config.labels()
        return {
            run: {"label": label.text, "keys": label.keys}
            for run, group in self.groups.items()
            if (label := labels.get(group)) is not None
        }

    def _references(self) -> dict[str, str]:
        """Reference rows that the results name: label -> folder in the store."""
        results = [result for run in self.configs if (result := read_result(self.store / run))]
        pairs = dict.fromkeys(
            pair for result in results for pair in result.get("references", {}).items()
        )
        # a sweep over nfe has one row per nfe for some kinds
        folders_of = Counter(kind for kind, _ in pairs)
        return {
            kind if folders_of[kind] == 1 else Path(folder).name: folder for kind, folder in pairs
        }


def open_sweep(config: SweepConfig, store: Path, out: Path) -> OpenSweep:
    """Expand a sweep.

    Raises:
        ConfigError: if a run cannot be resolved, or the runs have several protocols.
    """
    runs = config.expand_by_id()
    _check_one_protocol(config.name, runs.values())
    return OpenSweep(config, runs, store, out, config.untrained_rows(list(runs.values())))


def _check_one_protocol(name: str, runs: Iterable[RunConfig]) -> None:
    """Raise ConfigError if the runs have several protocols: their scores cannot share a table."""
    seed, *_ = (run.seed for run in runs)  # every seed has the same cells
    protocols = {protocol_hash(run): run for run in runs if run.seed == seed}
    first, *others = map(protocol, protocols.values())
    if others:
        remedy = "write one sweep per protocol"
        if first["shift"] != others[0]["shift"]:
            remedy += ", or state protocol.teacher_shift, so that the teacher's clips do not follow"
        raise ConfigError(
            f"{name}: the runs have {1 + len(others)} protocols: scores cannot share a table; "
            f"the first two differ in {describe_differences(first, others[0])}: {remedy}"
        )


def check_writable(*folders: Path) -> None:
    """Raise ConfigError for a folder that cannot be created or written to."""
    for folder in folders:
        if (reason := unwritable(folder)) is not None:
            raise ConfigError(f"cannot write into {folder}: {reason}")


def manifest_path(store: Path, name: str) -> Path:
    """File that records which runs belong to a sweep."""
    return store / "sweeps" / f"{name}.json"


def recorded_entries(config: SweepConfig, store: Path) -> dict[str, ManifestEntry] | None:
    """The runs in the sweep's manifest; None if its run ids may have changed since it was written.

    Reading them takes milliseconds; expanding a sweep of a thousand runs takes seconds.
    """
    manifest = read_record(manifest_path(store, config.name), run_ids=list)
    if manifest is None or manifest.get("spec") != spec_digest(config):
        return None
    return {
        run: ManifestEntry(**entry | {"samplings": tuple(entry.get("samplings", ()))})
        for run, entry in manifest["runs"].items()
    }


# code that turns a sweep file into run ids
RESOLVING = ("config", "teachers", "registry.py", "method.py", "methods")


def spec_digest(config: SweepConfig) -> str:
    """Digest (12 digits) of the inputs that decide a sweep's run ids, except weights and clips.

    Covers the sweep file, the files that it names (prompts, methods) and the code that resolves it.
    """
    spec = config.model_dump(mode="json", exclude={"cluster", "contrasts"})
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode())
    for path in [*_resolving_code(), *_named_files(spec)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _resolving_code() -> Iterator[Path]:
    for name in RESOLVING:
        path = ROOT / name
        if not path.exists():  # in a checkout, methods/ lies beside the package
            path = ROOT.parent / name
        yield from sorted(path.rglob("*.py")) if path.is_dir() else [path]


def _named_files(spec: Any) -> Iterator[Path]:
    """Files that values in a tree of mappings and lists name, e.g. `path/to/file.py:Class`."""
    if isinstance(spec, Mapping):
        spec = list(spec.values())
    if isinstance(spec, list):
        for value in spec:
            yield from _named_files(value)
    elif isinstance(spec, str) and len(spec.encode()) < 256:
        names = {spec, spec.removeprefix(FILE_PREFIX), spec.rpartition(":")[0]}
        yield from filter(Path.is_file, map(Path, sorted(names)))
