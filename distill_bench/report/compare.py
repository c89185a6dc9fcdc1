"""What two runs differ in: configs, code and scores, with paired intervals over clips where the clips are the same.

    distill-bench compare RUN_A RUN_B [--store runs]

Needs no torch. One run each says nothing of other training seeds: the intervals are over clips alone.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from distill_bench.config.schema import RunConfig
from distill_bench.report.gather import GatherError, Source, number, read_run
from distill_bench.report.results import COSTS
from distill_bench.report.stats import Interval, crossed_interval
from distill_bench.report.tables import show_interval
from distill_bench.store.files import read_jsonl
from distill_bench.store.nested import flat


class CompareError(ValueError):
    """There is no such run; one line that says what was looked for."""


def find_run(name: str, store: Path) -> Source:
    """A run by its folder, or by its id or the beginning of it in the store.

    Raises:
        CompareError: if there is none, or several begin so.
    """
    for folder in (Path(name), store / name):
        if (folder / "run.yaml").is_file():
            return read_run(folder.resolve())
    found = sorted(
        path.parent for path in store.glob("*/run.yaml") if path.parent.name.startswith(name)
    )
    if len(found) == 1:
        return read_run(found[0])
    told = (
        f"could be {', '.join(path.name for path in found[:5])}"
        if found
        else f"is neither a run folder nor a run in {store}"
    )
    raise CompareError(f"{name!r} {told}")


def config_differences(a: Source, b: Source) -> list[tuple[str, Any, Any]]:
    """Keys of the resolved configs, and of code and hardware, that differ; fields that came after a run have defaults."""
    mine, theirs = ({"method": run.method} | flat(_with_defaults(run.config)) for run in (a, b))
    for key in ("code_fingerprint", "commit", "version", "hardware", "protocol"):
        mine[key], theirs[key] = a.known(key), b.known(key)
    keys = dict.fromkeys([*mine, *theirs])
    return [
        (key, mine.get(key), theirs.get(key))
        for key in keys
        if mine.get(key) != theirs.get(key) and key != "method.name"
    ]


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    fields = {
        key: field.get_default()
        for key, field in RunConfig.model_fields.items()
        if not field.is_required()
    }
    protocol = fields["protocol"].model_dump(mode="json") | config.get("protocol", {})
    return fields | dict(config) | {"protocol": protocol}


def score_differences(a: Source, b: Source) -> list[tuple[str, float | None, float | None, str]]:
    """Name, both values and B - A of every score and cost, in words; why not, where the two do not compare."""
    lines, names = [], _names(a.scores | b.scores)
    drawn = _prompts(a)
    prompts = [prompt for prompt, _ in drawn] if drawn == _prompts(b) else None
    for column in dict.fromkeys([*a.scores, *b.scores]):
        mine, theirs = a.scores.get(column, {}), b.scores.get(column, {})
        values = number(mine.get("value")), number(theirs.get("value"))
        unlike = [
            key
            for key in ("protocol", "version", "extractor")
            if mine and theirs and mine.get(key) != theirs.get(key)
        ]
        if None in values:
            told = "—"
        elif unlike:
            told = f"not comparable: {unlike[0]} {mine.get(unlike[0])} and {theirs.get(unlike[0])}"
        else:
            told = show_interval(_difference(mine, theirs, prompts), sign="+")
        lines.append((names[column], *values, told))
    for cost in COSTS:
        mine, theirs = (number(run.result.get(cost.column)) for run in (a, b))
        told = f"{theirs / mine:.2f} x" if mine and theirs else "—"
        lines.append((f"{cost.title} ({cost.unit})", mine, theirs, told))
    return lines


def _names(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Column -> title with unit, and with extractor or column where another column is called so too."""
    names = {}
    for column, score in scores.items():
        unit = score.get("unit")
        names[column] = (score.get("title") or column) + (f" ({unit})" if unit else "")
    for more in (lambda column: scores[column].get("extractor"), lambda column: column):
        counts = Counter(names.values())
        names = {
            c: f"{name} [{more(c)}]" if counts[name] > 1 and more(c) else name
            for c, name in names.items()
        }
    return names


def _difference(a: dict[str, Any], b: dict[str, Any], prompts: Sequence[str] | None) -> Interval:
    """Over clips where both have the same, those of one prompt together."""
    mine, theirs = a.get("per_clip") or [], b.get("per_clip") or []
    if prompts and len(mine) == len(theirs) == len(prompts):
        return crossed_interval(np.subtract(theirs, mine)[None], clusters=prompts, seeds_vary=False)
    difference = b["value"] - a["value"]
    return Interval(difference, np.nan, np.nan, 1)


def _prompts(run: Source) -> list[tuple[str, int]]:
    folders = sorted(
        (p for p in (run.folder / "samples").glob("*") if p.name.isdigit()),
        key=lambda p: int(p.name),
    )
    return (
        [(line["prompt"], line["seed"]) for line in read_jsonl(folders[-1] / "manifest.jsonl")]
        if folders
        else []
    )


def show(a: Source, b: Source, console: Console) -> None:
    """Print both tables."""
    console.print(
        f"A  {a.run_id}  {a.status}", f"B  {b.run_id}  {b.status}", sep="\n", highlight=False
    )
    configs = Table("config", "A", "B", title="What differs", title_justify="left")
    for key, mine, theirs in config_differences(a, b):
        configs.add_row(
            key, *("—" if value in (None, "") else escape(str(value)) for value in (mine, theirs))
        )
    console.print(configs if configs.rows else "The configs are the same.")
    scores = Table(
        "score", title="Scores (± over clips, on the same prompts and noise)", title_justify="left"
    )
    for head in ("A", "B", "B - A"):
        scores.add_column(head, justify="right")
    for title, mine, theirs, told in score_differences(a, b):
        scores.add_row(
            escape(title),
            *("—" if value is None else f"{value:.4g}" for value in (mine, theirs)),
            escape(told),
        )
    console.print(scores)
    for run, name in ((a, "A"), (b, "B")):
        if run.reason:
            console.print(f"{name} {run.status}: {run.reason}", highlight=False, markup=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: print the differences of two runs."""
    parser = argparse.ArgumentParser(
        prog="distill-bench compare", description="differences of two runs' configs and scores"
    )
    parser.add_argument(
        "run", nargs=2, metavar="RUN", help="a run folder, or a run's id or the beginning of it"
    )
    parser.add_argument("--store", type=Path, default=Path("runs"))
    options = parser.parse_args(argv)
    try:
        a, b = (find_run(name, options.store) for name in options.run)
    except (CompareError, GatherError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    show(a, b, Console(width=None if sys.stdout.isatty() else 120))
    return 0


if __name__ == "__main__":
    sys.exit(main())
