"""Print every installed method and evaluator: purpose, paper, fields with their defaults."""

import argparse
import dataclasses
import json
import sys

from rich.console import Console
from rich.text import Text

from distill_bench.config.reference import type_text
from distill_bench.registry import RegistryError, evaluators, methods


def main(argv: list[str] | None = None) -> int:
    """Print the list; returns the exit code."""
    argparse.ArgumentParser(prog="distill-bench list", description=__doc__).parse_args(argv)
    try:
        kinds = {"methods": methods(), "evaluators": evaluators()}
    except RegistryError as error:
        print(f"distill-bench list: {error}", file=sys.stderr)
        return 2
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    for kind, plugins in kinds.items():
        console.print(kind, style="bold")
        for name, plugin in plugins.items():
            purpose = (plugin.__doc__ or "").strip().splitlines()[0]
            styled = (name, "bold cyan"), f"  {purpose}  ", (str(plugin.paper), "dim")
            console.print(Text.assemble("  ", *styled))
            for field in dataclasses.fields(plugin):
                text = f"{field.name}: {type_text(field.type)} = {_default(field)}"
                console.print(f"      {text}")
    return 0


def _default(field: dataclasses.Field) -> str:
    """A field's default as YAML."""
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    return json.dumps(default, default=str)


if __name__ == "__main__":
    raise SystemExit(main())
