"""results/<sweep>: data files from the store, tables and figures from the data files, and one page that stands alone.

    python -m distill_bench.report SWEEP [--baseline method=NAME,KEY=VALUE] [--budget COST]

Reads files only, so a laptop without torch rebuilds everything. Nothing here knows a method or a metric.
"""

import base64
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from distill_bench import ROOT, __version__
from distill_bench.config.yaml_files import dump_yaml
from distill_bench.report.data_files import data_files, spread
from distill_bench.report.digests import digests
from distill_bench.report.read_store import StoredRun, StoredSweep, StoreReadError, read_sweep
from distill_bench.report.results import COSTS, Column, Results, ResultsError, load
from distill_bench.report.rows import Row
from distill_bench.report.run_views import runs_of, student_runs
from distill_bench.report.tables.differences import (
    GAPS,
    against_baseline,
    cost_ratio,
    seeds_for_gaps,
    verdict,
)
from distill_bench.report.tables.files import table_files
from distill_bench.report.tables.scores import (
    CAPTION,
    differences_caption,
    equal_cost,
    equal_cost_caption,
    equal_cost_differences,
    equal_cost_differences_caption,
    holm_head,
    score_table,
    show_interval,
    show_p,
)
from distill_bench.sample.roles import TEACHER
from distill_bench.store.files import read_json, read_jsonl, write_bytes
from distill_bench.store.nested import flat

CLIP_PIXELS = 128  # longest side of an embedded clip


WALL_BYTES = 4_000_000  # of embedded clips


WALL_PROMPTS, WALL_SEEDS = 8, 3  # at most


FEW_PROMPTS = 4  # more of these come before more training seeds


class ReportError(ValueError):
    """There is nothing to report; one line that says why."""


def report(
    sweep: str | Path,
    store: Path,
    out: Path,
    baseline: Mapping[str, Any] | None = None,
    budget: float | None = None,
) -> Path:
    """Write data files, tables, figures and report.html under out/<sweep>; returns the page's path.

    Raises:
        ReportError: if there is no such sweep, no such baseline, or its rows cannot share a column. Nothing is written then.
    """
    if budget is not None and not 0 < budget < inf:
        raise ReportError(f"budget {budget:g}: a cost in forward equivalents, above 0")
    try:
        found = read_sweep(sweep, Path(store))
        files = data_files(found, baseline, budget)
        with tempfile.TemporaryDirectory() as draft:
            for name, text in files.items():
                (Path(draft) / name).write_bytes(text.encode())
            results = load(Path(draft))
        if baseline and len(rows := results.matching(baseline)) > 1:
            raise ReportError(
                f"the baseline {baseline} is {len(rows)} rows: {'; '.join(row.name for row in rows)}"
            )
        files |= table_files(results)
    except (StoreReadError, ResultsError) as error:
        raise ReportError(str(error)) from error
    folder = Path(out) / found.name
    for name, text in files.items():
        write_bytes(folder / name, text.encode())
    page = folder / "report.html"
    write_bytes(page, html(results, found, folder, _draw(folder)).encode())
    write_bytes(folder / "digests.json", (json.dumps(digests(folder), indent=1) + "\n").encode())
    return page


def _draw(folder: Path) -> Callable[[], None]:
    """Begin to draw; returns what waits for the end. Figures come from their own program, which knows only the files so far."""
    package = str(ROOT.parent)
    paths = os.pathsep.join(path for path in (package, os.environ.get("PYTHONPATH")) if path)
    command = [sys.executable, "-m", "distill_bench.report.plot", str(folder)]
    env = os.environ | {"PYTHONPATH": paths}
    drawing = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env
    )

    def wait() -> None:
        _, said = drawing.communicate()
        if drawing.returncode:
            raise ReportError(f"{' '.join(command[1:])} failed: {said.strip()[-2000:]}")

    return wait


def html(
    results: Results, found: StoredSweep, folder: Path, drawn: Callable[[], None] = lambda: None
) -> str:
    """The whole report as one page without a single outside resource; `drawn` returns when the figures are there."""
    sources = {source.run_id: source for source in found.everything}
    clips = wall(results, sources)
    drawn()
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            results=results,
            runs=student_runs(results),
            parts=page_parts(results),
            figures=_figures(folder),
            wall=clips,
            groups=[
                (row, [sources[run_id] for run_id in row.runs["run_id"]])
                for row in results.students
            ],
            origin=origin,
            config=lambda source: dump_yaml(source.config),
            costs=COSTS,
            version=__version__,
        )
    )


def origin(source: StoredRun) -> str:
    """Code, machine and job of a run's newest attempt, without what is of the process or of its folders alone."""
    own = {"pid", "time", "restart", "command", "executable", "log"}
    known = {
        k: v
        for k, v in flat(source.provenance).items()
        if k not in own and v not in (None, "", [], False)
    }
    return "; ".join(
        f"{key.rpartition('.')[2].replace('_', ' ')} {value}" for key, value in known.items()
    )


def _environment() -> Environment:
    templates = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(
        loader=templates, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(show_interval=show_interval, show_p=show_p)
    return environment


def page_parts(results: Results) -> dict[str, str]:
    """Everything of the page that the data files say, as it stands there and as `verify` looks for it: name -> HTML."""
    template = _environment().get_template("table.html.j2").module
    others = [column for column in results.columns if not column.headline]
    states = [run.status for run in student_runs(results)]
    hours = sum(run.value("train_seconds") or 0 for run in student_runs(results)) / 3600
    counts = {state: states.count(state) for state in dict.fromkeys(states)}
    made = {
        "summary": template.summary(
            results,
            student_runs(results),
            counts,
            len({run.seed for run in student_runs(results)}),
            hours,
            reading(results),
        ),
        "table of scores": template.scores(score_table(results, results.headline + COSTS)),
        "notes": template.notes(CAPTION, results.footnotes),
        "table of equal cost": template.scores(equal_cost(results))
        + template.caption(equal_cost_caption(results)),
    }
    baseline, apart, needed = (
        results.baseline,
        equal_cost_differences(results),
        seeds_for_gaps(results),
    )
    if apart:
        caption = template.caption(equal_cost_differences_caption(results))
        made["table of differences at equal cost"] = template.scores(apart) + caption
    if others:
        made["table of details"] = template.scores(score_table(results, others))
    if baseline and len(results.students) > 1:
        families = [(column, *_compared(results, column, baseline)) for column in results.headline]
        made["text on differences"] = template.about_differences(differences_caption(results))
        made["table of differences"] = template.differences(families, baseline)
    if needed:
        made["table of seeds needed"] = template.needed(needed, GAPS)
    made |= {
        run.run_id: template.run(run, results.headline, COSTS) for run in student_runs(results)
    }
    return {name: str(text) for name, text in made.items()}


def _compared(results: Results, column: Column, baseline: Row) -> tuple[str, list[dict[str, Any]]]:
    """The head of p and the lines of one score's table of differences."""
    found = against_baseline(results, column, baseline)
    bounds = [
        abs(b)
        for each, _ in found
        if each.interval
        for b in (each.interval.low, each.interval.high)
        if np.isfinite(b)
    ]
    scale = max(bounds, default=0.0)
    return holm_head(found), [
        {
            "label": each.a.label,
            "seeds": f"{each.seeds}/{len(baseline.runs)}"
            if each.seeds < len(baseline.runs)
            else str(each.seeds),
            "interval": each.interval,
            "bar": _bar(each.interval.low, each.interval.mean, each.interval.high, scale)
            if each.interval and scale
            else None,
            "p": p,
            "favours": verdict(each, p),
            "better": verdict(each, p) == each.a.label,
            "needed": each.needed,
            "cost": cost_ratio(each.a, baseline),
        }
        for each, p in found
    ]


def _bar(low: float, mean: float, high: float, scale: float) -> tuple[str, str, str] | None:
    """Left end, width and mean of an interval in percent of a bar whose middle is 0."""
    if not np.isfinite(low):
        return None
    return tuple(
        f"{value:.1f}"
        for value in (50 + 50 * low / scale, 50 * (high - low) / scale, 50 + 50 * mean / scale)
    )


def reading(results: Results) -> list[str]:
    """What the table says in words, one sentence a headline score with a direction; no more than its intervals carry."""
    sentences, baseline = [], results.baseline
    scored = score_table(results, results.headline)
    first = len(scored.heads) - len(results.headline)
    for i, column in enumerate(results.headline):
        known = [
            (row, line[first + i])
            for row, line in scored.lines
            if not row.reference and np.isfinite(line[first + i].key)
        ]
        if not column.better or len(known) < 2:
            continue
        worth = {
            "lower": lambda key: key,
            "higher": lambda key: -key,
            "one": lambda key: abs(key - 1),
        }[column.better]
        row, cell = min(known, key=lambda pair: worth(pair[1].key))
        word = {"lower": "Lowest", "higher": "Highest", "one": "Nearest to 1"}[column.better]
        clear = (
            "clearly ahead of every other row"
            if cell.best
            else "not clearly ahead of every other row"
        )
        sentence = f"{word} in {column.title}: {row.label} with {cell.text}, {clear}."
        found = against_baseline(results, column, baseline)
        better = sum(verdict(each, p) == each.a.label for each, p in found)
        worse = sum(verdict(each, p) == baseline.label for each, p in found)
        against = f"the baseline {baseline.label}"
        told = f"{better} of {len(found)} rows clearly better and {worse} clearly worse than {against}."
        if not better and not worse:
            told = f"No row is clearly better or worse than {against}{'' if baseline.done else ', which has no finished run'}."
        sentences.append(f"{sentence} {told}")
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


@dataclass(frozen=True)
class Wall:
    """Clips of every row on the same prompts and sampling seeds, for some training seeds."""

    prompts: list[tuple[str, Any]]  # with the sampling seed
    seeds: list[str]
    frames: int
    seconds: float
    tiles: list[
        tuple[str, dict[tuple[int, str], str]]
    ]  # label, and (prompt number, training seed) -> data URI
    counts: dict[
        str, tuple[int, int]
    ]  # of rows, references, prompts, training seeds: shown, and there are
    mover: str  # the row whose motion chose the prompts

    def key(self, clips: Mapping[tuple[int, str], str], prompt: int, seed: str) -> tuple[int, str]:
        """Where a row's clip is; references have one for every training seed."""
        return (prompt, seed) if (prompt, seed) in clips else (prompt, "")

    def tile(self, clips: Mapping[tuple[int, str], str], prompt: int, seed: str) -> str | None:
        return clips.get(self.key(clips, prompt, seed))


def wall(results: Results, sources: Mapping[str, StoredRun]) -> Wall | None:
    """The clips to embed, as many as WALL_BYTES hold; None where there are none.

    Every row and reference comes before more than one prompt, FEW_PROMPTS before more training seeds, these before further
    prompts. The prompts are spread from the most to the least motion of the teacher's clips.
    """
    loaded = []
    for row in results.rows:
        clips = {
            run.seed: c for run in runs_of(row) if run.scored and (c := _clips(sources[run.run_id]))
        }
        if clips:
            loaded.append((row, clips))
    manifests = [lines for row, clips in loaded if not row.reference for _, lines in clips.values()]
    manifests = manifests or [lines for _, clips in loaded for _, lines in clips.values()]
    if not manifests:
        return None
    lines = manifests[0]
    # a reference with other seeds is not the same clip
    loaded = [(row, clips) for row, clips in loaded if _alike(next(iter(clips.values()))[1], lines)]
    mover, moving = next((item for item in loaded if item[0].role == TEACHER), loaded[0])
    places: dict[str, int] = {}
    for i, line in enumerate(lines):
        places.setdefault(line["prompt"], i)
    shown = next(iter(moving.values()))[0]
    ordered = sorted(places.values(), key=lambda i: -_motion(shown[i]))

    # were every clip as large as its row's first
    sizes = {
        row.label: len(_strip(next(iter(clips.values()))[0][ordered[0]])) for row, clips in loaded
    }
    references, students = (
        [item for item in loaded if item[0].reference is kind] for kind in (True, False)
    )
    own, others = (sum(sizes[row.label] for row, _ in part) for part in (students, references))
    if own + others > WALL_BYTES:  # not one prompt: references go first, then rows
        references = [item for item in references if item[0] is mover]
        others = sum(sizes[row.label] for row, _ in references)
    if own + others > WALL_BYTES:
        rows = [row for row, _ in students]
        kept = _kept(rows, results.baseline, int(WALL_BYTES / own * len(rows)))
        students = [item for item, keep in zip(students, kept, strict=True) if keep]
        own = sum(sizes[row.label] for row, _ in students)
    every = list(dict.fromkeys(seed for _, clips in students for seed in clips)) or [""]
    few = min(FEW_PROMPTS, len(ordered))
    fitting = [n for n in range(1, WALL_SEEDS + 1) if (own * n + others) * few <= WALL_BYTES]
    seeds = every[: max(fitting, default=1)]
    count = min(WALL_PROMPTS, len(ordered), max(1, int(WALL_BYTES / (own * len(seeds) + others))))
    indices = [ordered[round(k * (len(ordered) - 1) / max(1, count - 1))] for k in range(count)]

    tiles = []
    for row, clips in references + students:
        own_tiles = {
            (number, seed): _strip(frames[index])
            for seed, (frames, _) in clips.items()
            if row.reference or seed in seeds
            for number, index in enumerate(indices)
            if index < len(frames)
        }
        tiles.append((row.label, own_tiles))
    prompts = [(lines[i]["prompt"], lines[i].get("seed")) for i in indices]
    counts = {
        "row": (len(students), len(results.students)),
        "reference": (len(references), len(results.references)),
        "prompt": (count, len(ordered)),
        "training seed": (len(seeds), len({run.seed for run in student_runs(results)})),
    }
    return Wall(
        prompts, seeds, shown.shape[1], shown.shape[1] / lines[0]["fps"], tiles, counts, mover.label
    )


def _motion(clip: np.ndarray) -> float:
    """Mean change of a clip's pixels (T, 3, H, W) from frame to frame."""
    return float(np.abs(np.diff(clip.astype(np.int16), axis=0)).mean()) if len(clip) > 1 else 0.0


def _kept(rows: Sequence[Row], baseline: Row | None, room: int) -> list[bool]:
    """Which of the rows to show in `room`: the baseline and a row of each method whatever it is, the others evenly spread."""
    methods = [row.method for row in rows]
    must = {i for i, row in enumerate(rows) if row is baseline or methods.index(row.method) == i}
    rest = spread([i for i in range(len(rows)) if i not in must], max(0, room - len(must)))
    return [i in must or i in rest for i in range(len(rows))]


def _alike(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> bool:
    return [(line["prompt"], line.get("seed")) for line in a] == [
        (line["prompt"], line.get("seed")) for line in b
    ]


def _clips(source: StoredRun) -> tuple[np.ndarray, list[dict[str, Any]]] | None:
    """The newest samples of a folder: frames (N, T, 3, H, W) mapped, not loaded, and the manifest's lines."""
    places = sorted(
        (p for p in (source.folder / "samples").glob("*") if p.name.isdigit()),
        key=lambda p: int(p.name),
    )
    for place in [source.folder, *places][::-1]:
        if (place / "clips.npy").is_file() and (place / "manifest.jsonl").is_file():
            rate = {"fps": (read_json(place / "row.json") or {}).get("fps", 8)}
            return np.load(place / "clips.npy", mmap_mode="r"), [
                line | rate for line in read_jsonl(place / "manifest.jsonl")
            ]
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
    strip.save(
        data,
        "WEBP",
        **(
            {"lossless": True, "quality": 80, "method": 4}
            if small
            else {"quality": 70, "method": 4}
        ),
    )
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()
