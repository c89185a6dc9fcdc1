"""Strict models for YAML, and one-line validation errors."""

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distill_bench.config.errors import ConfigError, hint

NOT_UNICODE = "not valid Unicode; if it has letters beyond the locale's, set PYTHONUTF8=1"
# last part of the place of a problem with one of the types that a key allows
ALTERNATIVE = r"bool|int|float|constrained-float|str|literal\[.*\]|dict\[.*\]"
Count = Annotated[int, Field(ge=1)]


class StrictModel(BaseModel):
    """Frozen; refuses unknown keys, infinities, and "5" or 5.0 for an integer."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,  # the text below a field is its description
    )


def validate(model: type[BaseModel], data: Any, where: str) -> Any:
    """Validate data of a YAML file; returns an instance of the model.

    Args:
        where: the file, or the part of it, that messages name.

    Raises:
        ConfigError: for the first invalid key.
    """
    try:
        # JSON mode accepts lists for tuples, and stays strict otherwise
        return model.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise ConfigError(one_line(error, where, model)) from error
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error


def check_arguments(options: Mapping[str, Any]) -> None:
    """Check that the values of a command line's options can be written to files, which are UTF-8.

    Raises:
        ConfigError: for an argument with bytes that the locale cannot decode.
    """
    for value in options.values():
        for argument in map(str, value if isinstance(value, list) else [value]):
            try:
                argument.encode()
            except UnicodeEncodeError as error:
                raise ConfigError(f"{argument!r} is {NOT_UNICODE}") from error


def one_line(error: ValidationError, where: str, model: type[BaseModel] | None = None) -> str:
    """The first problem of a validation error: place, key, value and what is allowed."""
    first = error.errors()[0]
    if "surrogate" in first["msg"]:  # of all values as JSON, so without a place
        return f"{where}: a name, path or text is {NOT_UNICODE}"
    path = first["loc"] or ("",)
    if first["type"] == "extra_forbidden" and model is not None:
        known = list(_model_at(model, path[:-1]).model_fields)
        return f"{where}: unknown key {_dotted(path)!r}{hint(str(path[-1]), known)}"
    messages = [first["msg"]]
    if re.fullmatch(ALTERNATIVE, str(path[-1])):
        # the key allows several types, and pydantic reports a problem with each: join them
        path = path[:-1]
        messages = [e["msg"] for e in error.errors() if e["loc"][:-1] == path]
    alternatives = [message.removeprefix("Input should be ") for message in messages[1:]]
    problem = " or ".join([messages[0], *alternatives])
    problem = problem.removeprefix("Value error, ").replace("a valid boolean", "true or false")
    problem = problem.replace("a valid dictionary", "a mapping").replace("an object", "a mapping")
    if not _dotted(path):  # a check of several keys
        return f"{where}: {problem}"
    of_several_keys = first["type"] == "value_error" and isinstance(first["input"], dict)
    given = "" if first["type"] == "missing" or of_several_keys else f" = {first['input']!r}"
    return f"{where}: {_dotted(path)}{given}: {problem}"


def _dotted(path: tuple[int | str, ...]) -> str:
    return ".".join(map(str, path))


def _model_at(model: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel]:
    """The model nested at a path of keys; entries of a mapping or a list have a name or a place."""
    parts = iter(path)
    for part in parts:
        annotation = model.model_fields[part].annotation
        if get_origin(annotation) in (dict, list):
            next(parts, None)
        candidates = (annotation, *get_args(annotation))
        model = next(kind for kind in candidates if hasattr(kind, "model_fields"))
    return model
