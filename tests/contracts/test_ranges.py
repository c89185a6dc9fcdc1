"""Ranges that fields of methods share, at their ends."""

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from distill_bench.method import Count, Depth, NotNegative, Positive, Share

TINY = 1e-9


@pytest.mark.parametrize(
    ("range_of_values", "allowed", "refused"),
    [
        (Count, [1, 2, 10**6], [0, -1, 1.5]),
        (Positive, [TINY, 1, 1e6], [0, -TINY]),
        (NotNegative, [0, TINY, 1, 1e6], [-TINY]),
        (Share, [0, TINY, 1], [-TINY, 1 + TINY]),
        (Depth, [TINY, 1], [0, 1 + TINY]),
    ],
)
def test_a_range_holds_its_ends_and_nothing_beyond(
    range_of_values: Any, allowed: list[float], refused: list[float]
):
    check = TypeAdapter(range_of_values).validate_python
    assert [check(value) for value in allowed] == allowed
    for value in refused:
        with pytest.raises(ValidationError):
            check(value)
