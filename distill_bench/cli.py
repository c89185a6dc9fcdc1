"""The console script `distill-bench COMMAND ...`: each command is a module with a `main` of its own."""

import dataclasses
import importlib
import sys
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from distill_bench import __version__

COMMANDS = {  # name: (module with its `main`, what it does)
    "sweep": ("sweep.__main__", "run a sweep file to its tables and report"),
    "download": ("teachers.hub", "download teachers from the Hugging Face hub"),
    "embed": ("networks.embed", "encode prompt files once with a teacher's text encoder"),
    "job": ("sweep.job", "do one run of a sweep, or prepare what runs share"),
    "train": ("train.__main__", "train one run folder"),
    "sample": ("sample.__main__", "draw the clips of a trained run"),
    "evaluate": ("evaluate.__main__", "score a folder of clips"),
    "report": ("report.__main__", "tables, figures and page of a sweep"),
    "plot": ("report.figures.command", "figures of a sweep's results"),
    "compare": ("report.compare", "differences of two runs' configs and scores"),
    "verify": ("report.verify", "recompute the tables of a results folder"),
    "export": ("export.__main__", "write a run's student as a diffusers pipeline folder"),
    "cost": ("plan.command", "network passes of a sweep by role, before anything runs"),
    "pretrain": ("pretrain.__main__", "train the embedded teacher and the evaluators' networks"),
    "keys": ("config.reference", "reference of every YAML key as Markdown"),
    "gaussian": ("domain.gaussian_teacher", "write another Gaussian teacher"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(f"distill-bench {__version__}\n\nusage: distill-bench COMMAND [--help]\n")
        for command, (_, about) in COMMANDS.items():
            print(f"  {command:10} {about}")
        print(f"  {'list':10} methods and evaluators, with their fields")
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
    return importlib.import_module(f"distill_bench.{COMMANDS[name][0]}").main(rest)


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
