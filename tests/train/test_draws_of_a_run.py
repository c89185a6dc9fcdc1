"""Draws: one generator seeded in turn gives the values of one generator per key."""

import pytest
import torch

from distill_bench.draws import Draws, generator, seeds

KEY = (3, 17, "fake_score/0", "renoise/noise")


def test_seeds_hashed_in_one_go_are_those_of_single_keys():
    indices = [0, 1, 9, 10, 127, 100_000]
    apart = [generator(*KEY, index).initial_seed() for index in indices]
    assert seeds(KEY, indices) == apart
    assert len(set(apart)) == len(indices)


@pytest.mark.parametrize("shape", [(), (3,), (1, 4, 2, 2), (4, 5)])
def test_an_odd_number_of_normal_values_leaves_nothing_for_the_next_sample(shape):
    """A generator keeps the second value of a pair; a new seed must drop it."""
    drawn = Draws(*KEY[:3], range(4), torch.device("cpu")).noise(KEY[3], shape)
    for index, noise in enumerate(drawn):
        assert torch.equal(noise, torch.randn(shape, generator=generator(*KEY, index)))
    assert not torch.equal(drawn[0], drawn[1])


def test_draws_are_keyed_by_the_global_index():
    whole = Draws(*KEY[:3], range(8), torch.device("cpu"))
    part = Draws(*KEY[:3], [5, 6], torch.device("cpu"))
    assert torch.equal(whole.noise("x", (2, 3))[5:7], part.noise("x", (2, 3)))
    assert torch.equal(whole.uniform("x")[5:7], part.uniform("x"))
    assert whole.integers("x", 100)[5:7] == part.integers("x", 100)
    assert part.uniform("x")[1] == torch.rand((), generator=generator(*KEY[:3], "x", 6))
    one = torch.randint(100, (), generator=generator(*KEY[:3], "x", 6))
    assert part.integers("x", 100)[1] == int(one)
    expected = torch.randn(2, 3, generator=generator(*KEY[:3], "x", 6))
    assert torch.equal(part.noise("x", (2, 3))[1], expected)
