"""Write stores and results file by file, for tests of their readers."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from zlib import crc32

import numpy as np
import pandas as pd

from distill_bench.config.yaml_files import dump_yaml
from distill_bench.report.data_files import data_files
from distill_bench.report.read_store import read_sweep
from distill_bench.report.results import COSTS, Column, Results, load
from distill_bench.sample.reference_kinds import STUDENT

PROMPTS = [
    "a red circle moves left",
    "a blue square moves up & 10% right",
    "a green cross stands still",
]


def score(column, value, **fields):
    """A line of metrics.jsonl."""
    defaults = {
        "metric": column,
        "column": column,
        "value": value,
        "per_clip": None,
        "sd": None,
        "n": 3,
        "version": 1,
        "extractor": None,
        "protocol": "p1",
        "unit": "",
        "better": "lower",
        "title": column.title(),
        "headline": True,
    }
    return defaults | fields


def scores(distance, seed=0):
    """Lines of metrics.jsonl: a distance, a score with one value per clip, and a detail."""
    speed = [round(1 / distance + 0.1 * clip + 0.01 * seed, 6) for clip in range(3)]
    return [
        score("distance", distance, extractor="net-1", sd=0.25),
        score("speed", float(np.mean(speed)), better="one", per_clip=speed),
        score("detail", 0.5 + seed / 10, better=None, headline=False),
    ]


def write_lines(path, lines):
    """Write a .jsonl file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_clips(folder, shade, first_seed=7):
    """Write one clip per prompt, four frames of 8 x 8 pixels that brighten from `shade`."""
    folder.mkdir(parents=True, exist_ok=True)
    brighter = np.arange(4, dtype=np.uint8)[:, None, None, None]
    np.save(folder / "clips.npy", np.full((3, 4, 3, 8, 8), shade, np.uint8) + brighter)
    lines = [{"index": i, "prompt": p, "seed": first_seed + i} for i, p in enumerate(PROMPTS)]
    write_lines(folder / "manifest.jsonl", lines)


def write_run(store, method, seed, cadence, distance, status="done", /, **fields):
    """Write a run's folder, evaluated after 10 and 20 student updates; returns its id.

    Args:
        status: "done" or "collapsed"; None: the run failed; "missing": it never started.
        fields: further fields of its config.
    """
    run_id = f"{method}-s{seed}-{crc32(f'{method}{cadence}{fields}'.encode()):012x}"
    folder = store / run_id
    folder.mkdir(parents=True)
    config = {
        "method": {"name": method, "weight": 1.0},
        "seed": seed,
        "fake_score_updates": cadence,
        "nfe": 4,
    }
    (folder / "run.yaml").write_text(dump_yaml(config | fields))
    if status == "missing":
        return run_id
    attempt = folder / "attempts" / "001"
    attempt.mkdir(parents=True)
    start = {"commit": "abc123", "host": "node1", "code_fingerprint": "c1"}
    (attempt / "start.json").write_text(json.dumps(start))
    if status is None:
        end = {"status": "error", "error": "Traceback\nValueError: out of <luck>"}
        (attempt / "exit.json").write_text(json.dumps(end))
        return run_id
    cost = 1000.0 * (1 + cadence)
    result = {
        "run_id": run_id,
        "method": method,
        "seed": seed,
        "status": status,
        "student_updates": 20,
        "fake_score_updates": cadence,
        "nfe": 4,
        "train_seconds": 10.0 + seed,
        "cost_forward_equivalents": cost,
        "peak_memory_gib": 0.5,
        "protocol": "p1",
        "version": "0.1.0",
    }
    if status == "collapsed":
        result["reason"] = "the latents are constant at student update 15"
    (folder / "result.json").write_text(json.dumps(result))
    write_lines(folder / "train.jsonl", [_logged(updates, cost) for updates in (1, 10, 20)])
    write_lines(folder / "samples" / "10" / "metrics.jsonl", scores(3.0 * (distance or 10.0), seed))
    if status == "done":
        write_lines(folder / "metrics.jsonl", scores(distance, seed))
        write_clips(folder / "samples" / "20", 40 * cadence % 256)
    return run_id


def _logged(updates, cost):
    """A line of the training log of a run that costs `cost` in 20 updates."""
    line = {
        "student_updates": updates,
        "student_loss": 9.0 / updates,
        "seconds": updates / 2,
        "cost_forward_equivalents": cost * updates / 20,
    }
    return line | {f"gap/{sigma}": sigma * updates for sigma in (0.1, 0.5, 0.9)}


def write_store(tmp_path, runs, references=("data", "teacher"), **manifest):
    """Write a store with a sweep called `speed`; `runs` are the arguments of write_run."""
    store = tmp_path / "runs"
    run_ids = [write_run(store, *run) for run in runs]
    for i, kind in enumerate(references):
        folder = store / "references" / kind
        write_clips(folder, 200)
        write_lines(folder / "metrics.jsonl", scores(1.0 + i))
        (folder / "row.json").write_text(json.dumps({"kind": kind, "protocol": "p1"}))
    axes = {"method": ["alpha", "beta"], "fake_score_updates": [1, 5], "seed": [0, 1, 2]}
    sweep = {
        "name": "speed",
        "question": "Does a faster fake_score pay?",
        "run_ids": run_ids,
        "references": {kind: f"references/{kind}" for kind in references},
        "axes": axes,
    }
    (store / "sweeps").mkdir(parents=True)
    (store / "sweeps" / "speed.json").write_text(json.dumps(sweep | manifest))
    return store


def load_results(store: Path, folder: Path, **options) -> Results:
    """Write the data files of the sweep `speed`, with options of `data_files`, and load them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in data_files(read_sweep("speed", store), **options).items():
        (folder / name).write_text(text)
    return load(folder)


def edit_lines(path: Path, change: Callable[[dict], dict | None]) -> None:
    """Replace each line of a .jsonl file by `change(line)`; None deletes it."""
    lines = [change(json.loads(line)) for line in path.read_text().splitlines()]
    write_lines(path, [line for line in lines if line is not None])


def update_json(path: Path, **fields) -> None:
    """Set fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def write_results(
    folder: Path,
    columns: Sequence[Column],
    swept: Sequence[str],
    axis: str | None,
    runs: Sequence[dict],
    checkpoints: Sequence[dict] = (),
    training: Sequence[dict] = (),
) -> None:
    """Write the data files of a results folder; a line of `runs` is a student that is done."""
    entries = [asdict(column) for column in columns]
    manifest = {
        "name": "s",
        "question": "",
        "swept": list(swept),
        "axis": axis,
        "baseline": None,
        "budget": None,
        "columns": [{"column": entry.pop("name")} | entry for entry in entries],
        "prompts": None,
        "notes": [],
        "provenance": {"command": "python -m distill_bench.report s"},
    }
    (folder / "sweep.json").write_text(json.dumps(manifest))
    defaults = {"role": STUDENT, "status": "done", "seed": None, "warnings": None, "reason": None}
    defaults |= dict.fromkeys([*swept, *(cost.name for cost in COSTS)])
    for name, lines in (
        ("runs", [defaults | line for line in runs]),
        ("checkpoints", checkpoints),
        ("training", training),
    ):
        pd.DataFrame(list(lines), dtype=object).to_csv(folder / f"{name}.csv", index=False)


# alpha at two cadences, three seeds; beta with a run that is done, collapsed, failed and missing
RUNS = [("alpha", s, c, 10.0 * c + s + 0.1 * c * s) for c in (1, 5) for s in (0, 1, 2)]
RUNS += [
    ("beta", 0, 1, 4.0),
    ("beta", 1, 1, None, "collapsed"),
    ("beta", 2, 1, None, None),
    ("beta", 3, 1, None, "missing"),
]
