"""What the store knows of a sweep, as the data files of results/<name>: all that its tables and figures are made of.

    sweep.json       question, what is swept, the scores' columns, baseline, notes
    runs.csv         a line a run and a reference, failed and missing ones included
    clips.csv        the headline scores clip by clip, for intervals over clips
    checkpoints.csv  scores at the evaluated student updates, with the cost of getting there
    training.csv     the training logs, thinned

Which metrics exist, what they are called and which way is better comes from the scores themselves.
"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from distill_bench.store.claims import attempts
from distill_bench.store.files import first_line, read_json, read_jsonl, read_record
from distill_bench.store.nested import differences, flat
from distill_bench.store.runs import result_of, state, sweep_called

RUN_COLUMNS = ["run_id", "method", "seed", "status", "student_updates", "fake_score_updates", "nfe"]
COST_COLUMNS = [
    "train_seconds",
    "cost_forward_equivalents",
    "peak_memory_gib",
    "protocol",
    "version",
    "commit",
    "code_fingerprint",
    "hardware",
]
# Fields of a run that do not change what it computes: never a reason for a row of its own.
NOT_IDENTITY = {
    "seed",
    "teacher",
    "protocol.evaluators",
    "checkpoint_every",
    "log_every",
    "trackers",
    "threads",
}
DONE, REFERENCE = "done", "reference"
TRAINING_LINES = 16  # of a run in training.csv
CLOCK = ("student_updates", "cost_forward_equivalents", "seconds")


class GatherError(ValueError):
    """The store cannot be turned into a table; one line that says why."""


@dataclass(frozen=True)
class Source:
    """One run, or one reference row, with what its folder says."""

    run_id: str
    method: str
    seed: int | None
    status: str
    folder: Path
    reason: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    checkpoints: dict[int, dict[str, dict[str, Any]]] = field(
        default_factory=dict
    )  # student updates -> scores
    training: list[dict[str, Any]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    attempts: int = 0

    def known(self, key: str) -> Any:
        """What the result says, else the newest attempt, else the config."""
        places = (self.result, self.provenance, flat(self.config))
        return next((place[key] for place in places if place.get(key) is not None), None)


@dataclass(frozen=True)
class Sweep:
    """A sweep's question, runs and references."""

    name: str
    question: str
    axes: dict[str, list[Any]]
    baseline: dict[str, Any] | None
    runs: list[Source]
    references: list[Source]

    @property
    def everything(self) -> list[Source]:
        return self.references + self.runs


# --- reading the store ---


def read_sweep(sweep: str | Path, store: Path) -> Sweep:
    """Everything the store knows about a sweep, failed and missing runs included.

    Raises:
        GatherError: if there is no such sweep, or its rows cannot share a column.
    """
    name = sweep_called(sweep)
    path = Path(store) / "sweeps" / f"{name}.json"
    manifest = read_record(path, run_ids=list)
    if manifest is None:
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.json"))) or "none"
        raise GatherError(f"no sweep called {name!r} in {path.parent}; known: {known}")
    runs = [read_run(Path(store) / run_id) for run_id in manifest["run_ids"]]
    for run in runs:
        if run.config and run.run_id in manifest.get("presets", {}):
            first, *fields = run.config["method"].items()
            run.config["method"] = dict(
                [first, ("preset", manifest["presets"][run.run_id]), *fields]
            )
    runs = _with_their_seeds(runs, manifest.get("groups", {}))
    kinds = manifest.get("references", {}).items()
    references = [_read_reference(kind, Path(store) / folder) for kind, folder in kinds]
    # a row is there and no evaluator of the protocol applies to it: nothing to show; one that is not there is missing
    references = [row for row in references if row.scores or not row.folder.is_dir()]
    found = Sweep(
        name,
        manifest.get("question", ""),
        manifest.get("axes", {}),
        manifest.get("baseline"),
        runs,
        references,
    )
    _refuse_unlike(found.runs + found.references, Path(store))
    return found


def _with_their_seeds(runs: Sequence[Source], groups: Mapping[str, str]) -> list[Source]:
    """The runs; one whose folder is gone has the config of its other seeds, so that it is missing in its own row."""
    known = {groups[run.run_id]: run.config for run in runs if run.config and run.run_id in groups}
    return [
        run
        if run.config or groups.get(run.run_id) not in known
        else replace(run, config=known[groups[run.run_id]] | {"seed": run.seed})
        for run in runs
    ]


def read_run(folder: Path) -> Source:
    """What a run's folder says, whatever has become of it."""
    match = re.fullmatch(r"(.+)-s(\d+)-[0-9a-f]+", folder.name)
    try:
        config = (
            yaml.safe_load((folder / "run.yaml").read_text())
            if (folder / "run.yaml").is_file()
            else {}
        )
        dict(config)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise GatherError(f"{folder / 'run.yaml'} is damaged: {first_line(error)}") from error
    tried = attempts(folder)
    result, scores = result_of(folder) or {}, _scores(folder)
    checkpoints = {
        int(p.name): _scores(p) for p in (folder / "samples").glob("*") if p.name.isdigit()
    }
    if scores and result:
        checkpoints[result["student_updates"]] = scores
    return Source(
        run_id=folder.name,
        method=match[1] if match else config.get("method", {}).get("name", folder.name),
        seed=config.get("seed", int(match[2]) if match else None),
        status=state(folder),
        reason=_reason(result, tried),
        folder=folder,
        config=config,
        result=result,
        scores=scores,
        checkpoints={updates: found for updates, found in sorted(checkpoints.items()) if found},
        training=[_numbers(line) for line in read_jsonl(folder / "train.jsonl")],
        provenance=_json(tried[-1] / "start.json") if tried else {},
        attempts=len(tried),
    )


def _reason(result: Mapping[str, Any], tried: Sequence[Path]) -> str:
    """Why a run has no result, or collapsed; the last line of its error."""
    end = _json(tried[-1] / "exit.json") if tried else {}
    said = str(result.get("reason") or ("" if result else end.get("error")) or "").strip()
    return said.splitlines()[-1] if said else ""


def _read_reference(kind: str, folder: Path) -> Source:
    scores = _scores(folder)
    status = REFERENCE if scores else "missing"
    return Source(
        f"reference-{kind}",
        kind,
        None,
        status,
        folder,
        result=_json(folder / "row.json"),
        scores=scores,
    )


def _scores(folder: Path) -> dict[str, dict[str, Any]]:
    """The last line a column: a metric evaluated again under a newer version replaces the older."""
    return {line["column"]: line for line in read_jsonl(folder / "metrics.jsonl")}


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) or {}


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a training line; nested ones as `name/bin`."""
    return {key: value for key, value in flat(line, "/").items() if number(value) is not None}


def number(value: Any) -> float | None:
    """A finite number, or None."""
    return (
        float(value)
        if isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
        else None
    )


def _refuse_unlike(runs: Iterable[Source], store: Path) -> None:
    """A column holds scores of one protocol, one version and one extractor."""
    first: dict[str, tuple[Source, Mapping[str, Any]]] = {}
    for run in runs:
        for scores in (run.scores, *run.checkpoints.values()):
            for column, score in scores.items():
                other, others = first.setdefault(column, (run, score))
                for key in ("protocol", "version", "extractor"):
                    mine, theirs = score.get(key), others.get(key)
                    if mine != theirs:
                        what = _unlike_protocols(others, score, store) if key == "protocol" else ""
                        raise GatherError(
                            f"{column} of {other.run_id} ({key} {theirs}) and of {run.run_id} ({key} {mine}) "
                            f"cannot share a column{what}; evaluate both alike"
                        )


def _unlike_protocols(a: Mapping[str, Any], b: Mapping[str, Any], store: Path) -> str:
    """In what the protocols of two scores differ: by what lies beside their reference rows, else by the scores' conditions."""
    hashes = [str(score.get("protocol")) for score in (a, b)]
    known = [_json(store / "references" / each / "protocol.json") for each in hashes]
    conditions = [
        {k: v for k, v in (score.get("conditions") or {}).items() if k != "references"}
        for score in (a, b)
    ]
    what = differences(*known) if all(known) else differences(*conditions)
    return f": they differ in {what}" if what else ""


# --- the data files ---


def data_files(
    found: Sweep, baseline: Mapping[str, Any] | None = None, budget: float | None = None
) -> dict[str, str]:
    """The text of each data file of results/<name>, by name.

    Args:
        baseline: keys and values of the row that differences are taken to; None is the sweep's own, else its first row.
        budget: cost in forward equivalents of the equal-cost table; None is the largest that every finished run reaches.
    """
    swept, columns = _swept(found), _columns(found.everything)
    if not any(column["headline"] for column in columns):
        columns = [column | {"headline": True} for column in columns]
    options = (
        ""
        if baseline is None
        else f" --baseline {','.join(f'{key}={value}' for key, value in baseline.items())}"
    )
    options += "" if budget is None else f" --budget {budget:g}"
    about = {
        "name": found.name,
        "question": found.question,
        "swept": swept,
        "axis": _axis(found, swept),
        "baseline": baseline or found.baseline,
        "budget": budget,
        "columns": columns,
        "prompts": _prompts(found),
        "notes": _notes(found.runs),
        "provenance": _provenance(found)
        | {"command": f"python -m distill_bench.report {found.name}{options}"},
    }
    return {
        "sweep.json": json.dumps(about, indent=1) + "\n",
        "runs.csv": _runs_csv(found, swept, [column["column"] for column in columns]),
        "clips.csv": _clips_csv(
            found, [column["column"] for column in columns if column["headline"]]
        ),
        "checkpoints.csv": _checkpoints_csv(found, [column["column"] for column in columns]),
        "training.csv": _training_csv(found),
    }


def _swept(found: Sweep) -> list[str]:
    """The sweep's axes, then whatever else differs between the runs of one method: both make rows of their own."""
    keys = [key for key in found.axes if key not in {"method", "method.name", "seed"}]
    by_method: dict[str, dict[str, set[str]]] = {}
    for run in found.runs:
        values = by_method.setdefault(run.method, {})
        for key, value in flat(run.config).items():
            values.setdefault(key, set()).add(json.dumps(value, sort_keys=True, default=str))
    for values in by_method.values():
        keys += [
            k
            for k, seen in values.items()
            if len(seen) > 1 and k not in NOT_IDENTITY and k not in keys
        ]
    return keys


def _axis(found: Sweep, swept: Sequence[str]) -> str | None:
    """The x axis of what a sweep asks: the number of the run that takes most values within one method, of equals the first."""

    def most(key: str) -> int:
        values: dict[str, set[Any]] = {}
        for run in found.runs:
            value = flat(run.config).get(key) if run.config else None
            if value is not None:  # a run may have no such thing
                values.setdefault(run.method, set()).add(value)
        numbers = all(number(value) is not None for seen in values.values() for value in seen)
        every = set().union(*values.values()) if values else set()
        return 0 if not numbers or len(every) < 2 else max(map(len, values.values()))

    keys = [key for key in swept if not key.startswith("method.") and most(key)]
    return max(keys, key=most, default=None)


def _columns(runs: Iterable[Source]) -> list[dict[str, Any]]:
    """Every score as its lines describe it; those of checkpoints alone (of runs that collapsed later) included."""
    result: dict[str, dict[str, Any]] = {}
    for run in runs:
        for scores in (run.scores, *run.checkpoints.values()):
            for name, score in scores.items():
                about = {
                    "column": name,
                    "title": score.get("title") or name,
                    "unit": score.get("unit") or "",
                }
                about |= {"better": score.get("better"), "headline": bool(score.get("headline"))}
                result.setdefault(name, about)
    return list(result.values())


def _prompts(found: Sweep) -> list[int] | None:
    """Which prompt each clip has, by number, where clips share one; None where every clip has its own."""
    for run in found.everything:
        for folder in (run.folder, *sorted((run.folder / "samples").glob("*"))):
            lines = [line["prompt"] for line in read_jsonl(folder / "manifest.jsonl")]
            if lines:
                place = {prompt: i for i, prompt in enumerate(dict.fromkeys(lines))}
                return [place[prompt] for prompt in lines] if len(place) < len(lines) else None
    return None


def _notes(runs: Sequence[Source]) -> list[str]:
    """What a reader must know before trusting a mean: scores that are no number, unlike code within a method, unlike hardware."""
    notes = []
    for run in runs:
        broken = [column for column, score in run.scores.items() if number(score["value"]) is None]
        if broken and run.status == DONE:
            notes.append(
                f"{run.run_id} is done, but not finite and left out of the mean: {', '.join(broken)}"
            )
    for method in dict.fromkeys(run.method for run in runs):
        codes, parts = _kinds((run for run in runs if run.method == method), "code_fingerprint")
        if codes > 1:
            notes.append(f"{method} ran with {codes} versions of its code ({parts})")
    devices, parts = _kinds(runs, "hardware")
    if devices > 1:
        notes.append(
            f"the runs are of {devices} kinds of hardware ({parts}): a seed gives other numbers on another kind"
        )
    return notes


def _kinds(runs: Iterable[Source], key: str) -> tuple[int, str]:
    """How many values of a key the runs with a result have, and these with their counts."""
    kinds = Counter(str(run.known(key)) for run in runs if run.result and run.known(key))
    return len(kinds), ", ".join(f"{kind} in {count} runs" for kind, count in kinds.items())


def _provenance(found: Sweep) -> dict[str, str]:
    def distinct(values: Iterable[Any]) -> str:
        return ", ".join(dict.fromkeys(str(value) for value in values if value)) or "—"

    scores = [score for run in found.everything for score in run.scores.values()]
    return {
        "protocol": distinct(score.get("protocol") for score in scores),
        "extractors": distinct(score.get("extractor") for score in scores),
        "version": distinct(run.known("version") for run in found.runs),
        "commit": distinct(_commit(run) for run in found.runs),
        "code": distinct(run.known("code_fingerprint") for run in found.runs),
        "hardware": distinct(run.known("hardware") for run in found.runs),
    }


def _commit(run: Source) -> str | None:
    commit = run.known("commit")
    return f"{commit} with uncommitted changes" if commit and run.known("dirty") else commit


def _runs_csv(found: Sweep, swept: Sequence[str], columns: Sequence[str]) -> str:
    """One line a run and a reference."""
    sds = [
        f"{name}_sd"
        for name in columns
        if any(run.scores.get(name, {}).get("sd") is not None for run in found.everything)
    ]
    extractors = [
        f"{c}_extractor"
        for c in columns
        if any(run.scores.get(c, {}).get("extractor") for run in found.everything)
    ]
    extra = [key for key in swept if key not in RUN_COLUMNS + COST_COLUMNS]
    header = [
        *RUN_COLUMNS,
        *columns,
        *COST_COLUMNS,
        *extra,
        *sds,
        *extractors,
        "warnings",
        "reason",
    ]
    lines = []
    for run in found.everything:
        config = flat(run.config)
        line = {key: run.known(key) for key in RUN_COLUMNS + COST_COLUMNS} | {
            key: config.get(key) for key in swept
        }
        line |= {
            "run_id": run.run_id,
            "method": run.method,
            "seed": run.seed,
            "status": run.status,
            "reason": run.reason,
        }
        for name, score in run.scores.items():
            line |= {
                name: score["value"],
                f"{name}_sd": score.get("sd"),
                f"{name}_extractor": score.get("extractor"),
            }
        # the protocol that a score was made under, even where no result names it
        line["protocol"] = next(
            (score["protocol"] for score in run.scores.values()), run.result.get("protocol")
        )
        line["warnings"] = {
            name: score["warnings"] for name, score in run.scores.items() if score.get("warnings")
        } or None
        lines.append(line)
    return write_csv(header, lines)


def _clips_csv(found: Sweep, columns: Sequence[str]) -> str:
    """Headline scores clip by clip, four digits; only where the score is their mean."""
    lines = []
    for run in found.everything:
        for name in columns:
            score = run.scores.get(name, {})
            values, value = score.get("per_clip"), number(score.get("value"))
            if (
                values
                and value is not None
                and np.isclose(np.mean(values), value, rtol=1e-3, atol=1e-6)
            ):
                lines.append(
                    {
                        "run_id": run.run_id,
                        "column": name,
                        "values": " ".join(f"{v:.4g}" for v in values),
                    }
                )
    return write_csv(["run_id", "column", "values"], lines)


def _checkpoints_csv(found: Sweep, columns: Sequence[str]) -> str:
    """Scores at every evaluated student update of a run, with cost and seconds there."""
    lines = []
    for run in found.runs:
        for updates, scores in run.checkpoints.items():
            line = {"run_id": run.run_id, "student_updates": updates} | _clock_at(run, updates)
            lines.append(line | {name: _digits(score["value"]) for name, score in scores.items()})
    return write_csv(["run_id", *CLOCK, *columns], lines)


def _clock_at(run: Source, updates: int) -> dict[str, Any]:
    """Cost and seconds at a student update: the result's at the end, else between the nearest lines of the log."""
    if updates == run.result.get("student_updates") and run.result.get("train_seconds") is not None:
        return {
            "cost_forward_equivalents": _digits(run.result.get("cost_forward_equivalents")),
            "seconds": run.result["train_seconds"],
        }
    lines = run.training
    clock = {}
    for key in CLOCK[1:]:
        known = [(0, 0.0)] + [(line["student_updates"], line[key]) for line in lines if key in line]
        if known[-1][0] >= updates:
            clock[key] = _digits(float(np.interp(updates, *zip(*known, strict=True))))
    return clock


def _training_csv(found: Sweep) -> str:
    """At most TRAINING_LINES lines of each run's log, the last among them."""
    lines = []
    for run in found.runs:
        kept = spread(run.training[::-1], TRAINING_LINES)[::-1]
        lines += [
            {"run_id": run.run_id} | {key: _digits(value) for key, value in line.items()}
            for line in kept
        ]
    keys = dict.fromkeys(key for line in lines for key in line)
    return write_csv([*dict.fromkeys(["run_id", *CLOCK, *keys])], lines)


def _digits(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) and isfinite(value) else value


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spread, the first among them."""
    return (
        list(items)
        if len(items) <= count
        else [items[i * len(items) // count] for i in range(count)]
    )


def write_csv(header: Sequence[str], lines: Iterable[Mapping[str, Any]]) -> str:
    """CSV text; None is empty, lists and mappings are JSON, keys outside the header are left out."""
    text = io.StringIO()
    writer = csv.DictWriter(text, header, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for line in lines:
        plain = {k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in line.items()}
        writer.writerow({key: "" if value is None else value for key, value in plain.items()})
    return text.getvalue()
