"""Resolves a run: applies its preset, writes out defaults, hashes its files and checks it.

Uses no network.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from distill_bench.config.checks import Candidate, check_run
from distill_bench.config.errors import ConfigError, hint
from distill_bench.config.identity import initial_keys
from distill_bench.config.overrides import absolute, apply_overrides
from distill_bench.config.schema import RunConfig
from distill_bench.config.validation import one_line, validate
from distill_bench.config.yaml_files import load_written
from distill_bench.registry import (
    RegistryError,
    find_method,
    is_relative_file,
    search_plugins_in,
)
from distill_bench.teachers.contents import content_hash
from distill_bench.teachers.diffusers_folder import EXPERTS
from distill_bench.teachers.folder import is_local_folder
from distill_bench.teachers.kinds import Teacher, find_teacher
from distill_bench.teachers.prompts import (
    FILE_PREFIX,
    check_negative_prompt,
    negative_text,
    prompts_hash,
    text_hash,
)

if TYPE_CHECKING:
    from distill_bench.method import Method

DEFAULT_TEACHER = RunConfig.model_fields["teacher"].default


def load_run(run_dir: Path) -> RunConfig:
    """The resolved config of a run folder; its plugin files are found from now on.

    Raises:
        ConfigError: if there is no run.yaml, or it is invalid.
    """
    config = stored_config(run_dir)
    search_plugins_in(Path(config.launch_folder) if config.launch_folder else None)
    return config


def stored_config(run_dir: Path) -> RunConfig:
    """The resolved config of a run folder.

    Raises:
        ConfigError: if there is no run.yaml, or it is invalid.
    """
    path = run_dir / "run.yaml"
    if not path.is_file():
        raise ConfigError(
            f"{run_dir} is not a run folder: it has no run.yaml; name a folder in runs/"
        )
    return validate(RunConfig, load_written(path), str(path))


def resolve(data: Mapping[str, Any], stages: Mapping[str, RunConfig] = {}) -> RunConfig:
    """Complete the given keys of a run and check them.

    Adds the schema's defaults, the method's fields and version, the preset, and the hashes of
    teacher, student, prompts and data. Teachers must be local
    (`distill_bench.teachers.hub.make_local`).

    Args:
        stages: resolved configs of the sweep's stages, by name (`init`).

    Raises:
        ConfigError: if a key is invalid, or the run is impossible.
    """
    fields = _method_fields(data)
    try:
        method_class = find_method(fields["name"])
        teacher = find_teacher(str(data.get("teacher", DEFAULT_TEACHER)))
        fps = teacher.fps
    except (RegistryError, ValueError) as error:
        raise ConfigError(str(error)) from error
    data = _with_preset(method_class, dict(data) | {"method": fields})
    fields = data["method"]
    method = build_method(method_class, {k: v for k, v in fields.items() if k != "name"})
    student = _student_folder(data)

    data["method"] = {"name": fields["name"]} | stated_fields(method)
    data["method_version"] = method.version
    data |= _hashes(data, teacher, student)
    data |= initial_keys(data.get("init"), stages)
    if isinstance(data.get("protocol", {}), dict):
        own_fps = {} if fps is None else {"fps": fps}
        stated = own_fps | data.get("protocol", {})
        data["protocol"] = stated | _negative_prompt(stated, teacher)
    if not method.has_fake_score or data.get("fake_score") == "exact":
        data["fake_score_updates"] = None

    data |= absolute_paths(data)
    config = validate(RunConfig, data, "run")
    if any(
        is_relative_file(name) for name in (fields["name"], *(config.protocol.evaluators or ()))
    ):
        config = config.model_copy(update={"launch_folder": str(Path.cwd())})
    check_run(Candidate(config, method, teacher, student))
    if config.fake_score_updates is None:
        # these keys have no effect without a trained fake score, so they must not change the id
        kind = config.fake_score if method.has_fake_score else "trained"
        config = config.model_copy(update={"fake_score": kind, "reuse_rollout": False})
    if (config.fake_score_updates or 0) - bool(config.reuse_rollout) < 2:  # one rollout is a batch
        config = config.model_copy(update={"fake_score_rollouts": "sequential"})
    return config


def evaluated_updates(config: RunConfig) -> list[int]:
    """Student updates at which the student is kept and scored: evenly spaced, the last included."""
    n = config.evaluations
    return sorted({-(-config.student_updates * i // n) for i in range(1, n + 1)})


def method_of(config: RunConfig) -> "Method":
    """The method of a run, with its hyper-parameters."""
    fields = dict(config.method)
    return build_method(find_method(fields.pop("name")), fields)


def build_method(method_class: "type[Method]", fields: dict[str, Any]) -> "Method":
    """A method with validated fields: "0.2" and true are not numbers, 8.0 is not an integer.

    Raises:
        ConfigError: for an unknown field or an invalid value.
    """
    known = [f.name for f in dataclasses.fields(method_class)]
    for name, value in fields.items():
        if name not in known:
            raise ConfigError(
                f"method.{name}: {method_class.__name__} has no such field{hint(name, known)}"
            )
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"method.{name} = {value!r}: {error}") from error
    try:
        return _adapter(method_class).validate_json(json.dumps(fields), strict=True)
    except ValidationError as error:
        raise ConfigError(one_line(error, "method")) from error


@cache  # pydantic takes a millisecond to build one
def _adapter(method_class: "type[Method]") -> TypeAdapter:
    return TypeAdapter(method_class)


def stated_fields(method: "Method") -> dict[str, Any]:
    """Fields of a method that run.yaml states: all but those of `method.added` at their default."""
    return {
        f.name: getattr(method, f.name)
        for f in dataclasses.fields(method)
        if not (f.metadata.get("added") and getattr(method, f.name) == f.default)
    }


def _method_fields(data: Mapping[str, Any]) -> dict[str, Any]:
    """`method` of a run as a mapping with a name."""
    method = data.get("method")
    if method is None:
        raise ConfigError(
            "method is missing: name one, for instance `method: NAME` (see `distill-bench list`)"
        )
    fields = method if isinstance(method, dict) else {"name": method}
    if not isinstance(fields.get("name"), str):
        raise ConfigError(f"method.name is {fields.get('name')!r}: it must name a method")
    return fields


def absolute_paths(data: Mapping[str, Any]) -> dict[str, str]:
    """Keys of a run that name files and folders, with absolute paths: a job may start anywhere.

    None of these keys is part of the run's id.
    """
    keys = [key for key in ("teacher", "student") if is_local_folder(data.get(key))]
    keys += [key for key in ("prompts", "data") if isinstance(data.get(key), str)]
    keys += ["negative_prompt"] * str(data.get("negative_prompt")).startswith(FILE_PREFIX)
    return {key: absolute(data[key]) for key in keys}


def _with_preset(method_class: "type[Method]", data: dict[str, Any]) -> dict[str, Any]:
    """Fill in the method's preset; keys that the run states itself win."""
    fields = dict(data["method"])
    name = fields.pop("preset", None)
    if name is None:
        return data
    preset = method_class.presets.get(name) if isinstance(name, str) else None
    if preset is None:
        known = ", ".join(method_class.presets) or "none"
        raise ConfigError(
            f"method.preset is {name!r}: {fields['name']} has no such preset; known: {known}"
        )
    written = apply_overrides({"method": {"name": fields["name"]}}, preset.overrides)
    return written | data | {"method": written["method"] | fields}


def _student_folder(data: Mapping[str, Any]) -> Path | None:
    """Folder of the pipeline that the student starts from; None for the teacher's."""
    if data.get("student") is None:
        return None
    name = str(data["student"])
    if name.startswith("run:"):
        run = name.removeprefix("run:")
        raise ConfigError(
            f"student {name!r}: to start from the student of a run, write init: {run}"
        )
    try:
        return find_teacher(name).folder
    except ValueError as error:
        raise ConfigError(f"student: {error}") from error


def _hashes(data: Mapping[str, Any], teacher: Teacher, student: Path | None) -> dict[str, str]:
    """Hashes of a run's files; "" for keys that are omitted."""
    prompts, clips = data.get("prompts"), data.get("data")
    part = EXPERTS.get(str(data.get("student_expert")), "transformer")
    return {
        "teacher_hash": content_hash(teacher.folder),
        "student_hash": "" if student is None else content_hash(student / part),
        "prompts_hash": "" if prompts is None else _prompts_hash(teacher, Path(str(prompts))),
        "data_hash": "" if clips is None else _clips_hash(Path(str(clips))),
    } | _negative_prompt(data, teacher)


def _negative_prompt(data: Mapping[str, Any], teacher: Teacher) -> dict[str, str]:
    """Hash of the key `negative_prompt` of a run or a protocol; a file's path becomes absolute."""
    value = data.get("negative_prompt", "")
    if not isinstance(value, str):
        return {}  # left for validation to report
    try:
        check_negative_prompt(value)
        text_digest = text_hash(negative_text(value, teacher.negative_prompt))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return {"negative_prompt": value, "negative_prompt_hash": text_digest} | absolute_paths(
        {"negative_prompt": value}
    )


def _prompts_hash(teacher: Teacher, prompts: Path) -> str:
    if not teacher.has_networks:
        raise ConfigError(
            f"prompts {prompts}: a {teacher.kind} teacher has prompts of its own; leave `prompts` "
            "out"
        )
    try:
        return prompts_hash(prompts)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _clips_hash(folder: Path) -> str:
    """Hash (12 hex digits) of a folder of clips."""
    files = [folder / "clips.npy", folder / "manifest.jsonl"]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ConfigError(f"data {folder} is not a folder of clips: it lacks {', '.join(missing)}")
    file_hashes = b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)
    return hashlib.sha256(file_hashes).hexdigest()[:12]
