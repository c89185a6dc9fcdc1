"""Colours, markers, dashes, fonts and sizes of the figures. looks.py assigns them to series."""

from typing import Any

# The page replaces these four colours by its light and dark themes; see `INK` in page/html.py.
TEXT, RULE, QUIET, GROUND = "#1b1f24", "#d5dae0", "#59636e", "#fefefe"
# Okabe and Ito, 2008: distinguishable with any colour vision. Yellow is too pale for white.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", TEXT]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">", "h"]
DASHES: list[Any] = ["-", (0, (5, 2)), (0, (1, 1.5))]
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": QUIET,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": TEXT,
    "axes.labelsize": 9.5,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": TEXT,
    "axes.titlesize": 10,
    "axes.titley": 1.0,  # not measured: nothing is drawn above the panels
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "figure.facecolor": "none",
    "figure.labelsize": 9.5,
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "grid.color": RULE,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.handlelength": 2.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 4.5,
    "path.simplify_threshold": 0.5,
    "savefig.dpi": 100,
    "svg.fonttype": "none",
    "svg.hashsalt": "distill_bench",
    "text.color": TEXT,
    "xtick.color": QUIET,
    "xtick.labelcolor": TEXT,
    "ytick.color": QUIET,
    "ytick.labelcolor": TEXT,
}
SIZE = (4.8, 3.4)  # inches; legible unscaled on a phone
SMALL = 8  # points, for notes
