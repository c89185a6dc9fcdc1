"""The data files of `results/<name>`, from which its tables and figures are made.

sweep.json       question, swept keys, columns, baseline, notes
runs.csv         one line per run and per reference; failed and missing runs included
clips.csv        headline scores per clip, for intervals over clips
checkpoints.csv  scores at the evaluated student updates, with the training cost so far
training.csv     the training logs, thinned
"""

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import Any

import numpy as np
import pandas as pd

from distill_bench.config.overrides import has_values, value_at
from distill_bench.report.csv_files import cells, csv_text
from distill_bench.report.declarations import declared_contrasts, first_launch
from distill_bench.report.labels import SAMPLING, is_sampling
from distill_bench.report.read_store import DONE, StoredRun, StoredSweep, finite
from distill_bench.report.rows import key_texts
from distill_bench.store.files import read_jsonl

RUN_COLUMNS = [
    "run_id",
    "method",
    "role",
    "seed",
    "status",
    "student_updates",
    "fake_score_updates",
    "nfe",
]
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
CLOCK = ["student_updates", "cost_forward_equivalents", "seconds"]
TRAINING_LINES = 16  # per run in training.csv
# Fields of a run that do not change its results: they never separate rows.
NOT_IDENTITY = {
    "seed",
    "teacher",
    "init_run",  # `init` names it, and the seed
    "init_hash",
    "student",  # the content of these is in the hashes
    "prompts",
    "data",
    "launch_folder",
    "protocol.evaluators",
    "checkpoint_every",
    "log_every",
    "trackers",
    "threads",
}


def data_files(
    sweep: StoredSweep, baseline: Mapping[str, Any] | None = None, budget: float | None = None
) -> dict[str, str]:
    """Return the text of each data file, by file name.

    Args:
        baseline: keys and values of the row that is subtracted in differences; None: the
            sweep's baseline, else its first row.
        budget: training cost of the equal-cost table in forward equivalents; None: the largest
            cost that every finished run reaches.
    """
    swept = _swept_keys(sweep)
    columns = _columns(sweep.everything)
    if not any(column["headline"] for column in columns):
        columns = [column | {"headline": True} for column in columns]
    names = [column["column"] for column in columns]
    baseline = _row_keys(baseline, sweep, swept)
    manifest = {
        "name": sweep.name,
        "question": sweep.question,
        "swept": swept,
        "axis": _axis(sweep, swept),
        "baseline": baseline or _row_keys(sweep.baseline, sweep, swept),
        "budget": budget,
        "plateau": sweep.plateau,
        "titles": sweep.titles,
        "labels": sweep.labels,
        "contrasts": declared_contrasts(sweep, swept),
        "launch": first_launch(sweep),
        "columns": columns,
        "prompts": _prompts(sweep),
        "notes": _notes(sweep.runs),
        **({"initial_runs": sweep.initial_runs} if sweep.initial_runs else {}),
        "provenance": _provenance(sweep) | {"command": _command(sweep, baseline, budget)},
    }
    headline = [column["column"] for column in columns if column["headline"]]
    return {
        "sweep.json": json.dumps(manifest, indent=1) + "\n",
        "runs.csv": csv_text(_runs(sweep, swept, names)),
        "clips.csv": csv_text(_clips(sweep, headline)),
        "checkpoints.csv": csv_text(_checkpoints(sweep, names)),
        "training.csv": csv_text(_training(sweep)),
    }


# --- sweep.json ---


def _command(sweep: StoredSweep, baseline: Mapping[str, Any] | None, budget: float | None) -> str:
    command = f"python -m distill_bench.report {shlex.quote(sweep.name)}"
    if baseline is not None:
        command += f" --baseline {shlex.quote(key_texts(baseline))}"
    return command if budget is None else f"{command} --budget {budget:g}"


def _row_keys(
    wanted: Mapping[str, Any] | None, sweep: StoredSweep, swept: Sequence[str]
) -> dict[str, Any] | None:
    """The baseline in terms of a row's keys: its method's short name and swept keys.

    A baseline may also name keys that all runs share, or a method by its path. If it is one row,
    such keys are replaced by the row's own; otherwise the baseline stays as it is.
    """
    if not wanted:
        return wanted
    # a baseline that names no way of sampling is sampled as it was trained
    as_trained = any(map(is_sampling, swept)) and not any(map(is_sampling, wanted))
    known = wanted.keys() <= {"method", *swept} and wanted.get("method") in (
        None,
        *_methods(sweep),
    )
    if known and not as_trained:
        return dict(wanted)
    rows = [
        {"method": run.method} | {key: value_at(run.config, key) for key in swept}
        for run in sweep.runs
        if run.config and has_values(run.config, wanted) and (run.as_trained or not as_trained)
    ]
    one_row = rows and all(row == rows[0] for row in rows)
    return rows[0] if one_row else dict(wanted)


def _methods(sweep: StoredSweep) -> set[str]:
    return {run.method for run in sweep.runs}


def _swept_keys(sweep: StoredSweep) -> list[str]:
    """The sweep's axes, then every other key that differs between runs of one method.

    A mapping that is null in some runs, such as `adapter`, counts by its keys: all are null there.
    """
    below: dict[str, list[str]] = {}  # mapping -> its dotted keys
    for key in dict.fromkeys(key for run in sweep.runs for key in run.flat_config):
        below.setdefault(key.rpartition(".")[0], []).append(key)
    keys = [key for key in sweep.axes if key not in {"method", "method.name", "seed", *below}]
    by_method: dict[str, dict[str, set[str]]] = {}
    for run in sweep.runs:
        values = by_method.setdefault(run.method, {})
        for key, value in run.flat_config.items():
            text = json.dumps(value, sort_keys=True)
            for name in below.get(key, [key]):
                values.setdefault(name, set()).add(text)
    for values in by_method.values():
        differing = [key for key, distinct in values.items() if len(distinct) > 1]
        keys += [key for key in differing if key not in NOT_IDENTITY and key not in keys]
    # the settings of training beside those of sampling
    trained = [key.removeprefix(SAMPLING) for key in keys if is_sampling(key)]
    return keys + [key for key in trained if key in below[""] and key not in keys]


def _axis(sweep: StoredSweep, swept: Sequence[str]) -> str | None:
    """Return the x axis of the figures: the numeric swept key with most values within one method.

    Fields of methods do not count. Ties go to the first key; None if no key has two values.
    """

    def most_values(key: str) -> int:
        values: dict[str, set[float]] = {}
        for run in sweep.runs:
            value = run.flat_config.get(key)
            if value is not None and finite(value) is None:
                return 0
            if value is not None:
                values.setdefault(run.method, set()).add(value)
        distinct = set().union(*values.values())
        return max(map(len, values.values())) if len(distinct) > 1 else 0

    counts = {key: most_values(key) for key in swept if not key.startswith("method.")}
    best = max(counts, key=counts.__getitem__, default=None)
    return best if best is not None and counts[best] else None


def _columns(runs: Iterable[StoredRun]) -> list[dict[str, Any]]:
    """Describe every score, also those of checkpoints (a run may collapse before its end)."""
    columns: dict[str, dict[str, Any]] = {}
    for run in runs:
        for scores in (run.scores, *run.checkpoints.values()):
            for name, score in scores.items():
                description = {
                    "column": name,
                    "title": score.get("title") or name,
                    "unit": score.get("unit") or "",
                    "better": score.get("better"),
                    "headline": bool(score.get("headline")),
                }
                columns.setdefault(name, description)
    return list(columns.values())


def _prompts(sweep: StoredSweep) -> list[int] | None:
    """Number the prompt of each clip; None if every clip has its own prompt."""
    for run in sweep.everything:
        for folder in (run.folder, *sorted((run.folder / "samples").glob("*"))):
            prompts = [line["prompt"] for line in read_jsonl(folder / "manifest.jsonl")]
            if prompts:
                numbers, distinct = pd.factorize(pd.Series(prompts, dtype=object))
                return numbers.tolist() if len(distinct) < len(prompts) else None
    return None


def _notes(runs: Sequence[StoredRun]) -> list[str]:
    """Return notes on non-finite scores, mixed versions of code, and mixed hardware."""
    notes = []
    for run in runs:
        broken = [name for name, score in run.scores.items() if finite(score["value"]) is None]
        if broken and run.status == DONE:
            notes.append(
                f"{run.run_id} is done, but these scores are not finite and left out of the mean: "
                f"{', '.join(broken)}"
            )
    if started := [run for run in runs if run.config.get("init_run") and run.as_trained]:
        notes.append(
            f"training cost and time of {len(started)} runs include those of the runs from whose "
            "students they start"
        )
    for method in dict.fromkeys(run.method for run in runs):
        of_method = [run for run in runs if run.method == method]
        codes, counts = _count_values(of_method, "code_fingerprint")
        if codes > 1:
            notes.append(f"{method} ran with {codes} versions of its code ({counts})")
    kinds, counts = _count_values(runs, "hardware")
    if kinds > 1:
        notes.append(
            f"the runs used {kinds} kinds of hardware ({counts}): "
            "one seed gives different numbers on different hardware"
        )
    return notes


def _count_values(runs: Iterable[StoredRun], key: str) -> tuple[int, str]:
    """Count the distinct values of a key in finished runs; also describes them in words."""
    counts = Counter(str(run.known(key)) for run in runs if run.result and run.known(key))
    return len(counts), ", ".join(f"{value} in {count} runs" for value, count in counts.items())


def _provenance(sweep: StoredSweep) -> dict[str, str]:
    def distinct(values: Iterable[Any]) -> str:
        return ", ".join(dict.fromkeys(str(value) for value in values if value)) or "—"

    scores = [score for run in sweep.everything for score in run.scores.values()]
    return {
        "protocol": distinct(score.get("protocol") for score in scores),
        "extractors": distinct(score.get("extractor") for score in scores),
        "version": distinct(run.known("version") for run in sweep.runs),
        "commit": distinct(_commit(run) for run in sweep.runs),
        "code": distinct(run.known("code_fingerprint") for run in sweep.runs),
        "hardware": distinct(run.known("hardware") for run in sweep.runs),
    }


def _commit(run: StoredRun) -> str | None:
    commit = run.known("commit")
    return f"{commit} with uncommitted changes" if commit and run.known("dirty") else commit


# --- the CSV files ---


def _runs(sweep: StoredSweep, swept: Sequence[str], columns: Sequence[str]) -> pd.DataFrame:
    """One line per run and per reference."""
    runs = sweep.everything
    deviations = [f"{name}_sd" for name in columns if _any_score(runs, name, "sd")]
    extractors = [f"{name}_extractor" for name in columns if _any_score(runs, name, "extractor")]
    fixed = RUN_COLUMNS + COST_COLUMNS
    header = [*RUN_COLUMNS, *columns, *COST_COLUMNS, *(key for key in swept if key not in fixed)]
    header += [*deviations, *extractors, "warnings", "reason"]
    return cells([_run_line(run, swept) for run in runs], header)


def _any_score(runs: Sequence[StoredRun], name: str, field: str) -> bool:
    """Return True if any run's score has the field: 0 counts, an empty text does not."""
    return any(run.scores.get(name, {}).get(field) not in (None, "") for run in runs)


def _run_line(run: StoredRun, swept: Sequence[str]) -> dict[str, Any]:
    line = {key: run.known(key) for key in RUN_COLUMNS + COST_COLUMNS}
    line |= {key: run.flat_config.get(key) for key in swept}
    line |= {
        "run_id": run.run_id,
        "method": run.method,
        "role": run.role,
        "seed": run.seed,
        "status": run.status,
        "reason": run.reason,
    }
    for name, score in run.scores.items():
        line[name] = score["value"]
        line[f"{name}_sd"] = score.get("sd")
        line[f"{name}_extractor"] = score.get("extractor")
    # the protocol recorded with the scores, even if the result names none
    protocols = [score["protocol"] for score in run.scores.values()]
    line["protocol"] = protocols[0] if protocols else run.result.get("protocol")
    warnings = {name: score.get("warnings") for name, score in run.scores.items()}
    line["warnings"] = {name: texts for name, texts in warnings.items() if texts} or None
    return line


def _clips(sweep: StoredSweep, columns: Sequence[str]) -> pd.DataFrame:
    """Headline scores per clip with four digits, for scores that are means over clips."""
    lines = []
    for run in sweep.everything:
        for name in columns:
            score = run.scores.get(name, {})
            values = score.get("per_clip")
            mean = finite(score.get("value"))
            if not values or mean is None:
                continue
            if np.isclose(np.mean(values), mean, rtol=1e-3, atol=1e-6):
                text = " ".join(f"{value:.4g}" for value in values)
                lines.append({"run_id": run.run_id, "column": name, "values": text})
    return cells(lines, ["run_id", "column", "values"])


def _checkpoints(sweep: StoredSweep, columns: Sequence[str]) -> pd.DataFrame:
    """Scores of each run at its evaluated student updates, with cost and seconds so far."""
    lines = []
    for run in sweep.runs:
        for updates, scores in run.checkpoints.items():
            line = {"run_id": run.run_id, "student_updates": updates} | _clock_at(run, updates)
            lines.append(
                line | {name: _five_digits(score["value"]) for name, score in scores.items()}
            )
    return cells(lines, ["run_id", *CLOCK, *columns])


def _clock_at(run: StoredRun, updates: int) -> dict[str, Any]:
    """Cost and seconds up to a student update, from the result or interpolated in the log."""
    result = run.result
    if updates == result.get("student_updates") and result.get("train_seconds") is not None:
        return {
            "cost_forward_equivalents": _five_digits(result.get("cost_forward_equivalents")),
            "seconds": result["train_seconds"],
        }
    clock = {}
    for key in CLOCK[1:]:
        logged = [(line["student_updates"], line[key]) for line in run.training if key in line]
        start = run.initial.get("train_seconds" if key == "seconds" else key, 0.0)
        times, values = zip((0, start), *logged, strict=True)
        if times[-1] >= updates:
            clock[key] = _five_digits(float(np.interp(updates, times, values)))
    return clock


def _training(sweep: StoredSweep) -> pd.DataFrame:
    """At most TRAINING_LINES lines per run, including the last line of its log."""
    lines = []
    for run in sweep.runs:
        for line in spread(run.training[::-1], TRAINING_LINES)[::-1]:
            numbers = {key: _five_digits(value) for key, value in line.items()}
            lines.append({"run_id": run.run_id} | numbers)
    keys = [key for line in lines for key in line]
    return cells(lines, list(dict.fromkeys(["run_id", *CLOCK, *keys])))


def _five_digits(value: Any) -> Any:
    if isinstance(value, float) and isfinite(value):
        return float(f"{value:.5g}")
    return value


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """Return at most `count` of the items, evenly spread, including the first."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]
