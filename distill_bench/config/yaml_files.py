"""Reads and writes YAML 1.2: `no` is text, `2e-6` a number, and duplicate keys are refused."""

import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter

from distill_bench.config.errors import ConfigError


class _Constructor(SafeConstructor):
    """Keeps dates as text, because a sweep may be named after a date."""


class _Representer(SafeRepresenter):
    """Writes floats as 1.0e-06, which YAML 1.1 readers also parse as a number."""

    def represent_float(self, data: float) -> ScalarNode:
        node = super().represent_float(data)
        if "." not in node.value:
            node.value = node.value.replace("e", ".0e")
        return node


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)
_Representer.add_representer(float, _Representer.represent_float)


def load_yaml(path: Path) -> Any:
    """Content of a YAML file.

    Raises:
        ConfigError: if it cannot be read or is not YAML.
    """
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read {path}: {reason}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse_yaml(text: str) -> Any:
    """Content of a YAML text: dicts, lists, str, int, float, bool and None.

    Raises:
        ConfigError: if it is not YAML, or has a list or mapping as a key.
    """
    yaml = _yaml()
    try:
        content = yaml.load(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
        raise ConfigError(f"not YAML{where}: {problem}") from error
    except RecursionError as error:
        raise ConfigError("not YAML: nested too deeply") from error
    _check_keys(content)
    return content


def dump_yaml(data: Any) -> str:
    """Data as YAML that `parse_yaml` reads back unchanged, keys in their order."""
    stream = io.StringIO()
    _yaml().dump(data, stream)
    return stream.getvalue()


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.allow_unicode = False  # ASCII files read the same in every locale
    yaml.representer.sort_base_mapping_type_on_output = False
    yaml.width = 10_000  # never fold long strings
    return yaml


def _check_keys(content: Any) -> None:
    if isinstance(content, dict):
        for key, value in content.items():
            if isinstance(key, tuple | dict):
                raise ConfigError(f"a key must be text or a number, not {key!r}")
            _check_keys(value)
    elif isinstance(content, list):
        for value in content:
            _check_keys(value)
