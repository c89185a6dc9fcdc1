"""Types of a method's fields, and marks that state the direction in which a number acts.

`distill_bench.testing` holds every mark against the method. A mark names quantities of one student
update:

- `TERM`: value of a term of either loss; `gradient/TERM`: norm of its gradient at the weights;
- `level/ROLE`: mean noise level at which the losses evaluate a role of `Nets`;
- `evaluations/ROLE`: number of these evaluations;
- `depth`: mean share of the blocks that the losses run for features;
- `rate/MODULE`: learning rate of one of the method's modules;
- `size/MODULE`, `mean/MODULE`: number of its values, and mean of its buffers after the losses;
- `moves/NAME`: norm of the change of a role by the method's hook, or of the buffers of a module by
  the losses.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field


class Scales:
    """Marks a field as the only weight of terms: `Annotated[NotNegative, Scales("gan")] = 0.1`."""

    def __init__(self, *terms: str) -> None:
        self.terms = terms


@dataclass(frozen=True)
class Equals:
    """Marks a field as the value of a quantity: `Annotated[float, Equals("rate/head")] = 1e-4`."""

    quantity: str


class Raises:
    """Marks a field that raises quantities: `Annotated[float, Raises("gradient/kl")] = 1.0`.

    Args:
        quantities: if one is a term or its gradient, the field changes no other term of that loss.
        linear: they are also linear in the field.
    """

    sign = 1

    def __init__(self, *quantities: str, linear: bool = False) -> None:
        self.quantities = quantities
        self.linear = linear


class Lowers(Raises):
    """Marks a field that lowers quantities, as `Raises`."""

    sign = -1


@dataclass(frozen=True)
class NoDirection:
    """Marks a number that acts in no direction; `distill-bench check` prints the reason."""

    reason: str


# Types that state their range; it is checked when a run is resolved.
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Depth = Annotated[float, Field(gt=0, le=1), Equals("depth")]  # share of a network's blocks


def added(default: Any) -> Any:
    """A field of a method that some stored runs are older than.

    At its default, the earlier behaviour, it is left out of run.yaml and of the run's id, so that
    the stored runs keep their ids.
    """
    return field(default=default, metadata={"added": True})
