"""Joins the runs of a sweep into runs.csv, tables over seeds, and one page that stands alone.

Reads files only, so a laptop without torch rebuilds every table. Which metrics exist, what they are called and which
way is better comes from the scores themselves: nothing here knows a method or a metric.
"""

import argparse
import base64
import csv
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import floor, isfinite, log10, nan
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from distill_bench import __version__
from distill_bench.stats import Interval, clear_winner, mean_interval
from distill_bench.store import attempts, read_json, read_jsonl, state, write_bytes, write_json

RUN_COLUMNS = ["run_id", "method", "seed", "status", "student_updates", "fake_score_updates", "nfe"]
COST_COLUMNS = [
    "train_seconds",
    "cost_forward_equivalents",
    "peak_memory_gib",
    "protocol",
    "version",
    "code_fingerprint",
]
# Title, unit and column of what a run cost; every table shows these after the scores.
COSTS = [
    ("cost_forward_equivalents", "Training cost", "forward equivalents"),
    ("train_seconds", "Training time", "s"),
    ("peak_memory_gib", "Peak memory", "GiB"),
]
# Fields of a run that do not change what it computes: never a reason for a row of its own.
NOT_IDENTITY = {"seed", "teacher", "protocol.evaluators", "checkpoint_every", "log_every", "trackers", "threads"}
DONE, REFERENCE = "done", "reference"
CLIP_PIXELS = 192  # longest side of an embedded clip
CLIP_ROWS = 24
CLIP_PROMPTS = 6


class ReportError(ValueError):
    """The store cannot be turned into a table; one line that says why."""


@dataclass(frozen=True)
class Column:
    """One metric as its scores describe it."""

    column: str
    title: str
    unit: str
    better: str | None
    headline: bool

    @property
    def arrow(self) -> str:
        return {"lower": "↓", "higher": "↑", "one": "→ 1"}.get(self.better or "", "")

    @property
    def heading(self) -> str:
        return " ".join(part for part in (self.title, f"({self.unit})" if self.unit else "", self.arrow) if part)


@dataclass
class Run:
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
    provenance: dict[str, Any] = field(default_factory=dict)
    attempts: int = 0

    def value(self, column: str) -> float | None:
        """A score or a cost as a number, None where there is none."""
        found = self.scores[column]["value"] if column in self.scores else self.result.get(column)
        return float(found) if isinstance(found, int | float) and isfinite(found) else None


@dataclass
class Row:
    """Runs that differ in nothing but the seed, or one reference."""

    method: str
    swept: dict[str, Any]
    runs: list[Run]
    reference: bool = False
    intervals: dict[str, Interval] = field(default_factory=dict)
    best: set[str] = field(default_factory=set)

    @property
    def label(self) -> str:
        short = [f"{key.rpartition('.')[2]}={show(value)}" for key, value in self.swept.items() if value is not None]
        return " ".join([self.method, *short])

    @property
    def done(self) -> int:
        return sum(run.status in (DONE, REFERENCE) for run in self.runs)

    @property
    def count(self) -> str:
        """`5` where all runs are there, else `3/5 (1 failed, 1 missing)`."""
        if self.reference:
            return "reference" if self.done else f"reference ({self.runs[0].status})"
        if self.done == len(self.runs):
            return str(self.done)
        states = [run.status for run in self.runs if run.status != DONE]
        lost = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        return f"{self.done}/{len(self.runs)} ({lost})"


@dataclass
class Collection:
    """A sweep's question, runs, references and columns."""

    name: str
    question: str
    swept: list[str]
    runs: list[Run]
    references: list[Run]
    columns: list[Column]
    notes: list[str]

    @property
    def main(self) -> list[Column]:
        """Columns flagged as headline; all of them where none is."""
        return [column for column in self.columns if column.headline] or self.columns


# --- reading the store ---


def collect(sweep: str | Path, store: Path) -> Collection:
    """Everything the store knows about a sweep, failed and missing runs included.

    Raises:
        ReportError: if there is no such sweep, or its rows cannot share a column.
    """
    name = Path(sweep).stem
    path = store / "sweeps" / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.json"))) or "none"
        raise ReportError(f"no sweep called {name!r} in {path.parent}; known: {known}")
    manifest = read_json(path)
    runs = [_read_run(store / run_id) for run_id in manifest["run_ids"]]
    references = [_read_reference(kind, store, folder) for kind, folder in manifest.get("references", {}).items()]
    _refuse_unlike(runs + references)
    swept = _swept(manifest.get("axes", {}), runs)
    columns = _columns(runs + references)
    return Collection(name, manifest.get("question", ""), swept, runs, references, columns, _notes(runs))


def _read_run(folder: Path) -> Run:
    match = re.fullmatch(r"(.+)-s(\d+)-[0-9a-f]+", folder.name)
    config = yaml.safe_load((folder / "run.yaml").read_text()) if (folder / "run.yaml").is_file() else {}
    method = match[1] if match else folder.name  # a plugin by path has a short label there
    seed = config.get("seed", int(match[2]) if match else None)
    tried = attempts(folder)
    start = _json(tried[-1] / "start.json") if tried else {}
    result = _json(folder / "result.json")
    return Run(
        run_id=folder.name,
        method=method,
        seed=seed,
        status=state(folder),
        reason=_reason(result, tried),
        folder=folder,
        config=config,
        result=result,
        scores=_scores(folder),
        provenance=start,
        attempts=len(tried),
    )


def _reason(result: Mapping[str, Any], tried: Sequence[Path]) -> str:
    """Why a run has no result, or collapsed; the last line of its error."""
    end = _json(tried[-1] / "exit.json") if tried else {}
    said = str(result.get("reason") or ("" if result else end.get("error")) or "").strip()
    return said.splitlines()[-1] if said else ""


def _read_reference(kind: str, store: Path, folder: str) -> Run:
    path = store / folder
    row = _json(path / "row.json")
    scores = _scores(path)
    status = REFERENCE if scores else "missing"
    return Run(f"reference-{kind}", kind, None, status, path, result=row, scores=scores)


def _scores(folder: Path) -> dict[str, dict[str, Any]]:
    """The last line a column: a metric evaluated again under a newer version replaces the older."""
    return {line["column"]: line for line in read_jsonl(folder / "metrics.jsonl")}


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) or {}


def _refuse_unlike(runs: Sequence[Run]) -> None:
    """A column holds scores of one protocol, one version and one extractor."""
    first: dict[str, Run] = {}
    for run in runs:
        for column, score in run.scores.items():
            other = first.setdefault(column, run)
            for key in ("protocol", "version", "extractor"):
                mine, theirs = score.get(key), other.scores[column].get(key)
                if mine != theirs:
                    raise ReportError(
                        f"{column} of {other.run_id} ({key} {theirs}) and of {run.run_id} ({key} {mine}) "
                        "cannot share a column; evaluate both alike"
                    )


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    result: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def _swept(axes: Mapping[str, Sequence[Any]], runs: Sequence[Run]) -> list[str]:
    """The sweep's axes, then whatever else differs between the runs of one method: both make rows of their own."""
    keys = [key for key in axes if key not in {"method", "method.name", "seed"}]
    by_method: dict[str, dict[str, set[str]]] = {}
    for run in runs:
        values = by_method.setdefault(run.method, {})
        for key, value in flat(run.config).items():
            values.setdefault(key, set()).add(json.dumps(value, sort_keys=True, default=str))
    for values in by_method.values():
        keys += [k for k, seen in values.items() if len(seen) > 1 and k not in NOT_IDENTITY and k not in keys]
    return keys


def _columns(runs: Sequence[Run]) -> list[Column]:
    result: dict[str, Column] = {}
    for run in runs:
        for name, score in run.scores.items():
            better, headline = score.get("better"), bool(score.get("headline"))
            result.setdefault(name, Column(name, score.get("title") or name, score.get("unit") or "", better, headline))
    return list(result.values())


def _notes(runs: Sequence[Run]) -> list[str]:
    """What a reader must know before trusting a mean: scores that are no number, unlike code within a method."""
    notes = []
    for run in runs:
        broken = [column for column in run.scores if run.status == DONE and run.value(column) is None]
        if broken:
            notes.append(f"{run.run_id} is done, but not finite and left out of the mean: {', '.join(broken)}")
    for method in dict.fromkeys(run.method for run in runs):
        prints: dict[str, list[str]] = {}
        for run in runs:
            if run.method == method and run.result.get("code_fingerprint"):
                prints.setdefault(run.result["code_fingerprint"], []).append(run.run_id)
        if len(prints) > 1:
            parts = "; ".join(f"{code}: {', '.join(ids)}" for code, ids in prints.items())
            notes.append(f"{method} ran with {len(prints)} versions of its code ({parts})")
    return notes


# --- aggregating ---


def aggregate(found: Collection) -> list[Row]:
    """Reference rows, then one row for all seeds of a configuration, in the sweep's order."""
    groups: dict[str, Row] = {}
    for run in found.runs:
        config = flat(run.config)
        swept = {key: config.get(key) for key in found.swept}
        key = json.dumps([run.method, swept], sort_keys=True, default=str)
        groups.setdefault(key, Row(run.method, swept, [])).runs.append(run)
    references = [Row(run.method, dict.fromkeys(found.swept), [run], reference=True) for run in found.references]
    rows = list(groups.values())
    names = [column.column for column in found.columns] + [name for name, _, _ in COSTS]
    for row in references + rows:
        for name in names:
            values = _by_seed(row, name)
            if values:
                row.intervals[name] = mean_interval(list(values.values()))
    for column in found.columns:
        # a row that lost runs cannot win: the seeds that survived are not a sample of all seeds
        winner = clear_winner([_by_seed(row, column.column) for row in rows], column.better)
        if winner is not None and rows[winner].done == len(rows[winner].runs):
            rows[winner].best.add(column.column)
    return references + rows


def _by_seed(row: Row, name: str) -> dict[Any, float]:
    values = {run.seed: run.value(name) for run in row.runs if run.status in (DONE, REFERENCE)}
    return {seed: value for seed, value in values.items() if value is not None}


def show(value: Any) -> str:
    """A swept value in a cell; `—` where the key does not exist for a method."""
    if value is None:
        return "—"
    return f"{value:g}" if isinstance(value, float) else str(value)


def show_interval(interval: Interval | None, separator: str = " ± ") -> str:
    """`112 ± 4`, with two significant digits of the half width; without a spread three digits of the value."""
    if interval is None:
        return "—"
    half = interval.half if interval.half > 1e-9 * abs(interval.mean) else nan  # equal up to rounding: no spread
    scale = half if isfinite(half) else abs(interval.mean) / 10
    decimals = min(6, max(0, 1 - floor(log10(scale)))) if scale > 0 else 0
    mean = f"{interval.mean:,.{decimals}f}"
    return f"{mean}{separator}{half:,.{decimals}f}" if half > 0 else mean


# --- writing ---


def report(sweep: str | Path, store: Path, out: Path) -> Path:
    """Write runs.csv, the tables, the figures and report.html under out/<sweep>; returns the page's path.

    Raises:
        ReportError: if there is no such sweep, or its rows cannot share a column.
    """
    store, out = Path(store), Path(out)
    found = collect(sweep, store)
    rows = aggregate(found)
    folder = out / found.name
    folder.mkdir(parents=True, exist_ok=True)
    command = f"python -m distill_bench.report {found.name} --store {store} --out {out}"
    _write_text(folder / "runs.csv", runs_csv(found))
    columns = [vars(column) | {"headline": column in found.main} for column in found.columns]
    write_json(folder / "columns.json", {"question": found.question, "swept": found.swept, "columns": columns})
    _write_text(folder / "table.csv", table_csv(found, rows))
    provenance = _provenance(found, command)
    _write_text(folder / "table.md", table_markdown(found, rows, provenance))
    _write_text(folder / "table.tex", table_tex(found, rows, provenance))
    _draw(folder, store)
    page = folder / "report.html"
    _write_text(page, html(found, rows, folder, provenance))
    return page


def _write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def _draw(folder: Path, store: Path) -> None:
    """Figures come from their own program, which knows only the files written so far."""
    package = str(Path(__file__).resolve().parent.parent)
    paths = os.pathsep.join(path for path in (package, os.environ.get("PYTHONPATH")) if path)
    command = [sys.executable, "-m", "distill_bench.plot", str(folder), "--store", str(store)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
    if done.returncode:
        raise ReportError(f"{' '.join(command[1:])} failed: {done.stderr.strip()[-2000:]}")


def runs_csv(found: Collection) -> str:
    """One line a run and a reference, failed and missing ones included."""
    scores = [column.column for column in found.columns]
    extractors = [
        f"{name}_extractor"
        for name in scores
        if any(run.scores.get(name, {}).get("extractor") for run in found.runs + found.references)
    ]
    swept = [key for key in found.swept if key not in RUN_COLUMNS + COST_COLUMNS]
    header = [*RUN_COLUMNS, *scores, *COST_COLUMNS, *swept, *extractors, "reason"]
    lines = []
    for run in found.references + found.runs:
        config = flat(run.config)
        line = {key: run.result.get(key, config.get(key)) for key in header}
        line |= {key: config.get(key) for key in found.swept}
        line |= {
            "run_id": run.run_id,
            "method": run.method,
            "seed": run.seed,
            "status": run.status,
            "reason": run.reason,
        }
        line |= {name: run.scores[name]["value"] for name in scores if name in run.scores}
        line |= {f"{name}_extractor": score.get("extractor") for name, score in run.scores.items()}
        # the protocol that a score was made under, even where no result names it
        line["protocol"] = next((score["protocol"] for score in run.scores.values()), run.result.get("protocol"))
        lines.append({key: _plain(line.get(key)) for key in header})
    return _csv(header, lines)


def _plain(value: Any) -> Any:
    if value is None:
        return ""
    return json.dumps(value) if isinstance(value, list | dict) else value


def _csv(header: Sequence[str], lines: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def table_csv(found: Collection, rows: Sequence[Row]) -> str:
    names = [column.column for column in found.columns] + [name for name, _, _ in COSTS]
    states = ["done", "collapsed", "failed", "lost", "running", "missing"]
    parts = [f"{name}_{part}" for name in names for part in ("mean", "low", "high", "n")]
    header = ["method", *found.swept, "reference", "expected", *states, *parts, "clear_best"]
    lines = []
    for row in rows:
        line: dict[str, Any] = {"method": row.method, "reference": int(row.reference), "expected": len(row.runs)}
        line |= {key: _plain(value) for key, value in row.swept.items()}
        line |= {state: sum(run.status == state for run in row.runs) for state in states}
        line["done"] = row.done
        for name, interval in row.intervals.items():
            line |= {f"{name}_mean": interval.mean, f"{name}_n": interval.n}
            if isfinite(interval.low):
                line |= {f"{name}_low": interval.low, f"{name}_high": interval.high}
        line["clear_best"] = " ".join(c.column for c in found.columns if c.column in row.best)
        lines.append({key: line.get(key, "") for key in header})
    return _csv(header, lines)


def _caption(found: Collection, bold: str) -> str:
    return (
        "Mean ± half of the 95 % t interval over training seeds; no interval where there is one seed. "
        f"{bold} only where the paired difference to every other row excludes 0 at 95 % together and no run was lost."
    )


def _provenance(found: Collection, command: str) -> dict[str, str]:
    def distinct(values: Sequence[Any]) -> str:
        return ", ".join(dict.fromkeys(str(value) for value in values if value)) or "—"

    everything = found.runs + found.references
    return {
        "sweep": found.name,
        "protocol": distinct([score.get("protocol") for run in everything for score in run.scores.values()]),
        "extractors": distinct([score.get("extractor") for run in everything for score in run.scores.values()]),
        "version": distinct([run.result.get("version") for run in found.runs]),
        "commit": distinct([run.provenance.get("commit") for run in found.runs]),
        "code": distinct([run.result.get("code_fingerprint") for run in found.runs]),
        "command": command,
    }


def table_markdown(found: Collection, rows: Sequence[Row], provenance: Mapping[str, str]) -> str:
    def cell(text: str) -> str:
        return text.replace("|", "\\|")

    costs = [f"{title} ({unit})" for _, title, unit in COSTS]
    header = ["method", *found.swept, "seeds", *(column.heading for column in found.main), *costs]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        cells = [row.method, *(show(value) for value in row.swept.values()), row.count]
        for column in found.main:
            text = show_interval(row.intervals.get(column.column))
            cells.append(f"**{text}**" if column.column in row.best else text)
        cells += [show_interval(row.intervals.get(name)) for name, _, _ in COSTS]
        lines.append(cells)
    table = "\n".join("| " + " | ".join(cell(text) for text in line) + " |" for line in lines)
    notes = "".join(f"\n\nNote: {note}." for note in found.notes)
    origin = ", ".join(f"{key} {value}" for key, value in provenance.items())
    question = f"{found.question}\n\n" if found.question else ""
    return f"{question}{table}\n\n{_caption(found, 'Bold')}{notes}\n\nFrom {origin}.\n"


_TEX = {
    "\\": r"\textbackslash{}",
    "—": "--",
    "±": r"$\pm$",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "→": r"$\rightarrow$",
    "²": r"$^2$",
    "·": r"$\cdot$",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
    "|": r"$|$",
} | {c: "\\" + c for c in "&%$#_{}"}


def tex(text: str) -> str:
    """Plain text as LaTeX."""
    return "".join(_TEX.get(c, c) for c in text)


def table_tex(found: Collection, rows: Sequence[Row], provenance: Mapping[str, str]) -> str:
    header = ["method", *found.swept, "seeds", *(column.heading for column in found.main)]
    header += [f"{title} ({unit})" for _, title, unit in COSTS[:1]]
    align = "l" * (1 + len(found.swept)) + "r" * (len(header) - 1 - len(found.swept))
    lines = []
    for i, row in enumerate(rows):
        if i and not row.reference and rows[i - 1].reference:
            lines.append(r"\midrule")
        cells = [tex(row.method), *(tex(show(value)) for value in row.swept.values()), tex(row.count)]
        for column in found.main:
            interval = row.intervals.get(column.column)
            text = tex(show_interval(interval)).replace(" $\\pm$ ", r"\,$\pm$\,")
            cells.append(rf"\textbf{{{text}}}" if column.column in row.best else text)
        cells += [tex(show_interval(row.intervals.get(name))) for name, _, _ in COSTS[:1]]
        lines.append(" & ".join(cells) + r" \\")
    comments = "\n".join(f"% {key}: {value}" for key, value in provenance.items())
    notes = "".join(f" {tex(note)}." for note in found.notes)
    body = "\n".join(lines)
    return (
        f"% needs \\usepackage{{booktabs}} and \\usepackage{{graphicx}}\n{comments}\n"
        "\\begin{table}\n\\centering\n"
        f"\\caption{{{tex(found.question)} {tex(_caption(found, 'Bold'))}{notes}}}\n"
        f"\\label{{tab:{re.sub('[^A-Za-z0-9]+', '-', found.name)}}}\n"
        "\\resizebox{\\linewidth}{!}{%\n"
        f"\\begin{{tabular}}{{{align}}}\n\\toprule\n{' & '.join(tex(text) for text in header)} \\\\\n\\midrule\n"
        f"{body}\n\\bottomrule\n\\end{{tabular}}}}\n\\end{{table}}\n"
    )


# --- the page ---


def html(found: Collection, rows: Sequence[Row], folder: Path, provenance: Mapping[str, str]) -> str:
    """The whole report as one page without a single outside resource."""
    templates = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(loader=templates, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(show=show, show_interval=show_interval)
    figures = []
    for path in sorted((folder / "figures").glob("*.svg")):
        data = base64.b64encode(path.read_bytes()).decode()
        about = path.with_suffix(".txt")
        figures.append({"name": path.stem, "data": data, "alt": about.read_text().strip() if about.is_file() else path.stem})
    names = [f"{column.column}_against_cost" for column in found.main]
    order = {name: i for i, name in enumerate(["headline", *names, "training_curves"])}
    figures = sorted((f for f in figures if f["name"] in order), key=lambda figure: order[figure["name"]])
    states = [run.status for run in found.runs]
    seconds = sum(run.value("train_seconds") or 0 for run in found.runs)
    return environment.get_template("report.html.j2").render(
        found=found,
        rows=rows,
        main=found.main,
        details=[column for column in found.columns if column not in found.main],
        costs=COSTS,
        caption=_caption(found, "Bold"),
        states={state: states.count(state) for state in dict.fromkeys(states)},
        hours=seconds / 3600,
        seeds=len({run.seed for run in found.runs}),
        figures=figures,
        wall=wall(found, rows),
        configs={run.run_id: yaml.safe_dump(run.config, sort_keys=False) for run in found.runs},
        provenance=provenance,
        version=__version__,
        sort_key=_sort_key,
    )


def _sort_key(row: Row, name: str) -> float:
    return row.intervals[name].mean if name in row.intervals else nan


def wall(found: Collection, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Clips of every row on the same few prompts and seeds: [{prompt, seed, clips: [{label, data}]}]."""
    references, students = [], []
    for row in rows:
        if row.reference and row.method.endswith("_other"):
            continue  # other seeds: not the same clip
        loaded = next((clips for run in row.runs if run.status in (DONE, REFERENCE) if (clips := _clips(run))), None)
        if loaded:
            (references if row.reference else students).append((row.label, *loaded))
    if not references + students:
        return []
    students = _spread(students, CLIP_ROWS)
    lines = (students or references)[0][2]
    first: dict[str, int] = {}
    for i, line in enumerate(lines):
        first.setdefault(line["prompt"], i)
    indices = _spread(list(first.values()), CLIP_PROMPTS)
    result = []
    for index in indices:
        prompt, seed = lines[index]["prompt"], lines[index].get("seed")
        clips = []
        for label, frames, manifest in references + students:
            if index < len(manifest) and index < len(frames) and manifest[index]["prompt"] == prompt:
                clips.append({"label": label, "data": _animation(frames[index], manifest[index].get("fps", 8))})
        result.append({"prompt": prompt, "seed": seed, "clips": clips})
    return result


def _spread(items: list[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spread."""
    return items if len(items) <= count else [items[i * len(items) // count] for i in range(count)]


def _clips(run: Run) -> tuple[np.ndarray, list[dict[str, Any]]] | None:
    """The newest samples of a folder: frames (N, T, 3, H, W) mapped, not loaded, and the manifest's lines."""
    places = sorted((p for p in (run.folder / "samples").glob("*") if p.name.isdigit()), key=lambda p: int(p.name))
    for place in [run.folder, *places][::-1]:
        if (place / "clips.npy").is_file() and (place / "manifest.jsonl").is_file():
            return np.load(place / "clips.npy", mmap_mode="r"), list(read_jsonl(place / "manifest.jsonl"))
    return None


def _animation(clip: np.ndarray, fps: float) -> str:
    """A clip (T, 3, H, W) uint8 as an animated WebP data URI; lossless while it is small."""
    frames = [Image.fromarray(np.ascontiguousarray(frame.transpose(1, 2, 0))) for frame in clip]
    small = max(frames[0].size) <= CLIP_PIXELS
    if not small:
        for frame in frames:
            frame.thumbnail((CLIP_PIXELS, CLIP_PIXELS))
    data = io.BytesIO()
    options = {"lossless": True, "quality": 60, "method": 2} if small else {"quality": 70, "method": 4}
    frames[0].save(data, "WEBP", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0, **options)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="distill_bench.report", description="tables, figures and a page of a sweep")
    parser.add_argument("sweep", help="the sweep's YAML, or its name")
    parser.add_argument("--store", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path("results"))
    arguments = parser.parse_args(argv)
    try:
        print(report(arguments.sweep, arguments.store, arguments.out))
    except ReportError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
