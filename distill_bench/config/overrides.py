"""Dotted keys of a run, such as `protocol.clips`: parse, apply and read them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from distill_bench.config.errors import ConfigError, hint
from distill_bench.config.identity import canonical_text, short_name
from distill_bench.config.schema import (
    AdapterConfig,
    ProtocolConfig,
    RunConfig,
    is_scale_per_expert,
)
from distill_bench.config.yaml_files import parse_yaml
from distill_bench.store.nested import flat
from distill_bench.teachers.folder import EMBEDDED
from distill_bench.teachers.prompts import FILE_PREFIX

FILE_KEYS = {"teacher", "student", "prompts", "data", "negative_prompt", "network"}


def parse_override(text: str) -> tuple[str, Any]:
    """Key and value of `key=value` from a command line; the value is YAML.

    Raises:
        ConfigError: if there is no key or no `=`, or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {text!r}: write key=value")
    return key.strip(), parse_yaml(value)


def check_run_keys(keys: Iterable[str], where: str) -> None:
    """Check that dotted keys exist; fields of a method are checked when the run is resolved.

    Raises:
        ConfigError: for an unknown key.
    """
    nested = {"protocol": ProtocolConfig, "adapter": AdapterConfig}
    known = list(RunConfig.model_fields)
    known += [f"{parent}.{name}" for parent, model in nested.items() for name in model.model_fields]
    for key in keys:
        if key not in known and not key.startswith("method."):
            raise ConfigError(f"{where}: unknown key {key!r} in the grid{hint(key, known)}")


def apply_overrides(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a run's data with dotted keys set.

    `method: NAME` means `method.name: NAME`.

    Raises:
        ConfigError: if a dotted key leads through something that is not a mapping.
    """
    result = json.loads(json.dumps(base))
    for key, value in overrides.items():
        *parents, leaf = key.split(".")
        node = result
        for part in parents:
            if part == "method" and isinstance(node.get(part), str):
                node[part] = {"name": node[part]}
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{key}: {part} = {node!r}: expected a mapping of keys to values")
        if key == "method" and isinstance(value, str) and isinstance(node.get("method"), dict):
            node["method"]["name"] = value
        else:
            node[leaf] = value
    return result


def override_sweep(
    data: Mapping[str, Any], overrides: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """The contents of a sweep file with keys set in `base` and removed from every other cell.

    Anything malformed is left for validation to report.

    Args:
        overrides: dotted keys of a run; also `cluster.KEY`, `seeds` and `name`.
        path: of the sweep file, for messages.

    Raises:
        ConfigError: if `base` is not a mapping.
    """
    base = data.get("base") or {}
    if not isinstance(base, dict):
        raise ConfigError(f"{path}: base = {base!r}: expected a mapping of keys of a run to values")
    data = dict(data)
    for key, value in overrides.items():
        if key in ("seeds", "name"):
            data[key] = value
        elif key.startswith("cluster."):
            cluster = data.get("cluster") or {}
            cluster = {"profile": cluster} if isinstance(cluster, str) else cluster
            data["cluster"] = {**cluster, key.removeprefix("cluster."): value}
        else:
            base = apply_overrides(base, {key: value})
            for part in ("grid", "zip", "include"):
                if data.get(part):
                    data[part] = _with_override(data[part], key, value)
            stages = data.get("stages")
            if isinstance(stages, dict) and key != "init":  # stages do not start as others do
                data["stages"] = {n: _with_override(stages[n], key, value) for n in stages}
    return data | {"base": base}


def _with_override(cells: Any, key: str, value: Any) -> Any:
    """Grid, zip or include without a key that `base` sets; mappings above the key get its value."""
    if isinstance(cells, list):
        return [_with_override(cell, key, value) for cell in cells]
    if not isinstance(cells, dict):
        return cells
    result = {}
    for name, values in cells.items():
        if key.startswith(f"{name}."):
            inner = {key.removeprefix(f"{name}."): value}
            many = isinstance(values, list)  # in a grid
            below = [
                apply_overrides(v, inner) if isinstance(v, dict) else v
                for v in (values if many else [values])
            ]
            result[name] = below if many else below[0]
        elif not f"{name}.".startswith(f"{key}."):
            result[name] = values
    return result


def run_value(config: RunConfig, key: str, missing: Any = None) -> Any:
    """Value of a dotted key; `missing` if the run lacks the key. `method` is the method's name."""
    return value_at(config.model_dump(mode="json", include={key.partition(".")[0]}), key, missing)


def value_at(data: Mapping[str, Any], key: str, missing: Any = None) -> Any:
    """Value of a dotted key in a run's data; `missing` if there is none.

    `method` is the method's name.
    """
    value: Any = data
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return missing
        value = value[part]
    return value.get("name") if key == "method" and isinstance(value, Mapping) else value


def flat_keys(data: Mapping[str, Any]) -> dict[str, Any]:
    """A run's data by dotted keys; a guidance scale per expert is one value."""
    return flat(data, is_value=is_scale_per_expert)


def same_value(first: Any, second: Any) -> bool:
    """Return True for equal values of keys: 1 and 1.0 are equal; true and 1, 1 and "1" are not."""
    if isinstance(first, str) and isinstance(second, str):
        return first == second
    return canonical_text(first) == canonical_text(second)


def matches(first: Any, second: Any) -> bool:
    """Return True for equal values of keys, and for two paths of one file.

    Resolved runs have absolute paths; conditions and baselines may have relative ones.
    """
    if same_value(first, second):
        return True
    if not (isinstance(first, str) and isinstance(second, str) and first and second):
        return False
    return _last_part(first) == _last_part(second) and absolute(first) == absolute(second)


def _last_part(path: str) -> str:
    """Last part of a path; cheaper than `absolute`, for the many values that are no paths."""
    return path.removeprefix(FILE_PREFIX).rstrip("/.").rpartition("/")[2]


def absolute(path: str) -> str:
    """A path from the root folder; a prefix `file:` is kept."""
    prefix = FILE_PREFIX if path.startswith(FILE_PREFIX) else ""
    return prefix + str(Path(path.removeprefix(prefix)).absolute())


def beside(folder: Path, content: Any, key: str = "") -> Any:
    """Content of a YAML file in `folder`, with paths of files that only this folder has.

    A relative path that the current folder has stays as it is, and so does one that neither has.

    Args:
        key: the last part of the dotted key under which the content stands.
    """
    if isinstance(content, dict):
        return {k: beside(folder, v, str(k).rpartition(".")[2]) for k, v in content.items()}
    if isinstance(content, list):
        return [beside(folder, value, key) for value in content]
    if not isinstance(content, str) or key not in FILE_KEYS or content in EMBEDDED:
        return content
    prefix = FILE_PREFIX if content.startswith(FILE_PREFIX) else ""
    if key == "negative_prompt" and not prefix:  # a text
        return content
    path = folder / content.removeprefix(prefix)
    elsewhere = path.exists() and not Path(content.removeprefix(prefix)).exists()
    return f"{prefix}{path}" if elsewhere else content


def has_values(data: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Return True if a run's data has these values of dotted keys.

    Null equals null, and a key that the run lacks. A method may be given by its short name.
    """
    for key, wish in flat_keys(wanted).items():
        values = [value_at(data, key)]
        if key in ("method", "method.name"):
            values.append(short_name(str(values[0])))
        if not any(matches(value, wish) for value in values):
            return False
    return True
