"""Fields of methods that contradict each other, or are no numbers."""

import pytest

from distill_bench.methods.dp_dmd import DPDMD
from distill_bench.methods.f_distill import FDistill
from distill_bench.methods.gradient_template import GradientTemplate


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPDMD(teacher_steps=4, anchor=5), "anchor 5 must be at most teacher_steps 4"),
        (lambda: FDistill(ratio_low=2, ratio_high=2), "ratio_low 2 must be below ratio_high 2"),
        (
            lambda: GradientTemplate("1/(sigma - 0.57)"),
            "a .* finite number at n = 0.37, sigma = 0.57",
        ),
        (
            lambda: GradientTemplate(b="1/(n - 1.73)"),
            "b .* finite number at n = 1.73, sigma = 0.13",
        ),
        (lambda: GradientTemplate(lam="(0.5 - sigma)**0.5"), "lam .* sigma = 0.57: .*j"),
        (
            lambda: GradientTemplate("10.0**999"),
            "a '10.0..999' is not a finite number .*34, ",
        ),
        (
            lambda: GradientTemplate("1/(n - 1.5)", normaliser="none", epsilon=0.5),
            "at n = 1.5, sigma = 0.13: float division by zero",
        ),
        (lambda: GradientTemplate("True"), "True is no number"),
        (lambda: GradientTemplate("'n'"), "'n' is no number"),
        (lambda: GradientTemplate("m"), "'m' is not allowed"),
    ],
)
def test_impossible_fields_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_fields_at_their_bounds_are_accepted():
    assert DPDMD(teacher_steps=5, anchor=5).anchor == 5
    assert GradientTemplate("2**-1 + n*sigma - 1").a == "2**-1 + n*sigma - 1"
    assert GradientTemplate("1/(n - 1.73)", normaliser="none", epsilon=0.5).epsilon == 0.5
