"""Read a sweep from the store: runs (also failed and missing ones), references, scores, logs.

Names, units and directions of metrics come from the scores.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from distill_bench.config.overrides import flat_keys
from distill_bench.config.schema import ProtocolConfig, RunConfig
from distill_bench.config.yaml_files import load_written
from distill_bench.sample.reference_kinds import ELSEWHERE, STUDENT, UNDISTILLED, role_of
from distill_bench.store.claims import attempts
from distill_bench.store.failures import first_line
from distill_bench.store.files import read_json, read_jsonl, read_record, text_lines
from distill_bench.store.launches import read_launches
from distill_bench.store.nested import describe_differences, flat
from distill_bench.store.runs import (
    read_initial,
    read_result,
    run_state,
    sweep_name,
    unsampled,
)

DONE, REFERENCE = "done", "reference"  # states with scores
COST = "cost_forward_equivalents"
FURTHER = "/samplings/"  # in the id of a student that is sampled in a further way
COMPARABLE = ("protocol", "version", "extractor")  # equal for all scores of a column


class StoreReadError(ValueError):
    """The store has no valid data for a sweep; the message is one line."""


def is_further_sampling(run_id: str) -> bool:
    """True for the id of a student that is not sampled as it was trained."""
    return FURTHER in run_id


@dataclass(frozen=True)
class StoredRun:
    """One run or one reference row, as its folder describes it."""

    run_id: str
    method: str  # for a reference: its kind
    seed: int | None
    status: str
    folder: Path
    role: str = STUDENT
    reason: str = ""  # cause of a failure or collapse
    config: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)  # by column
    # student updates -> scores by column
    checkpoints: dict[int, dict[str, dict[str, Any]]] = field(default_factory=dict)
    training: list[dict[str, Any]] = field(default_factory=list)
    initial: dict[str, Any] = field(default_factory=dict)  # record of the student it starts from
    provenance: dict[str, Any] = field(default_factory=dict)
    attempts: int = 0

    @property
    def as_trained(self) -> bool:
        """False for a student that is sampled in a further way."""
        return not is_further_sampling(self.run_id)

    def known(self, key: str) -> Any:
        """Look a key up in the result, then in the newest attempt, then in the config."""
        for place in (self.result, self.provenance, self.flat_config):
            if place.get(key) is not None:
                return place[key]
        return None

    @cached_property
    def flat_config(self) -> dict[str, Any]:
        """The config by dotted keys."""
        return flat_keys(self.config)


@dataclass(frozen=True)
class StoredSweep:
    """A sweep's question, runs and references."""

    name: str
    question: str
    axes: dict[str, list[Any]]
    baseline: dict[str, Any] | None
    runs: list[StoredRun]
    references: list[StoredRun]
    titles: dict[str, str] = field(default_factory=dict)  # display names of methods and presets
    plateau: dict[str, float] | None = None  # the sweep's rule
    labels: dict[str, dict[str, Any]] = field(default_factory=dict)  # run id -> label and its keys
    contrasts: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> definition
    launches: list[dict[str, Any]] = field(default_factory=list)  # records, oldest first

    @property
    def everything(self) -> list[StoredRun]:
        return self.references + self.runs

    @property
    def initial_runs(self) -> list[str]:
        """Runs from whose students others of the sweep start."""
        awaited = {run.config.get("init_run") for run in self.runs}
        return [run.run_id for run in self.runs if run.run_id in awaited]


def read_sweep(sweep: str | Path, store: Path) -> StoredSweep:
    """Read everything that the store knows about a sweep.

    Raises:
        StoreReadError: if there is no such sweep, or its scores cannot share columns.
    """
    name, store = sweep_name(sweep), Path(store)
    path = store / "sweeps" / f"{name}.json"
    manifest = read_record(path, run_ids=list)
    if manifest is None:
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.json"))) or "none"
        raise StoreReadError(f"no sweep called {name!r} in {path.parent}; known: {known}")
    presets = manifest.get("presets", {})
    runs = [read_run(store / run_id) for run_id in manifest["run_ids"]]
    runs = [_with_preset(run, presets.get(run.run_id)) for run in runs]
    runs = _with_configs(runs, manifest.get("groups", {}))
    samplings = manifest.get("samplings", {})
    if samplings:
        runs = [way for run in runs for way in _by_sampling(run, samplings.get(run.run_id, {}))]
    references = [
        _read_reference(kind, store / folder)
        for kind, folder in manifest.get("references", {}).items()
    ]
    rows = manifest.get("rows", {})
    references += [_read_row(store / row, content) for row, content in rows.items()]
    stored = StoredSweep(
        name=name,
        question=manifest.get("question", ""),
        axes=manifest.get("axes", {}),
        baseline=manifest.get("baseline"),
        runs=runs,
        # a finished one without scores: no evaluator of the protocol applies to it
        references=[row for row in references if row.scores or row.status != REFERENCE],
        plateau=manifest.get("plateau"),
        titles=manifest.get("titles", {}),
        contrasts=manifest.get("contrasts", {}),
        launches=read_launches(store, name),
        labels={
            run.run_id: label
            for run in runs
            if (label := manifest.get("labels", {}).get(run.run_id.partition("/")[0]))
        },
    )
    _check_comparable(stored.runs + stored.references, store)
    return stored


def _with_preset(run: StoredRun, preset: str | None) -> StoredRun:
    """Add the preset of the sweep's cell to the method's fields, after its name."""
    if preset is None or not run.config:
        return run
    name, *fields = run.config["method"].items()
    return replace(run, config=run.config | {"method": dict([name, ("preset", preset), *fields])})


def _with_configs(runs: Sequence[StoredRun], groups: Mapping[str, str]) -> list[StoredRun]:
    """Give runs whose folder was deleted the config of another seed of their row.

    These runs then count as missing in that row.

    Args:
        groups: run id -> name of its row.
    """
    known = {groups[run.run_id]: run.config for run in runs if run.config and run.run_id in groups}
    completed = []
    for run in runs:
        config = known.get(groups.get(run.run_id, ""))
        if not run.config and config is not None:
            run = replace(run, config=config | {"seed": run.seed})
        completed.append(run)
    return completed


def read_run(folder: Path) -> StoredRun:
    """Read the folder of a run in any state.

    Raises:
        StoreReadError: if its run.yaml is damaged.
    """
    match = re.fullmatch(r"(.+)-s(\d+)-[0-9a-f]+", folder.name)
    config = _read_config(folder / "run.yaml")
    tried = attempts(folder)
    result = read_result(folder) or {}
    training = [_numbers(line) for line in read_jsonl(folder / "train.jsonl")]
    if initial := read_initial(folder) or {}:
        result = _with_start(result, initial, "train_seconds")
        training = [_with_start(line, initial, "seconds") for line in training]
    scores = _read_scores(folder)
    checkpoints = {int(p.name): _read_scores(p) for p in sample_folders(folder)}
    if scores and result:
        checkpoints[result["student_updates"]] = scores
    return StoredRun(
        run_id=folder.name,
        method=match[1] if match else config.get("method", {}).get("name", folder.name),
        seed=config.get("seed", int(match[2]) if match else None),
        status=run_state(folder),
        folder=folder,
        reason=_reason(result, tried),
        config=config,
        result=result,
        scores=scores,
        checkpoints={updates: scored for updates, scored in sorted(checkpoints.items()) if scored},
        training=training,
        initial=initial,
        provenance=_read(tried[-1] / "start.json") if tried else {},
        attempts=len(tried),
    )


def _with_start(
    record: Mapping[str, Any], initial: Mapping[str, Any], seconds: str
) -> dict[str, Any]:
    """Add the cost of the student that a run started from to a result or a line of its log."""
    costs = {COST: initial[COST], seconds: initial["train_seconds"]}
    return dict(record) | {key: record[key] + cost for key, cost in costs.items() if key in record}


def sample_folders(folder: Path) -> list[Path]:
    """The folders of a run's clips, one per sampled student update, in ascending order."""
    folders = [path for path in (folder / "samples").glob("*") if path.name.isdigit()]
    return sorted(folders, key=lambda path: int(path.name))


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = _with_added_keys(RunConfig, dict(load_written(path)))
    except (ValueError, TypeError) as error:
        raise StoreReadError(f"{path} is damaged: {first_line(error)}") from error
    if isinstance(config.get("protocol"), dict):
        config["protocol"] = _with_added_keys(ProtocolConfig, config["protocol"])
    return config


def _with_added_keys(model: type[BaseModel], data: dict[str, Any]) -> dict[str, Any]:
    """Add the keys that are younger than a stored run, at their defaults."""
    added = {k: f.default for k, f in model.model_fields.items() if f.json_schema_extra["added"]}
    return data | {key: value for key, value in added.items() if key not in data}


def _reason(result: Mapping[str, Any], tried: Sequence[Path]) -> str:
    """Return the last line of a run's error, or the reason of its collapse; "" without either."""
    text = result.get("reason")
    if not result and tried:
        text = _read(tried[-1] / "exit.json").get("error")
    lines = text_lines(str(text or "").strip())
    return lines[-1] if lines else ""


def _read_reference(kind: str, folder: Path) -> StoredRun:
    return StoredRun(
        run_id=f"reference-{kind}",
        method=kind,
        seed=None,
        status=REFERENCE if folder.is_dir() else "missing",
        folder=folder,
        role=role_of(kind),
        result=_read(folder / "row.json"),
        scores=_read_scores(folder),
    )


def _read_row(folder: Path, row: Mapping[str, Any]) -> StoredRun:
    """Read a row that trains nothing.

    Args:
        row: its entry in the manifest: contents of row.yaml.
    """
    run = read_run(folder)
    return replace(
        run,
        method=row["label"],
        seed=None,
        status=REFERENCE if run.status == DONE else run.status,
        role=ELSEWHERE if row.get("network_hash") else UNDISTILLED,
        config={},  # of the run that states its protocol
    )


def _by_sampling(run: StoredRun, ways: Mapping[str, Mapping[str, Any]]) -> list[StoredRun]:
    """The run, and its student sampled in further ways, each with its `sampling` in the config.

    Args:
        ways: keys of each way, by name.
    """
    if not run.config:
        return [run]
    own = {key: run.config.get(key) for key in ("stepping", "nfe", "shift")}
    sampled = [replace(run, config=run.config | {"sampling": own | {"guidance_scale": 1.0}})]
    for name, way in ways.items():
        folder = run.folder / "samplings" / name
        scores = _read_scores(folder) if not unsampled(run.folder, [name]) else {}
        at_end = {run.result["student_updates"]: scores} if scores else {}
        sampled.append(
            replace(
                run,
                run_id=f"{run.run_id}{FURTHER}{name}",
                status="missing" if run.status == DONE and not scores else run.status,
                folder=folder,
                config=run.config
                | {"sampling": {key: value for key, value in way.items() if value is not None}},
                result=run.result | {"nfe": way["nfe"]} if run.result else {},
                scores=scores,
                checkpoints=at_end,
                training=[],
            )
        )
    return sampled


def _read_scores(folder: Path) -> dict[str, dict[str, Any]]:
    """Read metrics.jsonl by column; the last line of a column is its newest evaluation."""
    return {line["column"]: line for line in read_jsonl(folder / "metrics.jsonl")}


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) or {}


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """Keep the numbers of a line of the training log; nested keys become `name/bin`."""
    return {key: value for key, value in flat(line, "/").items() if finite(value) is not None}


def finite(value: Any) -> float | None:
    """Return a finite number as a float, anything else as None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if isfinite(value) else None


def _check_comparable(runs: Iterable[StoredRun], store: Path) -> None:
    """Raise StoreReadError if a column's scores differ in protocol, version or extractor."""
    first: dict[str, tuple[StoredRun, Mapping[str, Any]]] = {}
    for run in runs:
        for scores in (run.scores, *run.checkpoints.values()):
            for column, score in scores.items():
                other_run, other = first.setdefault(column, (run, score))
                for key in COMPARABLE:
                    if score.get(key) != other.get(key):
                        details = (
                            _protocol_details(other, score, store) if key == "protocol" else ""
                        )
                        raise StoreReadError(
                            f"{column} of {other_run.run_id} ({key} {other.get(key)}) and of "
                            f"{run.run_id} ({key} {score.get(key)}) cannot share a column"
                            f"{details}; evaluate both with the same settings"
                        )


def _protocol_details(a: Mapping[str, Any], b: Mapping[str, Any], store: Path) -> str:
    """Name the fields in which two scores' protocols differ.

    Protocols are stored beside the reference rows. If a protocol is gone, the conditions recorded
    with the scores are compared.
    """
    hashes = [str(score.get("protocol")) for score in (a, b)]
    protocols = [_read(store / "references" / digest / "protocol.json") for digest in hashes]
    if not all(protocols):
        protocols = [dict(score.get("conditions") or {}) for score in (a, b)]
        for conditions in protocols:
            conditions.pop("references", None)
    fields = describe_differences(*protocols)
    return f": they differ in {fields}" if fields else ""
