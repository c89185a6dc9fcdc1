"""`sampling` of a sweep file: ways to sample students, the untrained network and the teacher."""

import pytest

from distill_bench.config.errors import ConfigError
from distill_bench.config.identity import run_id
from distill_bench.config.resolve import resolve
from distill_bench.config.rows.row import row_id, sampled_rows
from distill_bench.config.rows.sampling import (
    SamplingConfig,
    further_samplings,
    teacher_sampling,
    ways,
)
from distill_bench.config.validation import validate

RUN = {"method": "dmd2", "nfe": 2, "shift": 3.0}


def entry(**keys):
    return validate(SamplingConfig, keys, "sampling")


def names(*entries, **run):
    return [way.name for way in further_samplings(entries, resolve(RUN | run))]


def test_a_students_further_ways_are_every_combination_but_its_own():
    assert names(entry(stepping=["ode", "renoise"])) == ["ode-nfe2-shift3"]
    assert names(entry(stepping=["ode", "renoise"]), stepping="ode") == ["renoise-nfe2-shift3"]
    assert names(entry(stepping="ode", nfe=[2, 4]), entry(nfe=[2, 4])) == [
        "ode-nfe2-shift3",
        "ode-nfe4-shift3",
        "renoise-nfe4-shift3",
    ]
    assert names(entry(of="teacher", nfe=8)) == []
    assert names(entry(stepping=[0.25, 1, 0], shift=[3, 5]), nfe=4) == [
        "renoise0.25-nfe4-shift3",
        "renoise0.25-nfe4-shift5",
        "renoise-nfe4-shift5",
        "ode-nfe4-shift3",
        "ode-nfe4-shift5",
    ]
    assert names(entry(guidance_scale=[1, 3])) == ["renoise-nfe2-shift3-guidance3"]


def test_a_single_step_has_one_stepping():
    assert names(entry(stepping=["ode", "renoise"]), nfe=1) == []


def test_stated_levels_replace_steps_and_shift():
    (way,) = further_samplings([entry(sigmas=[1, 0.5, 0.25])], resolve(RUN))
    assert (way.nfe, way.shift, way.sigmas) == (3, None, (1.0, 0.5, 0.25))
    (other,) = further_samplings([entry(sigmas=[1, 0.5, 0.26])], resolve(RUN))
    assert way.name != other.name


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"stepping": "euler"}, "sampling: stepping.0 = 'euler': Input should be 'renoise' or"),
        ({"stepping": [0.5, 2]}, "stepping.1 = 2: Input should be 'renoise' or 'ode' or less"),
        ({"sigmas": [0.9, 0.5]}, "noise levels start at 1, fall, and stay above 0"),
        ({"sigmas": [1, 0.5, 0.5]}, "noise levels start at 1, fall, and stay above 0"),
        ({"sigmas": [1, 0.5, 0]}, "noise levels start at 1, fall, and stay above 0"),
        ({"sigmas": [1], "nfe": 1}, "sigmas states the levels: leave out nfe and shift"),
        ({"of": "student"}, "of.0 = 'student': Input should be 'students', 'untrained' or"),
        ({"steps": 4}, "unknown key 'steps'"),
        ({"nfe": 0}, "nfe.0 = 0"),
    ],
)
def test_an_invalid_entry_is_refused_by_one_line(keys, message):
    with pytest.raises(ConfigError) as error:
        entry(**keys)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_ends_of_the_scale_of_steppings_have_names_and_so_one_id():
    ids = {run_id(resolve(RUN | {"stepping": stepping})) for stepping in ("renoise", 1, 1.0)}
    ids_ode = {run_id(resolve(RUN | {"stepping": stepping})) for stepping in ("ode", 0)}
    between = run_id(resolve(RUN | {"stepping": 0.5}))
    assert len(ids) == len(ids_ode) == 1
    assert len({*ids, *ids_ode, between}) == 3
    with pytest.raises(ConfigError, match="stepping = 1.5"):
        resolve(RUN | {"stepping": 1.5})


def test_rows_of_the_untrained_network_and_of_the_teacher_leave_out_the_references():
    runs = [
        resolve(RUN | {"stepping": stepping, "seed": s})
        for stepping in ("ode", "renoise")
        for s in (0, 1)
    ]
    entries = [entry(stepping=["ode", "renoise", 0.5]), entry(of="teacher", nfe=[4, 8])]
    rows = sampled_rows(entries, runs)
    assert [row.label for row, _ in rows.values()] == [
        "untrained, stepping 0.5, 2 steps",
        "teacher, ODE, 4 steps",
        "teacher, ODE, 8 steps",
    ]
    assert all(config is runs[0] for _, config in rows.values())
    assert {row.sampling.guidance_scale for row, _ in rows.values()} == {1.0, 3.0}
    (way,) = ways([entry(of="teacher")], "teacher", teacher_sampling(runs[0], 2))
    assert way.name == "ode-nfe2-shift3-guidance3"


def test_the_id_of_a_row_covers_protocol_network_and_sampling():
    config = resolve(RUN)
    rows = sampled_rows([entry(of=["untrained", "teacher"], stepping="ode", nfe=[2, 4])], [config])
    ids = {row_id(row, config) for row, _ in rows.values()}
    other = resolve(RUN | {"protocol": {"clips": 8}})
    ids |= {row_id(row, other) for row, _ in rows.values()}
    assert len(rows) == 4
    assert len(ids) == 8
    trained = resolve(RUN | {"student_lr": 1.0, "seed": 7})
    assert {row_id(row, trained) for row, _ in rows.values()} == set(rows)
