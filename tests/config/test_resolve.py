"""Resolving a run: defaults, fields of methods, and checks against its teacher."""

from dataclasses import dataclass
from typing import ClassVar

import pytest

from distill_bench.config.errors import ConfigError
from distill_bench.config.resolve import evaluated_updates, method_of, resolve
from distill_bench.method import Batch, Depth, Loss, Method, Nets


@dataclass(frozen=True)
class Listed(Method):
    """A method with a tuple for a field."""

    paper: ClassVar[str] = "none"
    depths: tuple[Depth, ...] = (0.5,)

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        raise NotImplementedError


def method_fields(**fields) -> dict:
    return resolve({"method": fields}).method


def test_yaml_values_become_the_types_of_a_methods_fields():
    """Integers for floats, lists for tuples, numbers for coefficients."""
    assert method_fields(name="sgmd", residual_weight=1)["residual_weight"] == 1.0
    assert method_fields(name="gradient_template", a=0, b=0.5)["b"] == "0.5"
    listed = resolve({"method": {"name": f"{__file__}:Listed", "depths": [0.5, 1]}})
    assert method_of(listed).depths == (0.5, 1.0)


@pytest.mark.parametrize(
    "coefficient", ["sigma/(1-sigma)", "1/(1-sigma)", "(1-sigma)**-1", "1/(n-1)", "-n", "2"]
)
def test_a_coefficient_with_a_finite_value_is_accepted(coefficient):
    assert method_fields(name="gradient_template", a=coefficient)["a"] == coefficient


def test_clips_must_fit_the_strides_and_patches_of_the_teacher(tiny_wan):
    """Wan makes 1 + (frames - 1) / 4 latents: eight frames would come back as five."""
    fitting = {"method": "dmd2", "teacher": str(tiny_wan), "frames": 5}
    for key, value in (("frames", 8), ("height", 24), ("width", 8)):
        with pytest.raises(ConfigError, match=f"{key} {value} must be"):
            resolve(fitting | {key: value})


@pytest.mark.parametrize(
    ("updates", "evaluations", "expected"),
    [(100, 4, [25, 50, 75, 100]), (10, 3, [4, 7, 10]), (2, 4, [1, 2]), (7, 1, [7])],
)
def test_students_are_scored_at_even_spacing_and_at_the_end(updates, evaluations, expected):
    run = {"method": "dmd2", "student_updates": updates, "evaluations": evaluations}
    assert evaluated_updates(resolve(run)) == expected
