"""Reference of all YAML keys as Markdown, from the schema: `distill-bench keys`."""

import argparse
import json
from collections.abc import Iterable
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from distill_bench.config.analysis.contrasts import ContrastConfig
from distill_bench.config.cluster import ClusterConfig
from distill_bench.config.rows.row import ReleasedRow
from distill_bench.config.rows.sampling import SamplingConfig
from distill_bench.config.schema import AdapterConfig, ProtocolConfig, RunConfig
from distill_bench.config.sweep_file import PlateauConfig, SweepConfig

SECTIONS = (
    ("A sweep file", "", SweepConfig),
    ("An entry of `sampling` of a sweep file", "sampling.", SamplingConfig),
    ("`contrasts` of a sweep file: name, and then", "", ContrastConfig),
    ("An entry of `rows` of a sweep file", "rows.", ReleasedRow),
    ("`plateau` of a sweep file", "plateau.", PlateauConfig),
    ("A run: `base`, `grid`, `zip`, `include`, `--set`", "", RunConfig),
    ("`protocol` of a run", "protocol.", ProtocolConfig),
    ("`adapter` of a run", "adapter.", AdapterConfig),
    ("`cluster` of a sweep file, and profiles", "", ClusterConfig),
)
BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def reference() -> str:
    """One Markdown table per section: key, type and range, default, meaning."""
    return "\n\n".join(
        f"### {title}\n\n{_table(prefix, model)}" for title, prefix, model in SECTIONS
    )


def type_text(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """A type as users read it: `float >= 0, < 1`, `text`, `a | b | null`."""
    if get_origin(annotation) is Annotated:
        annotation, *nested = get_args(annotation)
        metadata = [*(m for item in nested for m in getattr(item, "metadata", ())), *metadata]
    bounds = [
        f"{sign} {getattr(bound, name)}"
        for bound in metadata
        for name, sign in BOUNDS.items()
        if hasattr(bound, name)
    ]
    if get_origin(annotation) in (Union, UnionType):
        # bounds of an optional number belong to the number
        parts = [
            type_text(kind, metadata if kind in (int, float) else ())
            for kind in get_args(annotation)
        ]
        return " | ".join(parts)
    return f"{_plain_type(annotation)} {', '.join(bounds)}".strip()


def _plain_type(annotation: Any) -> str:
    if annotation is NoneType:
        return "null"
    if annotation is Any:
        return "anything"
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if get_origin(annotation) in (list, tuple):
        return f"list of {type_text(get_args(annotation)[0])}"
    if get_origin(annotation) is dict or (
        isinstance(annotation, type) and issubclass(annotation, BaseModel)
    ):
        return "mapping"
    if annotation is str:
        return "text"
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _table(prefix: str, model: type[BaseModel]) -> str:
    lines = ["| key | type and range | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        cells = [
            f"`{prefix}{name}`",
            type_text(field.annotation, field.metadata),
            _default(field),
            _meaning(name, model),
        ]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if isinstance(field.default, BaseModel):
        return "see below"
    return f"`{json.dumps(field.default)}`"


def _meaning(name: str, model: type[BaseModel]) -> str:
    """Description of a key, and how it enters a run's id."""
    field = model.model_fields[name]
    text = field.description.replace("\n", " ").removesuffix(".")
    if (field.json_schema_extra or {}).get("in_id", True):
        return text
    if f"{name}_hash" in model.model_fields:
        return f"{text} (in the run id by content)"
    return f"{text} (not in the run id)"


def main(argv: list[str] | None = None) -> int:
    """Command line: print the reference."""
    argparse.ArgumentParser(
        prog="distill-bench keys", description="print the reference of all YAML keys as Markdown"
    ).parse_args(argv)
    print(reference())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
