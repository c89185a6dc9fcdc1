"""List of all figures of a sweep, with the section of the page and the caption of each."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from matplotlib.figure import Figure

from distill_bench.report.figures import canvas
from distill_bench.report.figures.curves import curves
from distill_bench.report.figures.every_row import draw_differences, every_row
from distill_bench.report.figures.overview import overview
from distill_bench.report.figures.pairs import against
from distill_bench.report.figures.samplings import samplings
from distill_bench.report.figures.study import UPDATES, Study
from distill_bench.report.figures.training import binned_names, by_bin, training
from distill_bench.report.results import COSTS

MEAN = "mean and 95 % interval"


@dataclass(frozen=True)
class Drawing:
    """A figure with its place in the page."""

    name: str
    section: str
    caption: str  # also the alternative text
    draw: Callable[[], Figure | None]
    wide: bool = False


def drawings(study: Study) -> Iterator[Drawing]:
    """Every figure of a sweep, in the order of the page."""
    yield from _samplings(study)
    yield from _headline(study)
    yield from _pareto(study)
    yield from _curves(study)
    titles = ", ".join(column.title for column in study.results.headline)
    prefix = "Exploratory: " if study.results.contrasts else ""
    yield Drawing(
        "every_row",
        "rows",
        f"{titles}: {MEAN} of every row; small dots are runs, diamonds are references"
        f"{study.listed_note}",
        lambda: every_row(study),
        wide=True,
    )
    if study.results.baseline:
        yield Drawing(
            "differences",
            "differences",
            f"{prefix}{titles}: paired difference of every row to {study.results.baseline.label} "
            "with its 95 % interval; filled markers: p < 0.05 after Holm's correction"
            f"{study.listed_note}",
            lambda: draw_differences(study),
            wide=True,
        )
    yield from _diagnostics(study)


def _samplings(study: Study) -> Iterator[Drawing]:
    if study.ways:
        titles = ", ".join(column.title for column in study.results.headline)
        yield Drawing(
            "samplings",
            "headline",
            f"{titles} of every student by the way in which it is sampled: {MEAN}; markers are "
            f"filled where a student is sampled as it was trained{study.ways_note}",
            lambda: samplings(study),
            wide=True,
        )


def _headline(study: Study) -> Iterator[Drawing]:
    if not study.axis:
        return
    titles = ", ".join(column.title for column in study.results.headline)
    notes = [
        f"{titles} against {study.axis_title}: {MEAN}",
        "small dots are runs",
        "an arrow head marks an interval that goes on",
        f"hollow markers are controls at one value of {study.axis_title}"
        if study.looks.controls
        else "",
        f"dashed lines are rows without {study.axis_title}" if study.looks.unplaced else "",
    ]
    caption = "; ".join(filter(None, notes)) + study.series_note
    yield Drawing("overview", "headline", caption, lambda: overview(study), wide=True)


def _pareto(study: Study) -> Iterator[Drawing]:
    """Scores against cost, then against the first distance among them."""
    hollow = "; hollow markers are controls" if study.looks.controls else ""
    cost = COSTS[0]
    for score in study.results.headline:
        yield Drawing(
            f"{score.name}_against_cost",
            "pareto",
            f"{score.title} at the end of training against its cost: {MEAN}{hollow}; grey lines "
            f"are references{study.series_note}",
            lambda score=score: against(study, cost, score, "series"),
        )
    distance = next((column for column in study.results.headline if column.better == "lower"), None)
    for score in study.results.headline if distance else []:
        if score is not distance:
            yield Drawing(
                f"{score.name}_against_{distance.name}",
                "pareto",
                f"{score.title} against {distance.title}: {MEAN}{hollow}; grey markers are "
                f"references{study.series_note}",
                lambda score=score: against(study, distance, score, "series"),
            )


def _curves(study: Study) -> Iterator[Drawing]:
    collapsed = "collapsed" in set(study.results.runs["status"])
    cross = "; a cross is the last score of a collapsed run" if collapsed else ""
    for score in study.results.headline:
        for x, name in ((UPDATES, "updates"), (COSTS[0], "cost")):
            yield Drawing(
                f"{score.name}_over_{name}",
                "curves",
                f"{score.title} over {x.title.lower()}: mean over the runs of a row; bands are "
                f"95 % intervals over seeds{cross}{study.panels_note}",
                lambda score=score, x=x: curves(study, score, x),
                wide=True,
            )


def _diagnostics(study: Study) -> Iterator[Drawing]:
    yield Drawing(
        "training",
        "diagnostics",
        "Training logs over student updates: mean over the runs of a row, and over noise levels "
        f"where a quantity is logged by noise level{study.panels_note}",
        lambda: training(study),
        wide=True,
    )
    for name in binned_names(study):
        yield Drawing(
            f"{canvas.file_name(name)}_by_bin",
            "diagnostics",
            f"{name.replace('_', ' ')}: mean over the runs of a row and the last third of training"
            f"{study.panels_note}",
            lambda name=name: by_bin(study, name),
            wide=True,
        )
