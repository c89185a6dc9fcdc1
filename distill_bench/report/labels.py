"""Labels of rows: the method plus the swept values that distinguish its rows."""

from collections import Counter
from math import isfinite

import pandas as pd


def label_rows(keys: pd.DataFrame, axis: str | None) -> list[tuple[str, str]]:
    """Label rows as briefly as possible.

    Args:
        keys: one line per row, without duplicates. The first column is `method`, the others are the
            swept keys; all cells are text, "" for none.
        axis: swept key on the x axis of the figures; it is left out of a series.

    Returns:
        Per row: its series (the label without the place on the axis) and its label.
    """
    swept = [key for key in keys.columns if key != "method"]
    rows_of = dict(list(keys.groupby("method", sort=False)))
    distinctive = {method: _distinctive(rows, swept, axis) for method, rows in rows_of.items()}
    common = _common_values(keys, swept, axis)
    labels = []
    for row in keys.to_dict("records"):
        method = row["method"]
        rows = rows_of[method]
        # keys whose value in this row is the most common one of the method
        usual = {key for key in swept if (rows[key] == row[key]).sum() > len(rows) / 2}
        shown = [key for key in distinctive[method] if key not in usual or is_word(row[key])]
        words = [name_value(key, row[key]) for key in shown]
        words += [name_value(key, row[key]) for key, value in common.items() if row[key] != value]
        place = row[axis] if axis else ""
        if axis and not place:  # without a place the label may be ambiguous: add unusual words
            words += [
                row[key]
                for key in swept
                if key not in distinctive[method] and key not in usual and is_word(row[key])
            ]
        nulls = [f"{key.rpartition('.')[2]}=null" for key in shown if not row[key]]
        labels.append(([method, *filter(None, words)], nulls, place))
    return _distinct(labels, axis)


def _distinct(
    labels: list[tuple[list[str], list[str], str]], axis: str | None
) -> list[tuple[str, str]]:
    """Series and label per row; nulls are shown only if two labels would be equal without them.

    Args:
        labels: per row: words, nulls, and the place on the axis.
    """
    counts = Counter((*words, place) for words, _, place in labels)
    result = []
    for words, nulls, place in labels:
        series = " ".join(words + (nulls if counts[(*words, place)] > 1 else []))
        result.append((series, f"{series} {name_value(axis, place)}" if axis and place else series))
    return result


def _distinctive(rows: pd.DataFrame, swept: list[str], axis: str | None) -> list[str]:
    """Return the swept keys that, with the axis, distinguish the rows of a method.

    Keys are chosen greedily, fields of the method before fields of the run.
    """
    candidates = [key for key in swept if key != axis]
    candidates.sort(key=lambda key: not key.startswith("method."))
    chosen = [axis] if axis else []
    count = len(rows[chosen].drop_duplicates()) if chosen else 1
    for key in candidates:
        more = len(rows[[*chosen, key]].drop_duplicates())
        if more > count:
            chosen.append(key)
            count = more
    return [key for key in chosen if key != axis]


def _common_values(keys: pd.DataFrame, swept: list[str], axis: str | None) -> dict[str, str]:
    """Return the most frequent value of each key that differs only between methods.

    Such a key does not distinguish rows of one method. Labels show it because it means that two
    methods differ in more than the objective.
    """
    common = {}
    for key in swept:
        if key == axis or key.startswith("method."):
            continue
        constant_within = (keys.groupby("method")[key].nunique() == 1).all()
        if constant_within and keys[key].nunique() > 1:
            counts = keys[key].value_counts(sort=False)  # in order of appearance
            common[key] = counts.idxmax()
    return common


def name_value(key: str, value: str) -> str:
    """Format a swept value: a word as it is, a switch as its key, a number with its key."""
    name = key.rpartition(".")[2]
    if not value or is_word(value):
        return value
    if value == "True":
        return name
    if value == "False":
        return f"no {name}"
    return f"{name}={show_value(value)}"


def is_word(value: str) -> bool:
    """Return True for a swept value that is not a number, a switch or empty."""
    return parse_number(value) is None and value not in ("True", "False", "")


def show_value(value: str) -> str:
    """Format a swept value: numbers without trailing zeros, "—" for an empty text."""
    number = parse_number(value)
    return (f"{number:g}" if number is not None else value) or "—"


def parse_number(text: str) -> float | None:
    """Parse a finite number; None for any other text."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if isfinite(value) else None
