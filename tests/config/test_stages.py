"""`stages` and `init`: ids, seeds and rows of runs that start from the student of another run."""

from pathlib import Path

import pytest

from distill_bench.config.checks import check_initial
from distill_bench.config.errors import ConfigError
from distill_bench.config.identity import cost_key, group_id, run_id
from distill_bench.config.resolve import resolve
from distill_bench.config.schema import AdapterConfig, RunConfig
from distill_bench.config.sweep_file import SweepConfig, load_sweep

STAGED = """
question: Where should students start?
base: {teacher: gaussian, nfe: 2, init: short}
stages:
  short: {method: consistency, init: long, student_updates: 10}
  long: {method: consistency, student_lr: 1e-3}
grid: {method: [dmd2, sgmd], init: [null, short]}
seeds: 2
"""


def load(folder: Path, text: str = STAGED, **overrides) -> SweepConfig:
    path = folder / "staged.yaml"
    path.write_text(text)
    return load_sweep(path, overrides)


def by_start(sweep: SweepConfig) -> dict[tuple[str, str | None, int], RunConfig]:
    """(Method, `init`, seed) -> run; the stages are told apart by their start."""
    return {(run.method["name"], run.init, run.seed): run for run in sweep.expand()}


def test_a_run_starts_from_the_stage_of_its_own_seed_and_stays_in_its_row(tmp_path):
    sweep = load(tmp_path)
    runs = by_start(sweep)
    assert len(runs) == 12
    for seed in (0, 1):
        long, short = (runs["consistency", init, seed] for init in (None, "long"))
        assert short.init_run == run_id(long)
        assert long.init_run is None, "a stage does not start as base says"
        for method in ("dmd2", "sgmd"):
            assert runs[method, "short", seed].init_run == run_id(short)
            assert runs[method, None, seed].init_run is None
    rows = {group_id(run) for run in runs.values()}
    assert len(rows) == 6
    labels = {label.text for label in sweep.labels().values()}
    assert labels == {"short", "long"}
    assert sweep.axes(runs.values())["init"] == [None, "short", "long"]
    assert sweep.expand()[0].init is None, "the first row, often the baseline, is not a stage"
    assert {cost_key(runs["dmd2", init, 0]) for init in (None, "short")} == {
        cost_key(runs["dmd2", None, 0])
    }


def test_the_id_covers_every_key_of_every_earlier_stage_and_no_key_of_the_others(tmp_path):
    plain = load(tmp_path, "question: q\nbase: {teacher: gaussian, nfe: 2}\ngrid: {method: [dmd2]}")
    before = {key: run_id(run) for key, run in by_start(load(tmp_path)).items()}
    assert before["dmd2", None, 0] == run_id(plain.expand()[0])
    changed = load(tmp_path, STAGED.replace("student_lr: 1e-3", "student_lr: 2e-3"))
    after = {key: run_id(run) for key, run in by_start(changed).items()}
    moved = {key for key, run in after.items() if before[key] != run}
    assert moved == {key for key in after if key[1] or key[0] == "consistency"}
    renamed = by_start(load(tmp_path, STAGED.replace("short", "brief")))
    assert {run_id(run) for run in renamed.values()} == set(before.values())


def test_a_run_given_by_its_id_is_the_start_of_every_seed(tmp_path):
    first = run_id(by_start(load(tmp_path))["consistency", "long", 0])
    runs = load(tmp_path, STAGED.replace("[null, short]", f"[{first}]")).expand()
    followers = [run for run in runs if run.init == first]
    assert len(followers) == 4
    assert {run.init_run for run in followers} == {first}
    assert len({group_id(run) for run in followers}) == 2
    other = first[:-1] + ("0" if first[-1] != "0" else "1")
    followed = resolve({"method": "dmd2", "teacher": "gaussian", "init": other})
    assert run_id(followed) != run_id(followers[0])


def test_overrides_reach_stages_except_for_their_start(tmp_path):
    runs = by_start(load(tmp_path, student_updates=4, init=None))
    assert {run.student_updates for run in runs.values()} == {4}
    assert {run.init for run in runs.values()} == {None, "long"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("long: {", "long: {init: short, "), "stages short, long start from each other"),
        (("[null, short]", "[null, shrot]"), "init 'shrot' names no stage of the sweep (did you"),
        (("init: long", "init: [long]"), "init ['long'] names no stage"),
        (("init: long", "seed: 1"), "seed cannot be set per cell"),
        (("init: long", "lr: 1"), "unknown key 'lr'"),
        (("long:", "a-s0-0123456789ab:"), "a name is a text that is not the id of a run"),
    ],
)
def test_impossible_stages_are_refused_with_one_line(change, message, tmp_path):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, STAGED.replace(*change)).expand()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("run", "initial", "message"),
    [
        ({}, {"teacher": "mixture"}, "its teacher is mixture"),
        ({"frames": 16}, {}, "its clips are 8 x 32 x 32"),
        ({"adapter": {}}, {}, "only from a run with the same adapter"),
        ({"adapter": {"rank": 4}}, {"adapter": {}}, "only from a run with the same adapter"),
        ({"adapter": {}}, {"adapter": {}}, None),
        ({}, {"adapter": {}}, None),
        ({"batch_size": 4, "nfe": 2, "ema": None}, {"student_updates": 7}, None),
    ],
)
def test_a_run_starts_only_from_a_student_that_fits(run, initial, message):
    def config(keys: dict) -> RunConfig:
        keys = dict(keys)
        adapter = keys.pop("adapter", None)
        plain = resolve({"method": "dmd2", "teacher": "gaussian"} | keys)
        adapted = None if adapter is None else AdapterConfig(**adapter)
        return plain.model_copy(update={"adapter": adapted})

    if message is None:
        check_initial(config(run), config(initial))
        return
    with pytest.raises(ConfigError, match=message):
        check_initial(config(run), config(initial))


def test_a_run_starts_only_from_a_student_of_the_same_pipeline_and_expert():
    config = resolve({"method": "dmd2", "teacher": "gaussian", "init": "x-s0-0123456789ab"})
    other = config.model_copy(update={"student": "small", "student_hash": "abc"})
    with pytest.raises(ConfigError, match="its pipeline of `student` is small"):
        check_initial(config, other)
    other = config.model_copy(update={"student_expert": "low_noise"})
    with pytest.raises(ConfigError, match="student_expert is low_noise, this run's high_noise"):
        check_initial(config, other)
