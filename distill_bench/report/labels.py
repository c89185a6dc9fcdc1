"""Labels of rows: the method's display name plus the settings that distinguish its rows.

Settings are worded as in the field: "SGMD, ODE, K=1, fake-score lr 1e-4". The keys of a run stay in
runs.csv.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from statistics import mode

import pandas as pd

from distill_bench.config.identity import default_title
from distill_bench.config.rows.sampling import guidance_in_words
from distill_bench.config.schema import is_scale_per_expert
from distill_bench.teachers.prompts import FILE_PREFIX

LONGEST = 48  # characters of a value in a label
PRESET = "method.preset"
SAMPLING = "sampling."  # begins the keys of a student's sampling; the other keys are of training


@dataclass(frozen=True)
class Wording:
    """Words for the values of a key of a run."""

    title: str
    symbol: str = ""  # a number reads "K=5" instead of "fake-score updates 5"
    unit: str = ""  # a number reads "4 steps"
    scientific: bool = False  # 1e-4 instead of 0.0001
    words: Mapping[str, str] = field(default_factory=dict)  # value -> words; "" is null
    prefix: str = ""  # before a word


WORDINGS = {
    "fake_score_updates": Wording("fake-score updates", symbol="K"),
    "guidance_scale": Wording("guidance scale", symbol="w"),
    "nfe": Wording("steps", unit="step"),
    "stepping": Wording("stepping", words={"ode": "ODE"}),
    "fake_score": Wording(
        "fake score", words={"exact": "exact fake score", "trained": "trained fake score"}
    ),
    "exit_step": Wording("exit step", words={"last": "last exit", "random": "random exit"}),
    "student_input": Wording("student's input", words={"real_data": "real data"}),
    "student_expert": Wording(
        "student's start",
        words={"high_noise": "high-noise expert", "low_noise": "low-noise expert"},
    ),
    "reuse_rollout": Wording(
        "rollout", words={"True": "reused rollout", "graph": "shared graph", "False": "own rollout"}
    ),
    "fake_score_rollouts": Wording(
        "fake score's rollouts",
        words={"batched": "batched rollouts", "sequential": "sequential rollouts"},
    ),
    "init": Wording("initial student", prefix="from "),
    "negative_prompt": Wording(
        "negative prompt", prefix="negative prompt ", words={"": "no negative prompt"}
    ),
    "student_lr": Wording("student lr", scientific=True),
    "fake_score_lr": Wording("fake-score lr", scientific=True),
    "ema": Wording("EMA", words={"": "no EMA"}),
}


def wording(key: str) -> Wording:
    """Words for a key; by default its name with spaces."""
    if is_sampling(key):
        return Wording(f"sampled {wording(key.removeprefix(SAMPLING)).title}")
    return WORDINGS.get(key) or Wording(key.rpartition(".")[2].replace("_", " "))


def is_sampling(key: str) -> bool:
    """True for a key of a student's sampling."""
    return key.startswith(SAMPLING)


def key_title(key: str) -> str:
    """Title of a key, as the head of a column or the label of an axis: "K (fake-score updates)"."""
    known = wording(key)
    return f"{known.symbol} ({known.title})" if known.symbol else known.title


def symbols(keys: Sequence[str]) -> str:
    """Explanation of the symbols that labels with these keys use; "" without any."""
    known = [wording(key) for key in keys]
    return "; ".join(f"{one.symbol}: {one.title}" for one in known if one.symbol)


def name_value(key: str, value: str) -> str:
    """Words for a value of a key: "K=5", "4 steps", "ODE", "no EMA"; "" for null without words."""
    if is_sampling(key):
        words = name_value(key.removeprefix(SAMPLING), value)
        return f"sampled {words}" if words else ""
    known = wording(key)
    if value in known.words:
        return known.words[value]
    if value == "True":
        return known.title
    if value == "False":
        return f"no {known.title}"
    if not _is_numeric(value):
        return value and known.prefix + shortened(_last_part(value), LONGEST).replace("_", " ")
    number = show_value(value, key)
    if known.symbol:
        return f"{known.symbol}={number}"
    if known.unit:
        return f"{number} {known.unit}{'' if number == '1' else 's'}"
    return f"{known.title} {number}"


def _last_part(text: str) -> str:
    """The last part of an absolute path; other texts as they are."""
    is_path = text.removeprefix(FILE_PREFIX).startswith("/")
    return text.rpartition("/")[2] if is_path else text


def shortened(label: str, most: int) -> str:
    """Cut a label to at most `most` letters."""
    return label if len(label) <= most else f"{label[: most - 1]}…"


def is_word(value: str) -> bool:
    """Return True for a value that is not a number, a switch or empty."""
    return not _is_numeric(value) and value not in ("True", "False", "")


def show_value(value: str, key: str = "") -> str:
    """Format a value: numbers without trailing zeros, "4+3" for one by expert, "—" for none."""
    if (scales := _parse_scales(value)) is not None:
        return guidance_in_words(scales)
    number = parse_number(value)
    if number is None:
        return value or "—"
    if key and wording(key).scientific and number > 0:
        mantissa, exponent = f"{number:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{number:g}"


def parse_number(text: str) -> float | None:
    """Parse a finite number; None for any other text."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if isfinite(value) else None


def _parse_scales(text: str) -> dict[str, float] | None:
    """Parse a guidance scale by expert, JSON in runs.csv; None for any other text."""
    with contextlib.suppress(ValueError):
        value = json.loads(text)
        return value if is_scale_per_expert(value) else None
    return None


def _is_numeric(value: str) -> bool:
    """True for a number, or one number by expert."""
    return parse_number(value) is not None or _parse_scales(value) is not None


@dataclass(frozen=True)
class Label:
    """Label of a row, and its parts."""

    text: str
    series: str  # the label without the row's place on the sweep's axis
    stem: str  # the series without its numeric settings
    settings: Mapping[str, str]  # title of a key -> its words, of the numeric settings


@dataclass(frozen=True)
class Declared:
    """`label` of a cell in the sweep file."""

    label: str
    keys: frozenset[str]  # keys of the cell, for which the label stands


def method_label(method: str, preset: str, titles: Mapping[str, str]) -> str:
    """Display name of a method with its preset, if any.

    Args:
        titles: method, or method and preset ("sgmd paper") -> declared display name.
    """
    title = titles.get(method) or default_title(method)
    return titles.get(f"{method} {preset}") or " ".join(filter(None, [title, preset]))


def label_rows(
    keys: pd.DataFrame,
    axis: str | None,
    titles: Mapping[str, str] = {},
    declared: Sequence[Declared | None] | None = None,
) -> list[Label]:
    """Label rows as briefly as possible.

    Args:
        keys: one line per row, without duplicates. The first column is `method`, the others are the
            swept keys; all cells are text, "" for none.
        axis: swept key on the x axis of the figures; it is left out of a series.
        titles: display names, see `method_label`; by default made from the names of methods.
        declared: the label that the sweep file gives each row, if any.
    """
    keys = _unlike_training(keys, axis)
    swept = [key for key in keys.columns if key != "method"]
    rows_of = dict(list(keys.groupby("method")))
    distinctive = {method: _distinctive(rows, swept, axis) for method, rows in rows_of.items()}
    common = _common_values(keys, swept, axis)
    drafts = []
    for row, given in zip(keys.to_dict("records"), declared or [None] * len(keys), strict=True):
        method = row["method"]
        rows = rows_of[method]
        # keys whose value in this row is the most common one of the method
        usual = {key for key in swept if (rows[key] == row[key]).sum() > len(rows) / 2}
        shown = [key for key in distinctive[method] if key not in usual or is_word(row[key])]
        shown += [key for key, value in common.items() if row[key] != value and key not in shown]
        # every setting in which sampling differs from training
        unlike = [key for key in swept if is_sampling(key) and row[key] and key != axis]
        shown += [key for key in unlike if key not in shown]
        place = row[axis] if axis else ""
        if axis and not place:  # without a place the label may be ambiguous: add unusual words
            shown += [
                key
                for key in swept
                if key not in distinctive[method] and key not in usual and is_word(row[key])
            ]
        drafts.append(_Draft(row, shown, axis, place, given))
    return _distinct(drafts, titles)


def _unlike_training(keys: pd.DataFrame, axis: str | None) -> pd.DataFrame:
    """Empty each cell of a student's sampling that repeats how it was trained."""
    keys = keys.copy()
    for key in keys.columns:
        trained = key.removeprefix(SAMPLING)
        if is_sampling(key) and key != axis and trained in keys:
            keys[key] = keys[key].mask(keys[key] == keys[trained], "")
    return keys


@dataclass(frozen=True)
class _Draft:
    """A row before it has a label."""

    row: Mapping[str, str]
    shown: Sequence[str]  # keys to name
    axis: str | None
    place: str  # value on the axis
    declared: Declared | None

    def label(self, titles: Mapping[str, str], nulls: bool = False, suffix: str = "") -> Label:
        """The label; with `nulls` it also names keys that are null."""
        covered = self.declared.keys if self.declared else frozenset()
        preset = self.row[PRESET] if PRESET in self.shown else ""
        stem = [method_label(self.row["method"], preset, titles)]
        if self.declared:
            names_method = not covered.isdisjoint(["method", "method.name", PRESET])
            stem = [self.declared.label] if names_method else [*stem, self.declared.label]
        words, settings = list(stem), {}
        for key in self.shown:
            text = name_value(key, self.row[key])
            if not text and nulls:
                text = f"{wording(key).title} null"
            if not text or key in covered or key == PRESET:
                continue
            words.append(text)
            if not self.row[key] or _is_numeric(self.row[key]):
                settings[wording(key).symbol or wording(key).title] = text
            else:
                stem.append(text)
        series = ", ".join(words) + suffix
        text = series
        if self.axis and self.place and self.axis not in covered:
            text = f"{series}, {name_value(self.axis, self.place)}"
        return Label(text, series, ", ".join(stem), settings)


def _distinct(drafts: Sequence[_Draft], titles: Mapping[str, str]) -> list[Label]:
    """Label every row; nulls are shown only if two labels would be equal without them.

    Labels that are still equal, because two methods have one display name, end with their keys.
    """

    def repeated(labels: Sequence[Label]) -> set[str]:
        return {
            text for text, count in Counter(label.text for label in labels).items() if count > 1
        }

    labels = [draft.label(titles) for draft in drafts]
    unclear = repeated(labels)
    labels = [
        draft.label(titles, nulls=label.text in unclear)
        for draft, label in zip(drafts, labels, strict=True)
    ]
    unclear = repeated(labels)
    for i, (draft, label) in enumerate(zip(drafts, labels, strict=True)):
        if label.text in unclear:
            keys = ", ".join(f"{key}={value}" for key, value in draft.row.items())
            labels[i] = draft.label(titles, nulls=True, suffix=f" [{keys}]")
    return labels


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
            common[key] = mode(keys[key])  # of several, the first to appear
    return common
