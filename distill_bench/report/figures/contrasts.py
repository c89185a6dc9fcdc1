"""Figure of the contrasts that several studies declare."""

from collections import Counter
from collections.abc import Mapping, Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from distill_bench.report.figures import canvas
from distill_bench.report.figures.every_row import LETTER, name_lines
from distill_bench.report.figures.style import COLOURS, GROUND, QUIET, STYLE
from distill_bench.report.results import Results
from distill_bench.report.tables.contrasts import Estimate, estimates

MARK = {"color": COLOURS[0], "marker": "o", "linestyle": "none"}


@rc_context(STYLE)
def shared_contrasts(studies: Sequence[Results]) -> Figure | None:
    """Draw one panel per study, one line per contrast that two of the studies or more declare.

    A contrast is drawn in the first score that it is declared on, with its 95 % interval. Markers
    are filled where p after Holm's correction is below 0.05.

    Returns:
        None if no two studies declare a contrast of one name.
    """
    found = [_primary(study) for study in studies]
    counts = Counter(name for of_study in found for name in of_study)
    names = [name for name, count in counts.items() if count > 1]
    drawn = [
        (study, of_study)
        for study, of_study in zip(studies, found, strict=True)
        if any(name in of_study for name in names)
    ]
    if not names:
        return None
    ratios = all(one.column.better == "one" for _, of in drawn for one in of.values())
    width = LETTER * max(map(len, names)) + 2.3 * len(drawn)
    figure = Figure(figsize=(width, 1.1 + 0.22 * len(names)))
    panels = figure.subplots(1, len(drawn), sharey=True, sharex=ratios, squeeze=False)[0]
    for axes, (study, of_study) in zip(panels, drawn, strict=True):
        _panel(axes, study, of_study, names)
    name_lines(panels, names)
    hollow = MARK | {"markerfacecolor": GROUND}
    entries = [Line2D([], [], **MARK, label="p < 0.05 after Holm's correction")]
    canvas.legend(figure, [*entries, Line2D([], [], **hollow, label="not clear of 0")])
    return figure


def _primary(study: Results) -> dict[str, Estimate]:
    """Estimate of each declared contrast in its first score; without those that have no seed."""
    first: dict[str, Estimate] = {}
    for estimate in estimates(study):
        if estimate.interval:
            first.setdefault(estimate.contrast["name"], estimate)
    return first


def _panel(
    axes: Axes, study: Results, of_study: Mapping[str, Estimate], names: Sequence[str]
) -> None:
    """Draw the contrasts of one study."""
    axes.axvline(0, color=QUIET, linewidth=1)
    shown = {line: of_study[name] for line, name in enumerate(names) if name in of_study}
    for line, one in shown.items():
        face = {} if one.clear else {"markerfacecolor": GROUND}
        half = one.interval.half
        axes.errorbar(one.interval.mean, line, xerr=half, **MARK | face, elinewidth=1, capsize=2.5)
    seeds = sorted({one.seeds for one in shown.values()})
    axes.set_title(f"{study.name}\n{' or '.join(map(str, seeds))} seeds")
    titles = dict.fromkeys(one.column.title for one in shown.values())
    axes.set_xlabel(f"difference in {' or '.join(titles)}")
    axes.locator_params("x", nbins=4)
