"""A run's id and the keys that group runs: hashes of a resolved config."""

import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel

from distill_bench.config.errors import ConfigError, hint
from distill_bench.config.schema import RunConfig

RUN_ID = re.compile(r".+-s\d+-([0-9a-f]{12})")
SCHEMA_VERSION = 1  # part of every run's id: raise it when the meaning of a key changes

# keys without effect on the cost of a student update
COST_FREE = frozenset({
    "seed", "student_updates", "student_lr", "fake_score_lr", "beta1", "beta2", "weight_decay",
    "grad_clip", "protocol", "prompts_hash", "negative_prompt_hash", "init_hash", "student_expert",
})  # fmt: skip


def run_id(config: RunConfig) -> str:
    """`<method>-s<seed>-<hash>`; the hash covers the resolved config, defaults included."""
    return f"{short_name(config.method['name'])}-s{config.seed}-{_digest(hashed_fields(config))}"


def group_id(config: RunConfig) -> str:
    """Hash of the config without its seed: runs of one group are one row of a table."""
    fields = hashed_fields(config)
    fields.pop("seed")
    written = repr(fields)  # takes a tenth of the time of the hash; equal for the seeds of a row
    if written not in _group_ids:
        _group_ids[written] = _digest(fields)
    return _group_ids[written]


_group_ids: dict[str, str] = {}


def cost_key(config: RunConfig) -> str:
    """Hash shared by runs whose student updates cost the same."""
    return _digest({k: v for k, v in hashed_fields(config).items() if k not in COST_FREE})


def hashed_fields(config: BaseModel) -> dict[str, Any]:
    """The fields that enter a run's id, those of nested models included (`schema.key`)."""
    fields = {}
    for name, added, default in _id_fields(type(config)):
        value = getattr(config, name)
        if not (added and value == default):
            # pydantic's isinstance takes longer than the rest of the loop
            plain = type(value) in _PLAIN or not isinstance(value, BaseModel)
            fields[name] = value if plain else hashed_fields(value)
    return fields


@cache
def _id_fields(model: type[BaseModel]) -> list[tuple[str, bool, Any]]:
    """Name, `added` and default of each field that enters a run's id."""
    declared = [(name, f.json_schema_extra, f.default) for name, f in model.model_fields.items()]
    return [(name, extra["added"], default) for name, extra, default in declared if extra["in_id"]]


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
    match = RUN_ID.fullmatch(init) if isinstance(init, str) else None
    if match is None:
        known = hint(str(init), list(stages)) if stages else ""
        raise ConfigError(
            f"init {init!r} names no stage of the sweep{known}; write it under `stages`, or give "
            "the id of a run in the store"
        )
    return {"init_run": init, "init_hash": match[1]}


def short_name(method: str) -> str:
    """A method's name in ids and tables; `path/file.py:Class` becomes `class`."""
    return method.rpartition(":")[2].lower() if ":" in method else method


def default_title(name: str) -> str:
    """Display name made from a method's name: `tsg_fisher` becomes "TSG Fisher".

    A word of up to three letters, with a digit, or without a vowel is taken for an acronym.
    """
    words = [word for word in name.split("_") if word]
    return " ".join(
        word.upper()
        if len(word) < 4 or not word.isalpha() or not set(word) & set("aeiou")
        else word.capitalize()
        for word in words
    )


def method_title(config: RunConfig, presets: Mapping[str, str]) -> str:
    """Display name of a run's method: its name plus the preset of its cell, e.g. `dmd2 video`.

    Args:
        presets: group id -> preset, from `SweepConfig.presets`.
    """
    preset = presets.get(group_id(config)) if presets else None
    return " ".join(filter(None, [config.method["name"], preset]))


def _digest(value: Any) -> str:
    text = json.dumps([SCHEMA_VERSION, canonical(value)], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


_PLAIN = frozenset({str, float, bool, type(None)})


def canonical(value: Any) -> Any:
    """Give equal values one JSON text: integers become floats, tuples become lists.

    True and 1 stay different.
    """
    if isinstance(value, dict):
        # most values are plain: ten thousand ids are planned in seconds
        return {str(k): v if type(v) in _PLAIN else canonical(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [canonical(v) for v in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def canonical_text(value: Any) -> str:
    """JSON of a value, the same for equal values; see `canonical`."""
    return json.dumps(canonical(value), sort_keys=True)
