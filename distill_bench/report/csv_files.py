"""Read and write CSV files of results without changing the digits of a number."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path
from typing import Any

import pandas as pd

REWRITE = "`python -m distill_bench.report SWEEP` writes it again"


class ResultsError(ValueError):
    """Results are missing or damaged; the message is one line."""


def cells(lines: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    """Turn lines into a frame with the given columns, ready for `csv_text`.

    Lists and mappings become JSON. Integers stay integers in columns with empty cells.
    """
    written = [
        {
            key: json.dumps(value) if isinstance(value, list | dict) else value
            for key, value in line.items()
        }
        for line in lines
    ]
    return pd.DataFrame(written, columns=list(columns), dtype=object)


def csv_text(frame: pd.DataFrame) -> str:
    """Format a frame as CSV; None and NaN become empty cells."""
    return frame.to_csv(index=False, lineterminator="\n")


def read_frame(path: Path) -> pd.DataFrame:
    """Read a CSV file with numbers as floats, switches as booleans and other cells as text.

    Raises:
        ResultsError: if the file is damaged.
    """
    frame = read_texts(path)
    for name, column in frame.items():
        cells = set(column) - {""}
        if cells and cells <= {"True", "False"}:
            frame[name] = column.map({"True": True, "False": False}).astype("boolean")
            continue
        with contextlib.suppress(ValueError):  # text
            frame[name] = [float(cell) if cell else nan for cell in column]
    return frame


def read_texts(path: Path) -> pd.DataFrame:
    """Read a CSV file with every cell as text; a missing file gives an empty frame.

    Raises:
        ResultsError: if a line lacks cells.
    """
    if not path.is_file():
        return pd.DataFrame()
    try:
        # this engine fills missing cells of a short line with NaN; without a header, it refuses
        # lines that are longer than the first one
        frame = pd.read_csv(path, dtype=str, keep_default_na=False, engine="python", header=None)
    except ValueError as error:  # of the parser or of the encoding
        raise ResultsError(f"{path} is cut off or damaged ({error}); {REWRITE}") from error
    short = frame.index[frame.isna().any(axis="columns")]
    if len(short):
        raise ResultsError(
            f"{path}:{short[0] + 1} does not have one cell per column: it is cut off or damaged; "
            f"{REWRITE}"
        )
    lines = frame.iloc[1:].reset_index(drop=True)
    return lines.set_axis(frame.iloc[0].tolist(), axis="columns")
