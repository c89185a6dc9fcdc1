"""Conformance check that every hyper-parameter of a method has an effect, and the stated one."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice, pairwise

from distill_bench.fields import Equals, NoDirection, Raises, Scales
from distill_bench.method import Method
from distill_bench.testing.runs import Runs, conformance
from distill_bench.testing.study import (
    ROUNDING,
    FieldStudy,
    UpdateEffects,
    is_close,
    is_installed,
    is_number,
    marks_of,
    variants,
    with_value,
)

DIRECTIONS = (Scales, Equals, Raises, NoDirection)


@conformance
def check_hyperparameters(runs: Runs) -> None:
    """Each field changes a term, a gradient, a rate or the hook; a number as its mark says.

    A field may matter only beside others (R1's perturbation only with its weight above 0), so the
    method is tried with its own fields, with those of each preset, and with one other field of each
    of these changed. Other values of a field come from its type, its presets and the examples in
    `Annotated[..., Field(examples=[...])]`. Marks of numbers are those of `distill_bench.fields`.
    """
    study = FieldStudy(runs.build(precision="float64"))
    method = study.run.method
    for field in dataclasses.fields(method):
        others = list(variants(method, field.name))
        assert others, (
            f"no other value of the field {field.name} is known; name some in its type: "
            "Annotated[..., Field(examples=[...])]"
        )
        installed = [other for other in others if is_installed(other)]
        if not installed:
            continue
        assert any(
            study.differ(base, other)
            for base in study.bases(field.name)
            for other in variants(base, field.name)
            if is_installed(other)
        ), (
            f"the field {field.name} changes no loss, gradient, learning rate or hook, with "
            "the method's own fields or those of a preset; use it, or remove it"
        )
        marks = [
            mark for mark in marks_of(type(method), field.name) if isinstance(mark, DIRECTIONS)
        ]
        assert marks or not is_number(type(method), field.name), (
            f"the number {field.name} states no direction; mark it by Scales, Equals, Raises or "
            'Lowers, e.g. Annotated[float, Raises("gradient/kl")], or give a reason by '
            "NoDirection (distill_bench/fields.py)"
        )
        for mark in marks:
            if isinstance(mark, Scales):
                _check_weight(study, field.name, mark.terms)
            elif not isinstance(mark, NoDirection):
                _check_direction(study, field.name, mark)


def undirected(method: type[Method]) -> dict[str, str]:
    """The fields that are marked by NoDirection, with the reasons."""
    return {
        field.name: mark.reason
        for field in dataclasses.fields(method)
        for mark in marks_of(method, field.name)
        if isinstance(mark, NoDirection)
    }


def _check_weight(study: FieldStudy, field: str, terms: tuple[str, ...]) -> None:
    """Assert that doubling a field doubles its terms, and changes no other of their phases."""
    for base in study.bases(field):
        once = with_value(base, field, getattr(base, field) or 1.0)
        twice = once and with_value(once, field, 2 * getattr(once, field))
        if not twice or not {*terms} <= study.measured(once).quantities.keys():
            continue
        before, after = study.measured(once).effects, study.measured(twice).effects
        assert before.keys() == after.keys(), f"doubling {field} adds or removes terms"
        phases = {_parts(name)[0] for name in before if _parts(name)[2] in terms}
        for name, value in before.items():
            if _parts(name)[0] not in phases:
                continue
            factor = 2.0 if _parts(name)[2] in terms else 1.0
            assert is_close(after[name], factor * value), (
                f"{field} scales {', '.join(terms)}, but doubling it does not multiply "
                f"{name} by {factor:g}"
            )
        return
    raise AssertionError(f"{field} scales {', '.join(terms)}, but no loss has all of these terms")


def _check_direction(study: FieldStudy, field: str, mark: Equals | Raises) -> None:
    """Assert that a field equals, raises or lowers the quantities of its mark.

    Checked with the fields of the run and of each preset, or else with one more field changed.
    A count is compared with its multiples, because a grid of levels keeps its points in these.
    """
    names = {mark.quantity} if isinstance(mark, Equals) else {*mark.quantities}
    shown = False
    for base in study.bases(field):
        if shown and base not in study.own:
            break
        if not names <= study.measured(base).quantities.keys():
            continue
        values = {
            getattr(method, field): method
            for method in (base, *islice(variants(base, field), 4))
            if getattr(method, field) is not None and is_installed(method)
        }
        measured = {value: study.measured(values[value]) for value in _multiples(values)}
        if not all(names <= one.quantities.keys() for one in measured.values()):
            continue
        changes = True
        for name in sorted(names):
            points = {value: one.quantities[name] for value, one in measured.items()}
            _check_points(field, name, mark, points)
            changes &= len(set(points.values())) > 1
        if isinstance(mark, Raises):
            _check_others(field, names, list(measured.values()))
        shown |= changes
    assert shown, (
        f"{field} {_verb(mark)} {', '.join(sorted(names))}, but no value changes all of these; "
        "distill_bench/fields.py lists the names of quantities"
    )


def _multiples(values: Iterable[float]) -> list[float]:
    """Values in ascending order; of integers, each a multiple of the one before."""
    kept: list[float] = []
    for value in sorted(values):
        if not kept or not kept[-1] or isinstance(value, float) or value % kept[-1] == 0:
            kept.append(value)
    return kept


def _check_points(
    field: str, name: str, mark: Equals | Raises, points: Mapping[float, float]
) -> None:
    """Assert that a quantity, by the values of a field in ascending order, is as its mark says."""
    if isinstance(mark, Equals):
        for value, quantity in points.items():
            assert abs(quantity - value) <= ROUNDING * abs(value), (
                f"{field} equals {name}, but at {value:g} {name} is {quantity:g}"
            )
        return
    says = f"{field} {_verb(mark)} {name}"
    slopes = []
    for (low, first), (high, second) in pairwise(points.items()):
        change = mark.sign * (second - first)
        assert change >= -ROUNDING * max(abs(first), abs(second)), (
            f"{says}, but from {low:g} to {high:g} {name} goes from {first:g} to {second:g}"
        )
        slopes.append(change / (high - low))
    assert not mark.linear or max(slopes) - min(slopes) <= 1e-6 * max(slopes), (
        f"{says} linearly, but at {', '.join(f'{value:g}' for value in points)} {name} is "
        f"{', '.join(f'{quantity:g}' for quantity in points.values())}"
    )


def _check_others(field: str, names: set[str], measured: Sequence[UpdateEffects]) -> None:
    """Assert that terms that a mark does not name stay, in the phases of those that it names."""
    terms = {name.removeprefix("gradient/") for name in names}
    for before, after in pairwise(one.effects for one in measured):
        phases = {_parts(name)[0] for name in before if _parts(name)[2] in terms}
        for name in before.keys() & after.keys():
            phase, _, term = _parts(name)
            assert phase not in phases or term in terms or is_close(before[name], after[name]), (
                f"{field} names {', '.join(sorted(names))}, but it also changes {name}; name "
                f"the term {term} too, or keep the field out of it"
            )


def _verb(mark: Equals | Raises) -> str:
    return type(mark).__name__.lower()


def _parts(name: str) -> tuple[str, str, str]:
    return name.partition("/")
