"""Stores written file by file, as the stages of a sweep leave them, for the tests of what reads them."""

import json
from zlib import crc32

import numpy as np
import yaml

PROMPTS = [
    "a red circle moves left",
    "a blue square moves up & 10% right",
    "a green cross stands still",
]


def score(column, value, **other):
    line = {
        "metric": column,
        "column": column,
        "value": value,
        "per_clip": None,
        "sd": None,
        "n": 3,
        "version": 1,
    }
    line |= {
        "extractor": None,
        "protocol": "p1",
        "unit": "",
        "better": "lower",
        "title": column.title(),
        "headline": True,
    }
    return line | other


def scores(distance, seed=0):
    """Lines of metrics.jsonl: a distance, a score with clips, a detail."""
    speed = [round(1 / distance + 0.1 * clip + 0.01 * seed, 6) for clip in range(3)]
    return [
        score("distance", distance, extractor="net-1", sd=0.25),
        score("speed", float(np.mean(speed)), better="one", per_clip=speed),
        score("detail", 0.5 + seed / 10, better=None, headline=False),
    ]


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_clips(folder, shade, first_seed=7):
    folder.mkdir(parents=True, exist_ok=True)
    frames = (
        np.full((3, 4, 3, 8, 8), shade, np.uint8)
        + np.arange(4, dtype=np.uint8)[:, None, None, None]
    )
    np.save(folder / "clips.npy", frames)
    write_lines(
        folder / "manifest.jsonl",
        [{"index": i, "prompt": p, "seed": first_seed + i} for i, p in enumerate(PROMPTS)],
    )


def write_run(store, method, seed, cadence, distance, status="done", /, **fields):
    """A run's folder, evaluated after 10 and 20 updates; status None: it failed, "missing": it never started."""
    run_id = f"{method}-s{seed}-{crc32(f'{method}{cadence}{fields}'.encode()):012x}"
    folder = store / run_id
    folder.mkdir(parents=True)
    config = {
        "method": {"name": method, "weight": 1.0},
        "seed": seed,
        "fake_score_updates": cadence,
        "nfe": 4,
    } | fields
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    if status == "missing":
        return run_id
    attempt = folder / "attempts" / "001"
    attempt.mkdir(parents=True)
    (attempt / "start.json").write_text(
        json.dumps({"commit": "abc123", "host": "node1", "code_fingerprint": "c1"})
    )
    if status is None:
        (attempt / "exit.json").write_text(
            json.dumps({"status": "error", "error": "Traceback\nValueError: out of <luck>"})
        )
        return run_id
    cost = 1000.0 * (1 + cadence)
    result = {
        "run_id": run_id,
        "method": method,
        "seed": seed,
        "status": status,
        "student_updates": 20,
    }
    result |= {
        "fake_score_updates": cadence,
        "nfe": 4,
        "train_seconds": 10.0 + seed,
        "cost_forward_equivalents": cost,
    }
    result |= {"peak_memory_gib": 0.5, "protocol": "p1", "version": "0.1.0"}
    if status == "collapsed":
        result["reason"] = "the latents are constant at student update 15"
    (folder / "result.json").write_text(json.dumps(result))
    lines = [
        {
            "student_updates": u,
            "student_loss": 9.0 / u,
            "seconds": u / 2,
            "cost_forward_equivalents": cost * u / 20,
        }
        | {f"gap/{sigma}": sigma * u for sigma in (0.1, 0.5, 0.9)}
        for u in (1, 10, 20)
    ]
    write_lines(folder / "train.jsonl", lines)
    write_lines(folder / "samples" / "10" / "metrics.jsonl", scores(3.0 * (distance or 10.0), seed))
    if status == "done":
        write_lines(folder / "metrics.jsonl", scores(distance, seed))
        write_clips(folder / "samples" / "20", 40 * cadence)
    return run_id


def write_store(tmp_path, runs, references=("data", "teacher"), **manifest):
    """A store with a sweep called `speed`; `runs` are the arguments of write_run."""
    store = tmp_path / "runs"
    ids = [write_run(store, *run) for run in runs]
    kinds = {}
    for i, kind in enumerate(references):
        write_clips(store / "references" / kind, 200)
        write_lines(store / "references" / kind / "metrics.jsonl", scores(1.0 + i))
        (store / "references" / kind / "row.json").write_text(
            json.dumps({"kind": kind, "protocol": "p1"})
        )
        kinds[kind] = f"references/{kind}"
    (store / "sweeps").mkdir(parents=True)
    about = {
        "name": "speed",
        "question": "Does a faster fake_score pay?",
        "run_ids": ids,
        "references": kinds,
    }
    about["axes"] = {"method": ["alpha", "beta"], "fake_score_updates": [1, 5], "seed": [0, 1, 2]}
    (store / "sweeps" / "speed.json").write_text(json.dumps(about | manifest))
    return store


# alpha at two cadences, three seeds; beta with one run done, one collapsed, one failed and one that never started
RUNS = [("alpha", s, c, 10.0 * c + s + 0.1 * c * s) for c in (1, 5) for s in (0, 1, 2)]
RUNS += [
    ("beta", 0, 1, 4.0),
    ("beta", 1, 1, None, "collapsed"),
    ("beta", 2, 1, None, None),
    ("beta", 3, 1, None, "missing"),
]
