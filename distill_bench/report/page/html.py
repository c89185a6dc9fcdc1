"""Build report.html from results, figures and clips; the text is in the templates."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from distill_bench import __version__
from distill_bench.config.yaml_files import dump_yaml
from distill_bench.report.page.sentences import findings
from distill_bench.report.page.wall import wall
from distill_bench.report.read_store import StoredRun, StoredSweep, is_further_sampling
from distill_bench.report.results import COSTS, Column, Results
from distill_bench.report.rows import Row
from distill_bench.report.stats import Interval
from distill_bench.report.tables import scores as tables
from distill_bench.report.tables.contrasts import (
    NOTES,
    by_contrast,
    contrast_grid,
    contrasts_caption,
    estimates,
    sides,
)
from distill_bench.report.tables.differences import (
    GAPS,
    Difference,
    against_baseline,
    cost_ratio,
    seeds_for_gaps,
    verdict,
)
from distill_bench.sample.reference_kinds import STUDENT
from distill_bench.store.files import read_jsonl
from distill_bench.store.nested import flat

# colours of figures/style.py -> CSS variables of the page, for its light and dark themes
INK = {"#1b1f24": "--text", "#d5dae0": "--rule", "#59636e": "--quiet", "#fefefe": "--ground"}
PROCESS = {"pid", "time", "restart", "command", "executable", "log"}  # not shown as provenance


def render_page(results: Results, stored: StoredSweep, folder: Path) -> str:
    """Build the page.

    Args:
        stored: the runs in the store, for clips, configs and provenance.
        folder: results folder, with its figures.
    """
    runs = {run.run_id: run for run in stored.everything}
    students = results.runs[results.runs["role"] == STUDENT]
    details = [column for column in results.columns if not column.headline]
    environment = _environment()
    template = environment.get_template("report.html.j2")
    return template.render(
        results=results,
        runs=students,
        trained=students[~students["run_id"].map(is_further_sampling)],
        findings=findings(results),
        contrasts=_contrast_lines(results),
        scores=tables.score_table(results, [*results.headline, *COSTS]),
        details=tables.score_table(results, details) if details else None,
        equal_cost=tables.equal_cost(results),
        equal_cost_differences=tables.equal_cost_differences(results),
        families=_families(results),
        seeds_needed=seeds_for_gaps(results),
        gaps=GAPS,
        tables=tables,
        figures=_figures(folder),
        wall=wall(results, runs),
        groups=_groups(results, runs),
        costs=COSTS,
        version=__version__,
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        show_interval=tables.show_interval,
        show_p=tables.show_p,
        contrasts_caption=contrasts_caption,
    )
    environment.filters.update(number=_number, provenance=_provenance, breakable=_breakable)
    environment.filters["yaml"] = dump_yaml
    return environment


def _groups(
    results: Results, stored: dict[str, StoredRun]
) -> list[tuple[Row, list[tuple[dict[str, Any], StoredRun]]]]:
    """Rows of students with their runs: the line of runs.csv, and the run in the store."""
    lines = {line["run_id"]: line for line in results.runs.to_dict("records")}
    return [
        (row, [(lines[run_id], stored[run_id]) for run_id in row.runs["run_id"]])
        for row in results.students
    ]


@dataclass(frozen=True)
class ContrastCell:
    """The estimate of a contrast in one score."""

    text: str
    p: str  # after Holm's correction
    clear: bool
    bar: tuple[float, float, float] | None  # see `_bar`


@dataclass(frozen=True)
class ContrastLine:
    """A line of the table of declared contrasts."""

    name: str
    rows: str  # in words
    seeds: str
    cells: list[ContrastCell | None]  # by score; None: not declared in it
    later: str  # how the declaration differs from that before the first run; "" if it does not


def _contrast_lines(results: Results) -> tuple[list[str], list[ContrastLine]] | None:
    """Titles of the scores, lines of the declared contrasts; bars of one score have one scale."""
    found = estimates(results)
    if not found:
        return None
    titles, contrasts = by_contrast(found)
    scales = {
        title: _largest_end([of[title].interval for of in contrasts if title in of])
        for title in titles
    }
    _, grid = contrast_grid(found)
    lines = []
    for of_score, (name, seeds, *_) in zip(contrasts, grid, strict=True):
        first = next(iter(of_score.values()))
        cells = [
            ContrastCell(
                tables.show_interval(one.interval, sign="+"),
                tables.show_p(one.p_holm),
                one.clear,
                _bar(one.interval, scales[title]),
            )
            if (one := of_score.get(title))
            else None
            for title in titles
        ]
        rows, later = sides(results, first.contrast), NOTES[first.contrast["declared"]]
        lines.append(ContrastLine(name.text, rows, seeds.text, cells, later))
    return titles, lines


@dataclass(frozen=True)
class ComparedRow:
    """A line of the table of differences."""

    difference: Difference
    p: float  # after Holm's correction
    favours: str  # "this row", "the baseline" or "neither"
    cost: float | None  # training cost relative to the baseline
    bar: tuple[float, float, float] | None  # left end, width and mean in percent, 0 in the middle


def _families(results: Results) -> list[tuple[Column, str, list[ComparedRow]]]:
    """Per headline score: the column, the heading of p, and the differences to the baseline."""
    baseline = results.baseline
    if baseline is None or len(results.students) < 2:
        return []
    families = []
    for column in results.headline:
        family = against_baseline(results, column, baseline)
        scale = _largest_end([difference.interval for difference, _ in family])
        lines = []
        for difference, p in family:
            favoured = {difference.a.label: "this row", baseline.label: "the baseline"}
            favours = favoured.get(verdict(difference, p), "neither")
            cost = cost_ratio(difference.a, baseline)
            lines.append(
                ComparedRow(difference, p, favours, cost, _bar(difference.interval, scale))
            )
        families.append((column, tables.holm_head(family), lines))
    return families


def _largest_end(intervals: Sequence[Interval | None]) -> float:
    """Largest distance of an interval's end from 0."""
    ends = [abs(end) for one in intervals if one for end in (one.low, one.high)]
    return max(filter(isfinite, ends), default=0.0)


def _bar(interval: Interval | None, scale: float) -> tuple[float, float, float] | None:
    """Left end, width and mean of an interval in percent of a bar from -scale to scale."""
    if interval is None or not isfinite(interval.low) or not scale:
        return None
    left = 50 + 50 * interval.low / scale
    width = 50 * (interval.high - interval.low) / scale
    return left, width, 50 + 50 * interval.mean / scale


def _figures(folder: Path) -> list[dict[str, Any]]:
    """Read the figures of figures/index.jsonl as inline SVG in the page's colours."""
    figures = []
    for line in read_jsonl(folder / "figures" / "index.jsonl"):
        svg = (folder / "figures" / f"{line['name']}.svg").read_text(encoding="utf-8")
        svg = svg[svg.index("<svg") :]
        # ids are unique only within one SVG
        svg = re.sub(r'\bid="', f'id="{line["name"]}-', svg)
        svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{line['name']}-", svg)
        for colour, variable in INK.items():
            svg = svg.replace(colour, f"var({variable})")
        figures.append(line | {"svg": svg})
    return figures


def _provenance(run: StoredRun) -> str:
    """Describe code, machine and job of a run's newest attempt."""
    facts = {
        key: value
        for key, value in flat(run.provenance).items()
        if key not in PROCESS and value not in (None, "", [], False)
    }
    return "; ".join(
        f"{key.rpartition('.')[2].replace('_', ' ')} {value}" for key, value in facts.items()
    )


def _number(value: Any, digits: int) -> str:
    """Format a number with `digits` significant digits; "—" if it is missing or not finite."""
    if not isinstance(value, int | float) or not isfinite(value):
        return "—"
    return f"{value:.{digits}g}"


def _breakable(text: str) -> str:
    """Allow line breaks after underscores."""
    return text.replace("_", "_\u200b")
