"""Runs whose student starts from the student of another run, the initial run (`init`)."""

import re
from collections.abc import Mapping
from typing import Any

from distill_bench.config.errors import ConfigError, hint
from distill_bench.config.identity import group_id, run_id
from distill_bench.config.schema import RunConfig

_RUN_ID = re.compile(r".+-s\d+-([0-9a-f]{12})")


def initial_keys(init: Any, stages: Mapping[str, RunConfig]) -> dict[str, str | None]:
    """Id of the initial run and hash of its config, for the value of `init`.

    The hash of a stage leaves out the seed, which is the run's own: runs that differ only in their
    seed stay one row. Of a run given by its id, the hash is that of the id.

    Args:
        init: name of a stage, id of a run, or None.
        stages: resolved configs of the sweep's stages, by name.

    Raises:
        ConfigError: if `init` is neither a stage nor the form of an id.
    """
    if init is None:
        return {"init_run": None, "init_hash": ""}
    if isinstance(init, str) and init in stages:
        return {"init_run": run_id(stages[init]), "init_hash": group_id(stages[init])}
    match = _RUN_ID.fullmatch(init) if isinstance(init, str) else None
    if match is None:
        known = hint(str(init), list(stages)) if stages else ""
        raise ConfigError(
            f"init {init!r} names no stage of the sweep{known}; write it under `stages`, or give "
            "the id of a run in the store"
        )
    return {"init_run": init, "init_hash": match[1]}


def in_order(stages: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names of stages, each after the stage that it starts from.

    Raises:
        ConfigError: if a stage has the form of a run's id, or stages start from each other.
    """
    for name in stages:
        if not name.strip() or _RUN_ID.fullmatch(name):
            raise ConfigError(f"stages.{name}: a name is a text that is not the id of a run")
    ordered: list[str] = []
    waiting = dict(stages)
    while waiting:
        ready = [name for name, keys in waiting.items() if keys.get("init") not in list(waiting)]
        if not ready:
            raise ConfigError(
                f"stages {', '.join(waiting)} start from each other in a circle; leave `init` out "
                "of one of them"
            )
        ordered += ready
        waiting = {name: keys for name, keys in waiting.items() if name not in ready}
    return ordered


def check_initial(config: RunConfig, initial: RunConfig) -> None:
    """Check that a run's student can start from the student of its initial run.

    Raises:
        ConfigError: if teacher, student or sizes differ, or adapters do not fit.
    """
    where = f"init {config.init}"
    names = {"teacher": "teacher", "student": "pipeline of `student`"}
    for key, title in names.items():
        hashes = [getattr(run, f"{key}_hash") for run in (initial, config)]
        if hashes[0] != hashes[1]:
            theirs, own = (getattr(run, key) or "the teacher" for run in (initial, config))
            raise ConfigError(
                f"{where}: its {title} is {theirs} (content {hashes[0] or '-'}), this run's is "
                f"{own} (content {hashes[1] or '-'}); both need the same"
            )
    theirs, own = (f"{c.frames} x {c.height} x {c.width}" for c in (initial, config))
    if theirs != own:
        raise ConfigError(
            f"{where}: its clips are {theirs} (frames x height x width), this run's {own}, so "
            "their training costs have no common unit; train both on one size"
        )
    if config.adapter is not None and config.adapter != initial.adapter:
        raise ConfigError(
            f"{where}: with `adapter`, all roles share the teacher's weights, so the student can "
            "start only from a run with the same adapter; give both the same, or leave `adapter` "
            "out of this run"
        )
