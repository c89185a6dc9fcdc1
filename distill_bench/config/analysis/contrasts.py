"""Declared contrasts of a sweep: differences of conditions, averages, and interactions.

A contrast is a weighted sum of rows. It is part of the analysis, not of any run: run ids do not
depend on it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from distill_bench.config.conditions import check_condition, holds
from distill_bench.config.errors import ConfigError, hint
from distill_bench.config.overrides import flat_keys, has_values, same_value, value_at
from distill_bench.config.schema import AdapterConfig, ProtocolConfig, RunConfig
from distill_bench.config.validation import StrictModel
from distill_bench.expressions import names_in

SAMPLING = "sampling"  # key of the ways to sample a trained student
NESTED = {"protocol": ProtocolConfig, "adapter": AdapterConfig}
Selection = dict[str, Any] | str


class ContrastConfig(StrictModel):
    """Entry of `contrasts`: `of` minus `minus`, or the difference of two contrasts above it."""

    of: Selection | None = None
    """Row, by keys and values as in `baseline`, or by a condition as in `--only`."""
    minus: Selection | None = None
    """Row that is subtracted."""
    average_over: list[str] = []
    """Keys over whose values both sides are averaged, with equal weights."""
    difference_of: list[str] | None = Field(None, min_length=2, max_length=2)
    """Instead of `of` and `minus`: the first contrast minus the second (an interaction)."""
    scores: list[str] = Field(min_length=1)
    """Columns of runs.csv."""
    at: Literal["end", "equal_cost"] = "end"
    """At the end of training, or at the largest training cost that all its runs reach."""

    @model_validator(mode="after")
    def _check_sides(self) -> "ContrastConfig":
        sides = [side is not None for side in (self.of, self.minus)]
        if self.difference_of is None and not all(sides):
            raise ValueError("give `of` and `minus`, or `difference_of`")
        if self.difference_of is not None and (any(sides) or self.average_over):
            raise ValueError("difference_of replaces `of`, `minus` and `average_over`")
        return self

    def selections(self) -> dict[str, Selection]:
        """Key -> side of the contrast; empty for an interaction."""
        if self.of is None or self.minus is None:
            return {}
        return {"of": self.of, "minus": self.minus}


@dataclass(frozen=True)
class Selectable:
    """A run that a contrast may select."""

    data: Mapping[str, Any]  # resolved keys, with `method.preset`
    row: str  # equal for the runs of a row
    as_trained: bool = True  # False: its student was sampled in a further way


@dataclass(frozen=True)
class Term:
    """One row of a contrast."""

    weight: float
    runs: tuple[str, ...]


def check_contrasts(contrasts: Mapping[str, ContrastConfig], where: str) -> None:
    """Check the keys that contrasts name, before any run is resolved.

    Raises:
        ConfigError: for an unknown key, a malformed condition, or an interaction of contrasts that
            are not declared above it.
    """
    above: list[str] = []
    for name, contrast in contrasts.items():
        place = f"{where}: contrasts.{name}"
        for selection in contrast.selections().values():
            if isinstance(selection, str):
                try:
                    if SAMPLING not in names_in(selection):
                        check_condition(selection)
                except ValueError as error:
                    raise ConfigError(f"{place}: {error}") from error
            else:
                _check_keys(flat_keys(selection), place)
        _check_keys(contrast.average_over, place)
        for other in contrast.difference_of or []:
            if other not in above:
                known = ", ".join(above) or "none"
                raise ConfigError(
                    f"{place}: difference_of names {other!r}, which is no contrast above it; "
                    f"known: {known}"
                )
        above.append(name)


def _check_keys(keys: Iterable[str], place: str) -> None:
    known = list(RunConfig.model_fields)
    known += [f"{parent}.{name}" for parent, model in NESTED.items() for name in model.model_fields]
    for key in keys:
        if key not in known and not key.startswith(("method.", f"{SAMPLING}.")):
            raise ConfigError(f"{place}: unknown key {key!r}{hint(key, known)}")


def contrast_terms(
    contrasts: Mapping[str, ContrastConfig], candidates: Mapping[str, Selectable], where: str
) -> dict[str, list[Term]]:
    """The rows of every contrast with their weights.

    Args:
        candidates: runs by id.
        where: beginning of errors.

    Raises:
        ConfigError: if a side selects no row or several, averages over other values than the other
            side, or shares no seed with it.
    """
    terms: dict[str, dict[str, Term]] = {}  # contrast -> row -> term
    for name, contrast in contrasts.items():
        place = f"{where}: contrasts.{name}"
        if contrast.difference_of is not None:
            first, second = (terms[other] for other in contrast.difference_of)
        else:
            first, second = _sides(contrast, candidates, place)
        terms[name] = _subtracted(first, second)
        if not terms[name]:
            raise ConfigError(f"{place}: both sides are the same rows: their difference is 0")
        seeds = [
            {candidates[run].data.get("seed") for run in term.runs} for term in terms[name].values()
        ]
        if not set.intersection(*seeds):
            raise ConfigError(
                f"{place}: its rows share no seed, so they cannot be paired; select runs with the "
                "same seeds"
            )
    return {name: list(rows.values()) for name, rows in terms.items()}


def _subtracted(first: Mapping[str, Term], second: Mapping[str, Term]) -> dict[str, Term]:
    """Sum of the first side's terms minus the second's; rows that cancel are left out."""
    total = dict(first)
    for row, term in second.items():
        if row not in total:
            total[row] = Term(-term.weight, term.runs)
        else:
            runs = tuple(run for run in total[row].runs if run in term.runs)
            total[row] = Term(total[row].weight - term.weight, runs)
    return {row: term for row, term in total.items() if abs(term.weight) > 1e-12}


def _sides(
    contrast: ContrastConfig, candidates: Mapping[str, Selectable], place: str
) -> tuple[dict[str, Term], dict[str, Term]]:
    """Row -> term of both sides of a contrast."""
    sides, averaged = [], []
    for key, selection in contrast.selections().items():
        selected = {run: c for run, c in candidates.items() if _selects(selection, c)}
        rows = {candidate.row: candidate.data for candidate in selected.values()}
        text = f"{key} {selection!r}"
        if not rows:
            raise ConfigError(f"{place}: {text} selects no row{_values_of(selection, candidates)}")
        places = {
            row: [value_at(data, over) for over in contrast.average_over]
            for row, data in rows.items()
        }
        if any(
            same_value(a, b)
            for i, a in enumerate(places.values())
            for b in list(places.values())[:i]
        ):
            varying = _varying(list(rows.values()), contrast.average_over)
            raise ConfigError(
                f"{place}: {text} selects {len(rows)} rows, which differ in {', '.join(varying)}; "
                "name one row, or average over these keys with `average_over`"
            )
        runs_of = {row: [run for run, c in selected.items() if c.row == row] for row in rows}
        sides.append({row: Term(1 / len(rows), tuple(runs)) for row, runs in runs_of.items()})
        averaged.append(list(places.values()))
    for one, other in (averaged, averaged[::-1]):
        if extra := [v for v in one if not any(same_value(v, w) for w in other)]:
            raise ConfigError(
                f"{place}: the sides average over different values of "
                f"{', '.join(contrast.average_over)}: only one has {extra[0]}"
            )
    return sides[0], sides[1]


def _selects(selection: Selection, candidate: Selectable) -> bool:
    """True if a selection holds for a run; unless it names sampling, as the run was trained."""
    if isinstance(selection, str):
        names = set(names_in(selection))
    else:
        names = {key.partition(".")[0] for key in flat_keys(selection)}
    if not candidate.as_trained and SAMPLING not in names:
        return False
    if isinstance(selection, str):
        return holds(selection, candidate.data)
    return has_values(candidate.data, selection)


def _values_of(selection: Selection, candidates: Mapping[str, Selectable]) -> str:
    """Values of a selection's keys among the runs: "; the runs have nfe 1 or 4"."""
    if isinstance(selection, str):
        return ""
    parts = []
    for key in flat_keys(selection):
        values: list[Any] = []
        for candidate in candidates.values():
            value = value_at(candidate.data, key)
            if not any(same_value(value, other) for other in values):
                values.append(value)
        parts.append(f"{key} {' or '.join(map(str, values))}")
    return f"; the runs have {', '.join(parts)}"


def _varying(rows: Sequence[Mapping[str, Any]], averaged: Sequence[str]) -> list[str]:
    """Dotted keys whose values differ between rows, without those that are averaged over."""
    flats = [flat_keys(data) for data in rows]
    keys = dict.fromkeys(key for row in flats for key in row)
    return [
        key
        for key in keys
        if key not in ("seed", *averaged)
        and any(not same_value(row.get(key), flats[0].get(key)) for row in flats)
    ]
