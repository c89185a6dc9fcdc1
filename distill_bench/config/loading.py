"""TODO: config.loading."""

import re
from pathlib import Path
from typing import Any

import yaml

from distill_bench.config.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML with the numbers and booleans of YAML 1.2, and duplicate keys refused."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, regexp)
        for tag, regexp in pairs
        if tag.rsplit(":", 1)[1] not in {"bool", "int", "float", "timestamp"}
    ]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


for _tag, _pattern, _first in (
    ("bool", r"^(?:true|false)$", "tf"),
    ("int", r"^[-+]?[0-9]+$", "-+0123456789"),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    keys = [loader.construct_object(key) for key, _ in node.value]
    twice = [key for key in keys if keys.count(key) > 1]
    if twice:
        raise yaml.constructor.ConstructorError(
            None, None, f"key {twice[0]!r} stands twice", node.start_mark
        )
    return {
        key: loader.construct_object(value, deep=True)
        for key, (_, value) in zip(keys, node.value, strict=True)
    }


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(node.value))


def load_yaml(path: Path) -> Any:
    """The YAML of a file.

    Raises:
        ConfigError: if it cannot be read or is no YAML.
    """
    try:
        return parse_yaml(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or error}"
        ) from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse_yaml(text: str) -> Any:
    """The YAML in a string, as `load_yaml`."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a subclass of SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"not YAML{where}: {getattr(error, 'problem', None) or 'unreadable'}"
        ) from error
