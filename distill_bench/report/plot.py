"""Draw the figures of results/NAME from its data files.

    distill-bench plot results/NAME                                   every figure
    distill-bench plot results/NAME --x cost --y fvd --group method   one pair of columns
    distill-bench plot results/A results/B                            contrasts that both declare

Figures go to results/NAME/figures as SVG and, for a study of at most 500 runs or with --y, PNG;
that of several studies to results/figures. Needs no torch.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from distill_bench.report.figures import canvas
from distill_bench.report.figures.contrasts import shared_contrasts
from distill_bench.report.figures.drawings import Drawing, drawings
from distill_bench.report.figures.pairs import against
from distill_bench.report.figures.study import PlotError, Study, find_column, opened
from distill_bench.report.read_store import FURTHER
from distill_bench.report.results import Results
from distill_bench.store.failures import os_error
from distill_bench.store.files import read_jsonl, write_bytes
from distill_bench.store.machine import usable_cores
from distill_bench.store.runs import sweep_name

MOST_WORKERS = 4
MOST_WITH_PNG = 500  # runs, further samplings aside: PNGs of more take a third longer


def plot(folder: Path, workers: int = 1, results: Results | None = None) -> list[Path]:
    """Draw every figure and list all in figures/index.jsonl, in the order of the page.

    Figures that the existing index lists are deleted first; other files stay.

    Args:
        workers: number of processes.
        results: those of the folder if they are loaded.

    Returns:
        Paths of the SVGs.

    Raises:
        PlotError: if `folder` holds no results.
    """
    study = opened(results or folder)  # fail before the old figures are deleted
    index = folder / "figures" / "index.jsonl"
    for line in read_jsonl(index):
        for suffix in (".svg", ".png"):
            index.with_name(line["name"] + suffix).unlink(missing_ok=True)
    shares = [(study.results, folder, first, workers) for first in range(workers)]
    if workers > 1:
        with ProcessPoolExecutor(workers) as pool:
            drawn = list(pool.map(_draw_share, shares))
    else:
        drawn = [_draw_share(share) for share in shares]
    lines = dict(sorted((place, line) for part in drawn for place, line in part.items()))
    write_bytes(index, "".join(json.dumps(line) + "\n" for line in lines.values()).encode())
    return [index.with_name(f"{line['name']}.svg") for line in lines.values()]


def most_workers() -> int:
    """Number of processes that draw a page fastest on the cores of this process."""
    return min(MOST_WORKERS, usable_cores())


def _draw_share(share: tuple[Results, Path, int, int]) -> dict[int, dict]:
    """Draw every `step`-th figure from `first` on; returns index lines by position in the list."""
    results, folder, first, step = share
    lines: dict[int, dict] = {}
    trained = results.runs["run_id"].str.partition(FURTHER)[0]
    png = trained.nunique() <= MOST_WITH_PNG
    for place, drawing in enumerate(drawings(Study(results))):
        figure = drawing.draw() if place % step == first else None
        if figure is not None:
            canvas.save_figure(figure, folder, drawing.name, png)
            lines[place] = _index_line(drawing)
    return lines


def _index_line(drawing: Drawing) -> dict:
    return {
        "name": drawing.name,
        "section": drawing.section,
        "caption": drawing.caption,
        "wide": drawing.wide,
    }


def draw_pair(folder: Path, x: str, y: str, group: str = "method") -> Path:
    """Draw one column of runs.csv against another; `find_column` resolves the names.

    Returns:
        Path of the SVG.

    Raises:
        PlotError: for an unknown column, or if no finished run has numbers in both.
    """
    study = opened(folder)
    x, y = (find_column(study.results, name) for name in (x, y))
    if group != "series":
        group = find_column(study.results, group)
    figure = against(study, x, y, group)
    if figure is None:
        raise PlotError(f"columns {x} and {y}: no finished run has numbers in both")
    return canvas.save_figure(
        figure, folder, "_".join(map(canvas.file_name, (y, "against", x, "by", group)))
    )


def draw_shared(folders: Sequence[Path], out: Path) -> Path:
    """Draw the contrasts that several studies declare; returns the path of the SVG.

    Raises:
        PlotError: if no two studies declare a contrast of one name.
    """
    figure = shared_contrasts([opened(folder).results for folder in folders])
    if figure is None:
        names = ", ".join(folder.name for folder in folders)
        raise PlotError(f"no two of {names} declare a contrast of one name with results")
    return canvas.save_figure(figure, out, "contrasts")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or 2 if nothing can be drawn."""
    parser = argparse.ArgumentParser(
        prog="distill-bench plot",
        description="Draw the figures of a sweep's results: all of them, or one with --y. With "
        "several sweeps: the contrasts that two of them or more declare.",
    )
    parser.add_argument(
        "results",
        type=Path,
        nargs="+",
        help="results folder (with runs.csv), or the name or YAML of a sweep",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results"), help="folder that holds the results of sweeps"
    )
    parser.add_argument("--x", help="column on the x axis, with --y; default: training cost")
    parser.add_argument(
        "--y", help="draw only this column of runs.csv; a part of its name is enough"
    )
    parser.add_argument("--group", help="column that sets the colours, with --y; default: method")
    options = parser.parse_args(argv)
    if options.y is None and (options.x or options.group):
        parser.error("--x and --group need --y")
    folders = [_folder(results, options.out) for results in options.results]
    if len(folders) > 1 and options.y:
        parser.error("--y needs one sweep")
    try:
        if len(folders) > 1:
            paths = [draw_shared(folders, options.out)]
        elif options.y:
            group = options.group or "method"
            paths = [draw_pair(folders[0], options.x or "cost", options.y, group)]
        else:
            paths = plot(folders[0], most_workers())
    except PlotError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{parser.prog}: cannot write: {os_error(error)}", file=sys.stderr)
        return 2
    print(*paths, sep="\n")
    return 0


def _folder(results: Path, out: Path) -> Path:
    """Folder of a sweep's results, given by the folder, its runs.csv, or the sweep."""
    folder = results.parent if results.name == "runs.csv" else results
    return folder if folder.is_dir() else out / sweep_name(results)


if __name__ == "__main__":
    sys.exit(main())
