"""Compare two runs: configs, code, and scores with paired intervals over clips.

    distill-bench compare RUN_A RUN_B [--store runs]

The intervals cover clips only: single runs say nothing about other training seeds. Needs no torch.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from distill_bench.config.overrides import flat_keys
from distill_bench.config.schema import RunConfig
from distill_bench.report.read_store import (
    COMPARABLE,
    StoredRun,
    StoreReadError,
    finite,
    read_run,
    sample_folders,
)
from distill_bench.report.results import COSTS
from distill_bench.report.stats import Interval, crossed_interval
from distill_bench.report.tables.scores import show_interval
from distill_bench.store.files import read_jsonl

RECORDED = ("code_fingerprint", "commit", "version", "hardware", "protocol")  # beside the config


class CompareError(ValueError):
    """No run matches the given name, or several do; the message is one line."""


def find_run(name: str, store: Path) -> StoredRun:
    """Read a run, given by its folder, its id, or the beginning of its id.

    Raises:
        CompareError: if no run or several runs match.
    """
    for folder in (Path(name), store / name):
        if (folder / "run.yaml").is_file():
            return read_run(folder.resolve())
    folders = sorted(path.parent for path in store.glob("*/run.yaml"))
    matches = [folder for folder in folders if folder.name.startswith(name)]
    if len(matches) == 1:
        return read_run(matches[0])
    if matches:
        candidates = ", ".join(folder.name for folder in matches[:5])
        raise CompareError(f"{name!r} matches several runs: {candidates}")
    raise CompareError(f"{name!r} is neither a run folder nor a run in {store}")


def config_differences(a: StoredRun, b: StoredRun) -> list[tuple[str, Any, Any]]:
    """Return the keys of config, code and hardware that differ, with both values.

    A config without a field, written before the field existed, counts as having its default.
    """
    fields_a, fields_b = _fields(a), _fields(b)
    return [
        (key, fields_a.get(key), fields_b.get(key))
        for key in dict.fromkeys([*fields_a, *fields_b])
        if fields_a.get(key) != fields_b.get(key) and key != "method.name"
    ]


def _fields(run: StoredRun) -> dict[str, Any]:
    fields = {"method": run.method} | flat_keys(_with_defaults(run.config))
    return fields | {key: run.known(key) for key in RECORDED}


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {
        key: field.get_default()
        for key, field in RunConfig.model_fields.items()
        if not field.is_required()
    }
    protocol = defaults["protocol"].model_dump(mode="json") | config.get("protocol", {})
    return defaults | dict(config) | {"protocol": protocol}


def score_differences(
    a: StoredRun, b: StoredRun
) -> list[tuple[str, float | None, float | None, str]]:
    """Return name, value of a, value of b, and b - a as text, for every score and cost.

    If two scores cannot be compared, the text is the reason. For costs it is the ratio b / a.
    """
    names = _names(a.scores | b.scores)
    clips = _clips(a)
    prompts = [prompt for prompt, _ in clips] if clips == _clips(b) else None
    lines = []
    for column in dict.fromkeys([*a.scores, *b.scores]):
        score_a, score_b = a.scores.get(column, {}), b.scores.get(column, {})
        value_a, value_b = finite(score_a.get("value")), finite(score_b.get("value"))
        unlike = [key for key in COMPARABLE if score_a.get(key) != score_b.get(key)]
        if value_a is None or value_b is None:
            difference = "—"
        elif unlike:
            key = unlike[0]
            difference = f"not comparable: {key} {score_a.get(key)} and {score_b.get(key)}"
        else:
            difference = show_interval(clip_difference(score_a, score_b, prompts), sign="+")
        lines.append((names[column], value_a, value_b, difference))
    for cost in COSTS:
        cost_a, cost_b = finite(a.result.get(cost.name)), finite(b.result.get(cost.name))
        ratio = f"{cost_b / cost_a:.2f} x" if cost_a and cost_b else "—"
        lines.append((f"{cost.title} ({cost.unit})", cost_a, cost_b, ratio))
    return lines


def _names(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Name columns by title and unit; to equal names, append the extractor, then the column."""
    names = {}
    for column, score in scores.items():
        unit = score.get("unit")
        names[column] = (score.get("title") or column) + (f" ({unit})" if unit else "")
    extractors = {column: score.get("extractor") for column, score in scores.items()}
    for details in (extractors, {column: column for column in scores}):
        counts = Counter(names.values())
        for column, name in names.items():
            if counts[name] > 1 and details[column]:
                names[column] = f"{name} [{details[column]}]"
    return names


def clip_difference(
    a: Mapping[str, Any], b: Mapping[str, Any], prompts: Sequence[str] | None
) -> Interval:
    """Return b - a of one score, with an interval over clips.

    There is no interval if the score has no values per clip, or the clips of the runs differ.

    Args:
        prompts: one per clip, the same for both runs; clips of one prompt are resampled together.
            None: the clips differ.
    """
    clips_a, clips_b = a.get("per_clip") or [], b.get("per_clip") or []
    if prompts and len(clips_a) == len(clips_b) == len(prompts):
        differences = np.subtract(clips_b, clips_a)[None]
        return crossed_interval(differences, clusters=prompts, seeds_vary=False)
    return Interval(b["value"] - a["value"], np.nan, np.nan, 1)


def _clips(run: StoredRun) -> list[tuple[str, int]]:
    """Prompt and sampling seed of each clip in a run's newest samples."""
    folders = sample_folders(run.folder)
    lines = read_jsonl(folders[-1] / "manifest.jsonl") if folders else []
    return [(line["prompt"], line["seed"]) for line in lines]


def print_comparison(a: StoredRun, b: StoredRun, console: Console) -> None:
    """Print both tables of differences."""
    for letter, run in (("A", a), ("B", b)):
        console.print(f"{letter}  {run.run_id}  {run.status}", highlight=False)
    configs = Table("config", "A", "B", title="Differences", title_justify="left")
    for key, *values in config_differences(a, b):
        configs.add_row(key, *("—" if v in (None, "") else str(v) for v in values))
    console.print(configs if configs.rows else "The configs are the same.")
    title = "Scores (± over clips, on the same prompts and noise)"
    scores = Table("score", title=title, title_justify="left")
    for head in ("A", "B", "B - A"):
        scores.add_column(head, justify="right")
    for name, value_a, value_b, difference in score_differences(a, b):
        values = ("—" if value is None else f"{value:.4g}" for value in (value_a, value_b))
        scores.add_row(name, *values, difference)
    console.print(scores)
    for letter, run in (("A", a), ("B", b)):
        if run.reason:
            console.print(f"{letter} {run.status}: {run.reason}", highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: print the differences between two runs."""
    parser = argparse.ArgumentParser(
        prog="distill-bench compare", description="Compare config, code and scores of two runs."
    )
    parser.add_argument(
        "run", nargs=2, metavar="RUN", help="folder, id or beginning of the id of a run"
    )
    parser.add_argument(
        "--store", type=Path, default=Path("runs"), help="folder of the runs; default: runs"
    )
    options = parser.parse_args(argv)
    try:
        a, b = (find_run(name, options.store) for name in options.run)
    except (CompareError, StoreReadError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    width = None if sys.stdout.isatty() else 120
    print_comparison(a, b, Console(width=width, markup=False, emoji=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
