"""results/<sweep>: data files from the store, tables and figures from the data files, and one page that stands alone.

    python -m distill_bench.report SWEEP [--baseline method=NAME,KEY=VALUE] [--budget COST]

Reads files only, so a laptop without torch rebuilds everything. Nothing here knows a method or a metric.
"""

import argparse
import base64
import io
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from distill_bench import __version__
from distill_bench.gather import GatherError, Source, Sweep, data_files, read_sweep, spread
from distill_bench.results import COST, COSTS, Column, Results, ResultsError, Row, load, mapping
from distill_bench.store import flat, read_json, read_jsonl, write_bytes
from distill_bench.tables import (
    CAPTION,
    DIFFERENCES,
    GAPS,
    against_baseline,
    cost_ratio,
    equal_cost,
    equal_cost_caption,
    seeds_for_gaps,
    show_interval,
    show_p,
    table,
    tables,
    verdict,
)

CLIP_PIXELS = 128  # longest side of an embedded clip
WALL_BYTES = 2_500_000  # of embedded clips
WALL_ROWS, WALL_PROMPTS, WALL_SEEDS = 30, 8, 3


class ReportError(ValueError):
    """There is nothing to report; one line that says why."""


def report(
    sweep: str | Path, store: Path, out: Path, baseline: Mapping[str, Any] | None = None, budget: float | None = None
) -> Path:
    """Write data files, tables, figures and report.html under out/<sweep>; returns the page's path.

    Raises:
        ReportError: if there is no such sweep, no such baseline, or its rows cannot share a column.
    """
    try:
        found = read_sweep(sweep, Path(store))
        folder = Path(out) / found.name
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in data_files(found, baseline, budget).items():
            write_bytes(folder / name, text.encode())
        results = load(folder)
        for name, text in tables(results).items():
            write_bytes(folder / name, text.encode())
    except (GatherError, ResultsError) as error:
        raise ReportError(str(error)) from error
    _draw(folder)
    page = folder / "report.html"
    write_bytes(page, html(results, found, folder).encode())
    return page


def _draw(folder: Path) -> None:
    """Figures come from their own program, which knows only the files written so far."""
    package = str(Path(__file__).resolve().parent.parent)
    paths = os.pathsep.join(path for path in (package, os.environ.get("PYTHONPATH")) if path)
    command = [sys.executable, "-m", "distill_bench.plot", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
    if done.returncode:
        raise ReportError(f"{' '.join(command[1:])} failed: {done.stderr.strip()[-2000:]}")


# --- the page ---


def html(results: Results, found: Sweep, folder: Path) -> str:
    """The whole report as one page without a single outside resource."""
    states = [run.status for run in results.runs]
    seconds = sum(run.value("train_seconds") or 0 for run in results.runs)
    sources = {source.run_id: source for source in found.everything}
    return _environment().get_template("report.html.j2").render(
        results=results,
        tables=page_tables(results),
        reading=reading(results),
        states={state: states.count(state) for state in dict.fromkeys(states)},
        hours=seconds / 3600,
        seeds=len({run.seed for run in results.runs}),
        figures=_figures(folder),
        wall=wall(results, sources),
        groups=[(row, [sources[run.run_id] for run in row.runs]) for row in results.students],
        origin=origin,
        config=lambda source: yaml.safe_dump(source.config, sort_keys=False),
        equal_cost_caption=equal_cost_caption(results),
        caption=CAPTION.format(bold="Bold"),
        about_differences=DIFFERENCES,
        gaps=GAPS,
        needed=seeds_for_gaps(results),
        costs=COSTS,
        version=__version__,
    )  # fmt: skip


def origin(source: Source) -> str:
    """Code, machine and job of a run's newest attempt, without what is of the process or of its folders alone."""
    own = {"pid", "time", "restart", "command", "executable", "log"}
    known = {k: v for k, v in flat(source.provenance).items() if k not in own and v not in (None, "", [], False)}
    return "; ".join(f"{key.rpartition('.')[2].replace('_', ' ')} {value}" for key, value in known.items())


def _environment() -> Environment:
    templates = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(loader=templates, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(show_interval=show_interval, show_p=show_p)
    return environment


def page_tables(results: Results) -> dict[str, str]:
    """The tables as they stand in the page, which `verify` looks for: name -> HTML."""
    template = _environment().get_template("table.html.j2").module
    others = [column for column in results.columns if not column.headline]
    made = {"scores": template.scores(table(results, results.main + COSTS)), "equal_cost": template.scores(equal_cost(results))}
    if others:
        made["details"] = template.scores(table(results, others))
    baseline = results.baseline
    if baseline and len(results.students) > 1:
        families = [(column, _compared(results, column, baseline)) for column in results.main]
        made["differences"] = template.differences(families, baseline)
    return {name: str(text) for name, text in made.items()}


def _compared(results: Results, column: Column, baseline: Row) -> list[dict[str, Any]]:
    """The lines of one score's table of differences."""
    found = against_baseline(results, column, baseline)
    bounds = [abs(b) for each, _ in found if each.interval for b in (each.interval.low, each.interval.high) if np.isfinite(b)]
    scale = max(bounds, default=0.0)
    return [
        {
            "label": each.a.label,
            "seeds": f"{each.seeds}/{len(baseline.runs)}" if each.seeds < len(baseline.runs) else str(each.seeds),
            "interval": each.interval,
            "bar": _bar(each.interval.low, each.interval.mean, each.interval.high, scale) if each.interval and scale else None,
            "p": p,
            "favours": verdict(each, p),
            "better": verdict(each, p) == each.a.label,
            "needed": each.needed,
            "cost": cost_ratio(each.a, baseline, COST),
        }
        for each, p in found
    ]


def _bar(low: float, mean: float, high: float, scale: float) -> tuple[str, str, str] | None:
    """Left end, width and mean of an interval in percent of a bar whose middle is 0."""
    if not np.isfinite(low):
        return None
    return tuple(f"{value:.1f}" for value in (50 + 50 * low / scale, 50 * (high - low) / scale, 50 + 50 * mean / scale))


def reading(results: Results) -> list[str]:
    """What the table says in words, one sentence a headline score with a direction; no more than its intervals carry."""
    sentences, baseline = [], results.baseline
    scored = table(results, results.main)
    first = len(scored.heads) - len(results.main)
    for i, column in enumerate(results.main):
        known = [(row, line[first + i]) for row, line in scored.lines if not row.reference and np.isfinite(line[first + i].key)]
        if not column.better or len(known) < 2:
            continue
        worth = {"lower": lambda key: key, "higher": lambda key: -key, "one": lambda key: abs(key - 1)}[column.better]
        row, cell = min(known, key=lambda pair: worth(pair[1].key))
        word = {"lower": "Lowest", "higher": "Highest", "one": "Nearest to 1"}[column.better]
        clear = "clearly ahead of every other row" if cell.best else "not clearly ahead of every other row"
        sentence = f"{word} in {column.title}: {row.label} with {cell.text}, {clear}."
        found = against_baseline(results, column, baseline)
        better = sum(verdict(each, p) == each.a.label for each, p in found)
        worse = sum(verdict(each, p) == baseline.label for each, p in found)
        against = f"the baseline {baseline.label}"
        told = f"{better} of {len(found)} rows clearly better and {worse} clearly worse than {against}."
        sentences.append(f"{sentence} {told if better or worse else f'No row is clearly better or worse than {against}.'}")
    short = [f"{row.label} {row.count}" for row in results.students if not row.complete]
    if short:
        sentences.append(f"Rows that do not have all their runs: {'; '.join(short)}.")
    return sentences


def _figures(folder: Path) -> list[dict[str, Any]]:
    """The figures that plot listed, as inline SVG that follows the page's colours."""
    figures = []
    for line in read_jsonl(folder / "figures" / "index.jsonl"):
        svg = (folder / "figures" / f"{line['name']}.svg").read_text()
        svg = svg[svg.index("<svg") :]
        prefix = f"{line['name']}-"
        svg = re.sub(r'\bid="', f'id="{prefix}', svg)
        svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}", svg)
        for colour, variable in INK.items():
            svg = svg.replace(colour, f"var({variable})")
        figures.append(line | {"svg": svg})
    return figures


# The inks of plot's style that the page sets for light and dark.
INK = {"#1b1f24": "--text", "#d5dae0": "--rule", "#59636e": "--quiet", "#fefefe": "--ground"}


# --- clips ---


@dataclass(frozen=True)
class Wall:
    """Clips of every row on the same prompts and sampling seeds, for some training seeds."""

    prompts: list[tuple[str, Any]]  # with the sampling seed
    seeds: list[str]
    frames: int
    seconds: float
    tiles: list[tuple[str, dict[tuple[int, str], str]]]  # label, and (prompt number, training seed) -> data URI

    def tile(self, clips: Mapping[tuple[int, str], str], prompt: int, seed: str) -> str | None:
        """A row's clip; references have one for every training seed."""
        return clips.get((prompt, seed)) or clips.get((prompt, ""))


def wall(results: Results, sources: Mapping[str, Source]) -> Wall | None:
    """The clips to embed: as many prompts and training seeds as WALL_BYTES hold, evenly spread; None where there are none."""
    loaded = []
    for row in results.rows:
        clips = {run.seed: c for run in row.runs if run.scored and (c := _clips(sources[run.run_id]))}
        if clips:
            loaded.append((row, clips))
    manifests = [lines for row, clips in loaded if not row.reference for _, lines in clips.values()]
    manifests = manifests or [lines for _, clips in loaded for _, lines in clips.values()]
    if not manifests:
        return None
    lines = manifests[0]
    # a reference with other seeds is not the same clip
    loaded = [(row, clips) for row, clips in loaded if _alike(next(iter(clips.values()))[1], lines)]
    references = [item for item in loaded if item[0].reference]
    loaded = references + spread([item for item in loaded if not item[0].reference], WALL_ROWS)
    seeds = list(dict.fromkeys(seed for row, clips in loaded if not row.reference for seed in clips))[:WALL_SEEDS] or [""]
    first = next(iter(loaded[0][1].values()))[0]
    # what one prompt takes, were every clip as large as its row's first
    one = sum(len(_strip(next(iter(clips.values()))[0][0])) * (1 if row.reference else len(seeds)) for row, clips in loaded)
    count = int(WALL_BYTES / one)
    places: dict[str, int] = {}
    for i, line in enumerate(lines):
        places.setdefault(line["prompt"], i)
    indices = spread(list(places.values()), max(1, min(WALL_PROMPTS, count)))
    tiles = []
    for row, clips in loaded:
        own = {
            (number, seed): _strip(frames[index])
            for seed, (frames, _) in clips.items() if row.reference or seed in seeds
            for number, index in enumerate(indices) if index < len(frames)
        }  # fmt: skip
        tiles.append((row.label, own))
    prompts = [(lines[i]["prompt"], lines[i].get("seed")) for i in indices]
    return Wall(prompts, seeds, first.shape[1], first.shape[1] / lines[0]["fps"], tiles)


def _alike(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> bool:
    return [(line["prompt"], line.get("seed")) for line in a] == [(line["prompt"], line.get("seed")) for line in b]


def _clips(source: Source) -> tuple[np.ndarray, list[dict[str, Any]]] | None:
    """The newest samples of a folder: frames (N, T, 3, H, W) mapped, not loaded, and the manifest's lines."""
    places = sorted((p for p in (source.folder / "samples").glob("*") if p.name.isdigit()), key=lambda p: int(p.name))
    for place in [source.folder, *places][::-1]:
        if (place / "clips.npy").is_file() and (place / "manifest.jsonl").is_file():
            rate = {"fps": (read_json(place / "row.json") or {}).get("fps", 8)}
            return np.load(place / "clips.npy", mmap_mode="r"), [line | rate for line in read_jsonl(place / "manifest.jsonl")]
    return None


def _strip(clip: np.ndarray) -> str:
    """A clip (T, 3, H, W) uint8 as a data URI of its frames side by side, which the page plays; lossless while it is small."""
    frames = [Image.fromarray(np.ascontiguousarray(frame.transpose(1, 2, 0))) for frame in clip]
    small = max(frames[0].size) <= CLIP_PIXELS
    if not small:
        for frame in frames:
            frame.thumbnail((CLIP_PIXELS, CLIP_PIXELS))
    width, height = frames[0].size
    strip = Image.new("RGB", (width * len(frames), height))
    for i, frame in enumerate(frames):
        strip.paste(frame, (i * width, 0))
    data = io.BytesIO()
    strip.save(data, "WEBP", **({"lossless": True, "quality": 80, "method": 4} if small else {"quality": 70, "method": 4}))
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: report one sweep."""
    parser = argparse.ArgumentParser(prog="distill_bench.report", description="tables, figures and a page of a sweep")
    parser.add_argument("sweep", help="the sweep's YAML, or its name")
    parser.add_argument("--store", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument(
        "--baseline", metavar="KEY=VALUE,...", help="row that differences are taken to; default: the sweep's first"
    )
    parser.add_argument("--budget", type=float, help="cost of the equal-cost table; default: the largest that all runs reach")
    options = parser.parse_args(argv)
    try:
        baseline = mapping(options.baseline) if options.baseline else None
        print(report(options.sweep, options.store, options.out, baseline, options.budget))
    except (ReportError, ResultsError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
