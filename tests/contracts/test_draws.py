"""Keyed draws: their distributions, and the keys that they depend on."""

import dataclasses

import pytest
import torch

from distill_bench.draws import Draws
from distill_bench.method import Batch
from distill_bench.noise import warp

CPU = torch.device("cpu")
DRAWS = Draws(0, 5, "student", range(4), CPU)
KINDS = {
    "noise": lambda draws, purpose: draws.noise(purpose, (3,)),
    "uniform": lambda draws, purpose: draws.uniform(purpose),
    "sigma": lambda draws, purpose: draws.sigma(purpose, 2.0, 0.0, 1.0),
    "integers": lambda draws, purpose: torch.tensor(draws.integers(purpose, 2**40)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_draws_depend_on_seed_update_phase_purpose_and_sample_index_alone(kind):
    draw = KINDS[kind]
    whole = draw(DRAWS, "a")
    part = dataclasses.replace(DRAWS, indices=[2, 0])
    assert torch.equal(draw(part, "a"), whole[[2, 0]])
    assert len(whole.unique(dim=0)) == 4  # samples differ
    others = [
        draw(DRAWS, "b"),
        draw(dataclasses.replace(DRAWS, seed=1), "a"),
        draw(dataclasses.replace(DRAWS, student_update=6), "a"),
        draw(dataclasses.replace(DRAWS, phase="fake_score/0"), "a"),
        draw(dataclasses.replace(DRAWS, phase="fake_score/1"), "a"),
        draw(dataclasses.replace(DRAWS, indices=range(4, 8)), "a"),
    ]
    values = torch.cat([whole, *others])
    assert len(values.unique(dim=0)) == len(values)


def test_draws_do_not_come_again_however_large_a_part_of_the_key_is():
    numbers = sorted({base**power for base in (2, 10) for power in range(40)})
    keys = [{"seed": n} for n in numbers] + [{"student_update": n} for n in numbers]
    keys += [{"indices": [n]} for n in numbers[4:]] + [
        {"phase": f"fake_score/{n}"} for n in numbers
    ]
    drawn = [dataclasses.replace(DRAWS, **{"indices": [0], **key}).noise("a", (2,)) for key in keys]
    drawn += [DRAWS.noise(f"rollout/{n}", (2,)) for n in numbers]
    values = torch.cat(drawn)
    assert len(values.unique(dim=0)) == len(values)


def test_a_shared_integer_depends_on_seed_update_phase_and_purpose_alone():
    high = 2**40
    drawn = DRAWS.shared_integer("exit", high)
    for indices in ([2], range(100)):
        assert dataclasses.replace(DRAWS, indices=indices).shared_integer("exit", high) == drawn
    others = [
        DRAWS.shared_integer("other", high),
        dataclasses.replace(DRAWS, seed=1).shared_integer("exit", high),
        dataclasses.replace(DRAWS, student_update=6).shared_integer("exit", high),
        dataclasses.replace(DRAWS, phase="fake_score/0").shared_integer("exit", high),
    ]
    assert len({drawn, *others}) == 5


def test_a_shared_level_is_one_for_all_samples_on_every_rank():
    shared = DRAWS.sigma("s", 2.0, 0.0, 1.0, shared=True)
    assert shared.shape == (4,)
    assert len(shared.unique()) == 1
    other = dataclasses.replace(DRAWS, indices=range(7, 9)).sigma("s", 2.0, 0.0, 1.0, shared=True)
    assert other.tolist() == shared[:2].tolist()
    assert shared[0] not in DRAWS.sigma("s", 2.0, 0.0, 1.0)
    assert DRAWS.sigma("other", 2.0, 0.0, 1.0, shared=True)[0] != shared[0]
    for key in ({"seed": 1}, {"student_update": 6}, {"phase": "fake_score/0"}):
        changed = dataclasses.replace(DRAWS, **key).sigma("s", 2.0, 0.0, 1.0, shared=True)
        assert changed[0] != shared[0]


def test_draws_leave_the_global_generator_alone_and_do_not_depend_on_it():
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first = [draw(DRAWS, "a") for draw in KINDS.values()]
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(1)
    second = [draw(DRAWS, "a") for draw in KINDS.values()]
    assert all(map(torch.equal, first, second))


def test_a_float64_run_sees_the_draws_of_a_float32_run():
    double = dataclasses.replace(DRAWS, dtype=torch.float64)
    for draw in (KINDS["noise"], KINDS["uniform"]):
        assert draw(double, "a").dtype == torch.float64
        assert torch.equal(draw(double, "a"), draw(DRAWS, "a").double())


def test_draws_are_made_on_the_cpu_and_lie_on_their_device():
    far = dataclasses.replace(DRAWS, device=torch.device("meta"), dtype=torch.float64)
    for draw in (
        far.noise("a", (3,)),
        far.uniform("a"),
        far.shared_uniform("a"),
        far.sigma("a", 2.0, 0.0, 1.0),
    ):
        assert draw.device.type == "meta"
        assert draw.dtype == torch.float64
        assert len(draw) == 4


def test_noise_is_standard_normal():
    noise = dataclasses.replace(DRAWS, indices=range(100)).noise("n", (200,))
    assert noise.shape == (100, 200)
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1) < 0.03
    assert float((noise.abs() < 0.6745).float().mean()) == pytest.approx(0.5, abs=0.02)


def test_integers_reach_every_value_below_their_bound():
    many = dataclasses.replace(DRAWS, indices=range(300))
    assert set(many.integers("i", 5)) == set(range(5))
    shared = {
        dataclasses.replace(DRAWS, student_update=update).shared_integer("exit", 4)
        for update in range(60)
    }
    assert shared == set(range(4))


def test_drawn_noise_levels_stay_in_their_range_and_follow_the_shift():
    """Quartiles of a uniform distribution, shifted; out of range, levels are at its ends."""
    many = dataclasses.replace(DRAWS, indices=range(3000))
    sigma = many.sigma("s", 5.0, 0.2, 0.9)
    assert sigma.min() == pytest.approx(0.2)
    assert sigma.max() == pytest.approx(0.9)
    quartiles = torch.tensor([0.25, 0.5])
    expected = 5 * quartiles / (1 + 4 * quartiles)
    torch.testing.assert_close(sigma.quantile(quartiles), expected, rtol=0, atol=0.02)
    torch.testing.assert_close(sigma, warp(many.uniform("s"), 5.0).clamp(0.2, 0.9))


def test_a_batch_draws_with_its_own_shape_shift_range_and_extras():
    shape = (2, 3, 1, 1)
    text = torch.zeros(4, 1, 1)
    extras = {"real_latents": lambda draws: {"x0": draws.noise("rows", (1,))}}
    batch = Batch(text, DRAWS, shape, 3.0, 0.1, 0.8, extras)
    assert torch.equal(batch.noise("n"), DRAWS.noise("n", shape))
    assert torch.equal(batch.sigma("s"), DRAWS.sigma("s", 3.0, 0.1, 0.8))
    for phase in ("student", "fake_score/0"):
        draws = dataclasses.replace(DRAWS, phase=phase)
        one = dataclasses.replace(batch, draws=draws, one_sigma=True)
        assert torch.equal(one.sigma("s"), draws.sigma("s", 3.0, 0.1, 0.8, shared=True))
    assert torch.equal(batch.extra("real_latents")["x0"], DRAWS.noise("rows", (1,)))
