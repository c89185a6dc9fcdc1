"""Draws: one generator seeded in turn gives the values of one generator per key."""

import pytest
import torch

from distill_bench.draws import Draws, generator, seeded

KEY = (3, 17, "fake_score/0", "renoise/noise")


@pytest.mark.parametrize("shape", [(), (3,), (1, 4, 2, 2), (4, 5)])
def test_seeding_in_turn_gives_the_draws_of_separate_generators(shape):
    indices = [0, 1, 9, 10, 127, 100_000]
    in_turn = [torch.randn(shape, generator=g) for g in seeded(KEY, indices)]
    apart = [torch.randn(shape, generator=generator(*KEY, index)) for index in indices]
    assert all(torch.equal(a, b) for a, b in zip(in_turn, apart, strict=True))
    assert not torch.equal(in_turn[0], in_turn[1])


def test_an_odd_number_of_normal_values_leaves_nothing_for_the_next_key():
    """A generator keeps the second value of a pair; a new seed must drop it."""
    g = next(seeded(KEY, [0]))
    torch.randn(3, generator=g)
    again = [torch.randn(3, generator=g) for g in seeded(KEY, [0, 1, 0])]
    assert torch.equal(again[0], again[2])


def test_draws_are_keyed_by_the_global_index():
    whole = Draws(*KEY[:3], range(8), torch.device("cpu"))
    part = Draws(*KEY[:3], [5, 6], torch.device("cpu"))
    assert torch.equal(whole.noise("x", (2, 3))[5:7], part.noise("x", (2, 3)))
    assert torch.equal(whole.uniform("x")[5:7], part.uniform("x"))
    assert whole.integers("x", 100)[5:7] == part.integers("x", 100)
    expected = torch.randn(2, 3, generator=generator(*KEY[:3], "x", 6))
    assert torch.equal(part.noise("x", (2, 3))[1], expected)
