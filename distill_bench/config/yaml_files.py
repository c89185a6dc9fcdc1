"""Reads and writes YAML 1.2: `no` is text, `2e-6` a number, and duplicate keys are refused."""

import contextlib
import io
import re
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter

from distill_bench.config.errors import ConfigError
from distill_bench.store.failures import first_line
from distill_bench.store.files import text_lines

# YAML 1.2 ends a line only with \n or \r, ruamel also with these; private characters hide them
HIDDEN = {0x85: 0xF0085, 0x2028: 0xF2028, 0x2029: 0xF2029}
BRACES = "put text with braces, such as {{ x }}, in quotes"
SHOWN = {hidden: shown for shown, hidden in HIDDEN.items()}


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
        ConfigError: if it is not YAML, or has a list or mapping as a key, or another type.
    """
    try:
        return _plain(_yaml().load(text.translate(HIDDEN)))
    except YAMLError as error:
        raise ConfigError(_one_line(error, text)) from error
    except RecursionError as error:
        raise ConfigError("not YAML: nested too deeply") from error
    except ConfigError:
        raise
    except Exception as error:  # ruamel raises many kinds of error, e.g. for `!!int x`
        raise ConfigError(f"not YAML: {first_line(error)}") from error


def load_written(path: Path) -> Any:
    """Content of a file that `dump_yaml` wrote, e.g. run.yaml; the same as `load_yaml`.

    The runs of a sweep share most lines, and each distinct key with its lines is parsed once. A
    file that someone edited is parsed whole.

    Raises:
        ConfigError: if it cannot be read or is not YAML.
    """
    # errors of a file that is damaged or no mapping: `load_yaml` reports them
    with contextlib.suppress(OSError, ValueError, AttributeError):
        text = path.read_text(encoding="utf-8")
        # a key begins its line; the lines below it are indented, or begin with "- "
        entries = re.split(r"^(?=[^ -])", text, flags=re.MULTILINE)[1:]
        content = {k: v for entry in entries for k, v in deepcopy(_parsed_entry(entry)).items()}
        if dump_yaml(content) == text:
            return content
    return load_yaml(path)


@cache
def _parsed_entry(text: str) -> Any:
    return parse_yaml(text)


def _one_line(error: YAMLError, text: str) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f" in line {mark.line + 1}" if mark else ""
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
    if problem.startswith("but "):
        problem = f"{getattr(error, 'context', None) or 'unexpected'}, {problem}"
    if problem == "found unhashable key":
        problem = f"a key is a mapping; {BRACES}"
    elif mark and "{{" in "".join(text_lines(text)[mark.line : mark.line + 1]):
        problem = f"{first_line(problem)}; {BRACES}"
    return f"not YAML{where}: {first_line(problem)}"


def dump_yaml(data: Any) -> str:
    """Data as YAML that `parse_yaml` reads back unchanged, keys in their order."""
    if not isinstance(data, dict) or not data:
        return _dumped(data)
    return "".join([_written_entry(item) for item in data.items()])


def _written_entry(item: tuple[Any, Any]) -> str:
    """YAML of a mapping with one key and value; the runs of a sweep share most of theirs."""
    name = repr(item)  # unlike JSON, it tells 1 from "1" as a key
    text = _entries.get(name)
    if text is None:
        text = _entries[name] = _dumped(dict([item]))
    return text


_entries: dict[str, str] = {}  # `repr` of a key and its value -> their YAML


def _dumped(data: Any) -> str:
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


def _plain(content: Any) -> Any:
    """Content with its line separators back.

    Raises:
        ConfigError: for a key or value of a type that JSON does not have.
    """
    if isinstance(content, dict):
        for key in content:
            if not isinstance(key, str | int | float | None):
                raise ConfigError(f"a key must be text or a number, not {key!r}")
        return {_plain(key): _plain(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_plain(value) for value in content]
    if isinstance(content, str):
        return content.translate(SHOWN)
    if content is None or isinstance(content, bool | int | float):
        return content
    raise ConfigError(
        f"{content!r} is a {type(content).__name__}; write text, a number, true, false, null, "
        "a list or a mapping"
    )
