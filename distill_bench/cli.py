"""The console script `distill-bench COMMAND ...`: each command is a module with a `main` of its own."""

import dataclasses
import importlib
import sys
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from distill_bench import __version__

COMMANDS = {
    "sweep": "run a sweep file to its tables and report",
    "embed": "encode prompt files once with a teacher's text encoder",
    "train": "train one run folder",
    "sample": "draw the clips of a trained run",
    "evaluate": "score a folder of clips",
    "report": "tables, figures and page of a sweep",
    "plot": "figures of a sweep's results",
    "compare": "differences of two runs' configs and scores",
    "verify": "recompute the tables of a results folder",
    "export": "write a run's student as a diffusers pipeline folder",
    "cost": "network passes of a sweep by role, before anything runs",
    "pretrain": "train the embedded teacher and the evaluators' networks",
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(f"distill-bench {__version__}\n\nusage: distill-bench COMMAND [--help]\n")
        for command, about in {
            **COMMANDS,
            "list": "methods and evaluators, with their fields",
        }.items():
            print(f"  {command:10} {about}")
        return 0
    if name == "--version":
        print(__version__)
        return 0
    if name == "list":
        return show_plugins()
    if name not in COMMANDS:
        print(
            f"distill-bench: no command called {name!r}; known: {', '.join([*COMMANDS, 'list'])}",
            file=sys.stderr,
        )
        return 2
    return importlib.import_module(f"distill_bench.{name}").main(rest)


def show_plugins() -> int:
    """Print every installed method and evaluator: purpose, paper, fields with their defaults."""
    from rich.console import Console
    from rich.markup import escape

    from distill_bench.registry import RegistryError, evaluators, methods

    try:
        kinds = {"methods": methods(), "evaluators": evaluators()}
    except RegistryError as error:
        print(f"distill-bench list: {error}", file=sys.stderr)
        return 2
    console = Console(soft_wrap=True, highlight=False)
    for kind, plugins in kinds.items():
        console.print(f"[bold]{kind}[/bold]")
        for name, plugin in plugins.items():
            purpose = (plugin.__doc__ or "").strip().splitlines()[0]
            console.print(
                f"  [bold cyan]{name}[/bold cyan]  {escape(purpose)}  [dim]{escape(plugin.paper)}[/dim]"
            )
            for field in dataclasses.fields(plugin):
                default = field.default
                if field.default_factory is not dataclasses.MISSING:
                    default = field.default_factory()
                console.print(
                    f"      {field.name}: {escape(_type(field.type))} = {escape(repr(default))}"
                )
    return 0


def _type(kind: Any) -> str:
    """A field's type as one reads it: `float | None`, and of `Annotated` ones the range, `float > 0, <= 1`."""
    if get_origin(kind) is Annotated:
        kind, *about = get_args(kind)
        limits = [limit for each in about for limit in getattr(each, "metadata", ())]
        signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
        said = [
            f"{sign} {getattr(limit, key)}"
            for limit in limits
            for key, sign in signs.items()
            if hasattr(limit, key)
        ]
        return f"{_type(kind)} {', '.join(said)}".strip()
    if get_origin(kind) in (Union, UnionType):
        return " | ".join(map(_type, get_args(kind)))
    if kind is NoneType:
        return "None"
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")


if __name__ == "__main__":
    raise SystemExit(main())
