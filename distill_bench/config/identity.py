"""TODO: config.identity."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from distill_bench.config.schema import RunConfig

SCHEMA_VERSION = 1  # part of every run's identity: raise it when the meaning of a field changes


def method_label(name: str) -> str:
    """A method's name as it stands in ids and tables: the file's or the class's own for `path/file.py:Class`."""
    return name.rpartition(":")[2].lower() if ":" in name else name


def run_id(config: RunConfig) -> str:
    """`<method>-s<seed>-<hash>`: the hash is of the resolved config, never of its difference from defaults."""
    return f"{method_label(config.method['name'])}-s{config.seed}-{digest(identity_of(config))}"


def called(config: RunConfig, presets: Mapping[str, str]) -> str:
    """What a reader calls a run's method: its name and, of `SweepConfig.presets`, its preset."""
    return " ".join(filter(None, [config.method["name"], presets.get(group_id(config))]))


def group_id(config: RunConfig) -> str:
    """The identity without the seed: what a table aggregates over."""
    return digest({k: v for k, v in identity_of(config).items() if k != "seed"})


def identity_of(config: BaseModel) -> dict[str, Any]:
    """The fields that count, nested models likewise."""
    fields = {}
    for name, field in type(config).model_fields.items():
        value, about = getattr(config, name), field.json_schema_extra
        if about["identity"] and not (about["came_later"] and value == field.default):
            fields[name] = identity_of(value) if isinstance(value, BaseModel) else value
    return fields


def cost_key(config: RunConfig) -> str:
    """Runs that cost the same a student update: alike but for seed, length, prompts, optimiser and protocol."""
    unlike = {
        "seed",
        "student_updates",
        "student_lr",
        "fake_score_lr",
        "beta1",
        "beta2",
        "weight_decay",
        "grad_clip",
        "protocol",
    }
    unlike.add("prompts_hash")
    return digest({key: value for key, value in identity_of(config).items() if key not in unlike})


def digest(value: Any) -> str:
    text = json.dumps([SCHEMA_VERSION, _canonical(value)], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _canonical(value: Any) -> Any:
    """1.0 and 1 are equal, True and 1 are not, tuples are lists."""
    if isinstance(value, dict):
        return {str(k): _canonical(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(v) for v in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
