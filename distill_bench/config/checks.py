"""TODO: config.checks."""

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from distill_bench.config.errors import ConfigError
from distill_bench.config.schema import AdapterConfig, RunConfig
from distill_bench.registry import RegistryError, find_evaluator
from distill_bench.teachers.contents import weight_shapes
from distill_bench.teachers.kinds import Teacher
from distill_bench.teachers.texts import prompts_hash, read_prompts

if TYPE_CHECKING:
    from distill_bench.method import Method


def check_prompts(teacher: str, path: Path) -> None:
    """ConfigError where a teacher has no prompts of its own."""
    if not path.is_file():
        raise ConfigError(
            f"teacher {teacher} has no prompts.txt: name a file of prompts in the key `prompts`"
        )
    try:
        read_prompts(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def hash_of_prompts(teacher: Teacher, prompts: Path) -> str:
    if not teacher.has_networks:
        raise ConfigError(
            f"prompts {prompts}: a {teacher.kind} teacher has prompts of its own; leave `prompts` out"
        )
    try:
        return prompts_hash(prompts)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_held(config: RunConfig, teacher: Teacher, method_class: "type[Method]") -> None:
    """ConfigError for a way to hold the networks that the run cannot have."""
    if config.weights == "bfloat16" and config.precision != "bfloat16":
        raise ConfigError(
            f"weights 'bfloat16' needs precision 'bfloat16', not {config.precision!r}"
        )
    held = ("adapter", "gradient_checkpointing", "sharding", "teacher_offload", "compile")
    asked = [key for key in held if getattr(config, key)] + ["weights"] * (
        config.weights != "float32"
    )
    asked += ["protocol.precision"] * (config.protocol.precision != "float32")
    if not teacher.has_networks and asked:
        raise ConfigError(f"{asked[0]} needs a transformer: the teacher {config.teacher!r} is none")
    if not teacher.has_networks and method_class.mixes_weights:
        raise ConfigError(
            f"teacher {config.teacher!r}: {config.method['name']} averages weights of two roles, which are networks of two kinds "
            "there; name a transformer"
        )
    if config.adapter and method_class.mixes_weights:
        raise ConfigError(
            f"adapter: {config.method['name']} averages weights of two roles, and products of factors do not average"
        )
    if config.adapter:
        check_targets(config.adapter, teacher.folder)
    for key, other in (
        ("sharding", "adapter"),
        ("teacher_offload", "adapter"),
        ("student", "adapter"),
    ):
        if getattr(config, key) and getattr(config, other):
            raise ConfigError(
                f"{key} with {other}: one set of base weights serves all roles; leave {key} out"
            )
    for key in ("adapter", "sharding", "teacher_offload"):
        if config.compile and getattr(config, key):
            raise ConfigError(
                f"compile with {key}: blocks that change between forwards would be compiled again; leave one out"
            )
    if config.compile and config.reuse_rollout == "graph":
        raise ConfigError(
            "compile with reuse_rollout 'graph': a compiled backward runs once for a forward; reuse_rollout true"
        )
    if config.sharding and config.reuse_rollout == "graph":
        raise ConfigError(
            "sharding with reuse_rollout 'graph': shards are gathered for one phase at a time; reuse_rollout true"
        )


def check_targets(adapter: AdapterConfig, folder: Path) -> None:
    """ConfigError for the name of no layer: peft passes over it where there is another that it finds."""
    shapes = weight_shapes(folder / "transformer").items()
    layers = [
        name.removesuffix(".weight")
        for name, shape in shapes
        if name.endswith(".weight") and len(shape) > 1
    ]
    for target in adapter.targets if layers else ():
        if not any(f".{layer}".endswith(f".{target}") for layer in layers):
            ends = sorted(
                {re.sub(r"^\w+\.\d+\.", "", layer) for layer in layers}
            )  # without the block
            raise ConfigError(
                f"adapter.targets {target}: no layer is called so; linear layers end in: {', '.join(ends)}"
            )


def check_named(config: RunConfig) -> None:
    """ConfigError for an evaluator or a tracker that is not there: a job would find out when its training is done, or never."""
    try:
        for name in config.protocol.evaluators or ():
            find_evaluator(name)
    except RegistryError as error:
        raise ConfigError(f"protocol.evaluators: {error}") from error
    if set(config.trackers) - {"tensorboard"}:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

        here = [str(tracker) for tracker in get_available_trackers()]
        for name in config.trackers:
            if name not in here:
                why = (
                    "is not installed"
                    if name in LOGGER_TYPE_TO_CLASS
                    else "is none of accelerate's"
                )
                raise ConfigError(f"trackers: {name!r} {why}; here: {', '.join(here)}")


def clips_hash(folder: Path) -> str:
    """A digest of a folder of clips (12 digits)."""
    files = [folder / "clips.npy", folder / "manifest.jsonl"]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ConfigError(f"data {folder} is no folder of clips: it lacks {', '.join(missing)}")
    return hashlib.sha256(
        b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)
    ).hexdigest()[:12]
