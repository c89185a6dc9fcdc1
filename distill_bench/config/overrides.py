"""Dotted keys of a run, such as `protocol.clips`: parse, apply and read them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_bench.config.errors import ConfigError
from distill_bench.config.identity import canonical, short_name
from distill_bench.config.schema import RunConfig
from distill_bench.config.yaml_files import parse_yaml
from distill_bench.store.nested import flat
from distill_bench.teachers.prompts import FILE_PREFIX


def parse_override(text: str) -> tuple[str, Any]:
    """Key and value of `key=value` from a command line; the value is YAML.

    Raises:
        ConfigError: if there is no key or no `=`, or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {text!r}: write key=value")
    return key.strip(), parse_yaml(value)


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


def run_value(config: RunConfig, key: str, missing: Any = None) -> Any:
    """Value of a dotted key; `missing` if the run lacks the key. `method` is the method's name."""
    return value_at(config.model_dump(mode="json"), key, missing)


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


def same_value(first: Any, second: Any) -> bool:
    """Return True for equal values of keys: 1 and 1.0 are equal; true and 1, 1 and "1" are not."""
    return json.dumps(canonical(first), sort_keys=True) == json.dumps(
        canonical(second), sort_keys=True
    )


def matches(first: Any, second: Any) -> bool:
    """Return True for equal values of keys, and for two paths of one file.

    Resolved runs have absolute paths; conditions and baselines may have relative ones.
    """
    if same_value(first, second):
        return True
    if not (isinstance(first, str) and isinstance(second, str) and first and second):
        return False
    return absolute(first) == absolute(second)


def absolute(path: str) -> str:
    """A path from the root folder; a prefix `file:` is kept."""
    prefix = FILE_PREFIX if path.startswith(FILE_PREFIX) else ""
    return prefix + str(Path(path.removeprefix(prefix)).absolute())


def has_values(data: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Return True if a run's data has these values of dotted keys.

    Null equals null, and a key that the run lacks. A method may be given by its short name.
    """
    for key, wish in flat(wanted).items():
        values = [value_at(data, key)]
        if key in ("method", "method.name"):
            values.append(short_name(str(values[0])))
        if not any(matches(value, wish) for value in values):
            return False
    return True
