"""TODO: config.resolve."""

import dataclasses
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from distill_bench.config.checks import (
    check_held,
    check_named,
    check_prompts,
    clips_hash,
    hash_of_prompts,
)
from distill_bench.config.errors import ConfigError, MissingPackage, hint
from distill_bench.config.loading import load_yaml
from distill_bench.config.overrides import merge
from distill_bench.config.schema import RunConfig, one_line, validate
from distill_bench.registry import RegistryError, find_method
from distill_bench.teachers.contents import content_hash, read_config
from distill_bench.teachers.folder import is_outline
from distill_bench.teachers.kinds import find_teacher

if TYPE_CHECKING:
    from distill_bench.method import Method


def evaluated_updates(config: RunConfig) -> list[int]:
    """The student updates at which a run's student is kept and scored; the last is the end of the run."""
    n = config.evaluations
    return sorted({-(-config.student_updates * i // n) for i in range(1, n + 1)})


def load_run(run_dir: Path) -> RunConfig:
    """The resolved config of a run folder."""
    path = run_dir / "run.yaml"
    if not path.is_file():
        raise ConfigError(
            f"no run at {run_dir}: it has no run.yaml (folders of runs lie under runs/)"
        )
    return validate(RunConfig, load_yaml(path), str(path))


def resolve(data: Mapping[str, Any]) -> RunConfig:
    """A run with every default written out: those of the schema, of the method, and the teacher's content hash."""
    method = data.get("method")
    if method is None:
        raise ConfigError(
            "method is missing: name one, for instance `method: NAME` (see `distill-bench list`)"
        )
    fields = {"name": method} if not isinstance(method, dict) else method
    if not isinstance(fields.get("name"), str):
        raise ConfigError(f"method.name is {fields.get('name')!r}: it must name a method")
    try:
        method_class = find_method(fields["name"])
        teacher = find_teacher(str(data.get("teacher", "mini-wan")))
        folder = teacher.folder
        fps = teacher.fps
    except (RegistryError, ValueError) as error:
        raise ConfigError(str(error)) from error
    data = _with_preset(method_class, dict(data) | {"method": fields})
    fields = data["method"]
    instance = build_method(method_class, {k: v for k, v in fields.items() if k != "name"})
    data["method"] = {"name": fields["name"]} | dataclasses.asdict(instance)
    data["method_version"], data["teacher_hash"] = method_class.version, content_hash(folder)
    if fps is not None and isinstance(data.get("protocol", {}), dict):
        data["protocol"] = {"fps": fps} | data.get("protocol", {})
    student = _student(data)
    data["student_hash"] = "" if student is None else content_hash(student / "transformer")
    data["prompts_hash"] = (
        "" if data.get("prompts") is None else hash_of_prompts(teacher, Path(str(data["prompts"])))
    )
    data["data_hash"] = "" if data.get("data") is None else clips_hash(Path(data["data"]))
    if not method_class.has_fake_score or data.get("fake_score") == "exact":
        data["fake_score_updates"] = None
    config = validate(RunConfig, data, "run")
    if (
        config.fake_score_updates is None
        and method_class.has_fake_score
        and config.fake_score == "trained"
    ):
        raise ConfigError(
            "fake_score_updates is null: give a number, or `fake_score: exact` where the teacher offers it"
        )
    if config.fake_score_updates is None and len(instance.modules(8)):
        why = "has modules of its own, which are trained in the fake score's updates, and the run has none"
        raise ConfigError(
            f"fake_score {config.fake_score!r}: {fields['name']} {why}; `fake_score: trained`"
        )
    if config.reuse_rollout == "graph" and not method_class.shares_graph:
        raise ConfigError(
            f"reuse_rollout 'graph': {fields['name']} needs a forward of its own for the fake score; true or false"
        )
    for package in sorted(instance.packages):
        if importlib.util.find_spec(package) is None:
            raise MissingPackage(
                f"method {config.method} needs the package {package!r}: pip install {package}"
            )
    if (
        config.fake_score == "exact"
        and method_class.has_fake_score
        and not teacher.has_exact_fake_score
    ):
        raise ConfigError(
            f"fake_score 'exact': teacher {config.teacher!r} has none in closed form; `teacher: gaussian` has"
        )
    check_named(config)
    try:
        teacher.check_parts(student)
        why = teacher.unfit(config.frames, config.height, config.width, student)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if why is not None:
        raise ConfigError(why)
    if student is not None and len(instance.modules(8)) and _width(folder) != _width(student):
        raise ConfigError(
            f"student {config.student}: {fields['name']} has heads on features of width {_width(folder)}, the teacher's; the "
            f"student's are of {_width(student)}"
        )
    if config.prompts is None and not is_outline(folder):
        check_prompts(config.teacher, folder / "prompts.txt")
    if config.sigma_min >= config.sigma_max:
        raise ConfigError(
            f"sigma_min {config.sigma_min} must be below sigma_max {config.sigma_max}"
        )
    if config.batch_size % config.accumulation:
        raise ConfigError(
            f"batch_size {config.batch_size} must be a multiple of accumulation {config.accumulation}"
        )
    check_held(config, teacher, method_class)
    if (
        config.fake_score_updates is None
    ):  # what says how a fake score is trained is no part of a run that trains none
        kind = config.fake_score if method_class.has_fake_score else "trained"
        config = config.model_copy(update={"fake_score": kind, "reuse_rollout": False})
    return config


def _student(data: Mapping[str, Any]) -> Path | None:
    """The folder that a run's student begins from, where it is not the teacher's."""
    try:
        return None if data.get("student") is None else find_teacher(str(data["student"])).folder
    except ValueError as error:
        raise ConfigError(f"student: {error}") from error


def _width(folder: Path) -> int:
    config = read_config(folder / "transformer")
    return config["num_attention_heads"] * config["attention_head_dim"]


def _with_preset(method_class: "type[Method]", data: dict[str, Any]) -> dict[str, Any]:
    """The run with the preset of its method written out, under everything that is stated in the run itself."""
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
    written = merge({"method": {"name": fields["name"]}}, preset.overrides)
    return written | data | {"method": written["method"] | fields}


def method_of(config: RunConfig) -> "Method":
    """The method of a run, with its hyper-parameters."""
    fields = dict(config.method)
    return build_method(find_method(fields.pop("name")), fields)


def build_method(method_class: "type[Method]", fields: dict[str, Any]) -> "Method":
    known = [f.name for f in dataclasses.fields(method_class)]
    for key in fields:
        if key not in known:
            raise ConfigError(
                f"method.{key}: {method_class.__name__} has no such field{hint(key, known)}"
            )
        try:
            json.dumps(fields[key], allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"method.{key} = {fields[key]!r}: {error}") from error
    try:  # as `validate` does: "0.2" and true are no numbers, 8.0 is no integer
        return TypeAdapter(method_class).validate_json(json.dumps(fields), strict=True)
    except ValidationError as error:
        raise ConfigError(one_line(error, "method")) from error
