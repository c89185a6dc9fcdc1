"""The console script `distill-bench COMMAND ...`; each command is the `main` of a module."""

import dataclasses
import importlib
import json
import sys
from collections.abc import Iterable

from distill_bench import __version__

# group of --help -> command -> (module with its `main`, what it does)
GROUPS = {
    "a sweep": {
        "sweep": ("sweep.__main__", "run a sweep file from its grid to its tables"),
        "cost": ("plan.command", "predict network passes and memory of a sweep's runs"),
        "keys": ("config.reference", "print every YAML key with its meaning, as Markdown"),
        "job": ("sweep.job", "do one run of a sweep, or prepare what runs share"),
    },
    "one run": {
        "train": ("train.__main__", "train the run in a folder"),
        "sample": ("sample.__main__", "draw the clips of a trained run"),
        "evaluate": ("evaluate.__main__", "score a folder of clips"),
        "export": ("export.__main__", "write a run's student as a diffusers pipeline folder"),
    },
    "results": {
        "report": ("report.__main__", "write tables, figures and page of a sweep"),
        "plot": ("report.figures.command", "draw a column of the results against another"),
        "compare": ("report.compare", "compare configs and scores of two runs"),
        "verify": ("report.verify", "recompute the tables of a results folder"),
    },
    "teachers": {
        "download": ("teachers.hub", "download teachers from the Hugging Face hub"),
        "embed": ("networks.embed", "encode prompts once with a teacher's text encoder"),
        "gaussian": ("domain.gaussian_teacher", "write another Gaussian teacher"),
        "pretrain": ("pretrain.__main__", "train the shipped teacher and the evaluators' networks"),
    },
}
COMMANDS = {name: entry for group in GROUPS.values() for name, entry in group.items()}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        print("\n".join(_help_lines()))
        return 0
    if name == "--version":
        print(__version__)
        return 0
    if name == "list":
        return list_plugins()
    if name not in COMMANDS:
        known = ", ".join([*COMMANDS, "list"])
        print(f"distill-bench: no command called {name!r}; known: {known}", file=sys.stderr)
        return 2
    return importlib.import_module(f"distill_bench.{COMMANDS[name][0]}").main(rest)


def _help_lines() -> Iterable[str]:
    yield f"distill-bench {__version__}: compare methods that distil video diffusion models"
    yield ""
    yield "usage: distill-bench COMMAND [--help]"
    for group, commands in GROUPS.items():
        yield f"\n{group}:"
        for name, (_, summary) in commands.items():
            yield f"  {name:10} {summary}"
    yield "\nplugins:"
    yield f"  {'list':10} methods and evaluators, with their fields"


def list_plugins() -> int:
    """Print every installed method and evaluator: purpose, paper, fields with their defaults."""
    # takes seconds, and other commands do not need it
    from rich.console import Console
    from rich.markup import escape

    # import torch, which takes seconds
    from distill_bench.config.reference import type_text
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
            purpose = escape((plugin.__doc__ or "").strip().splitlines()[0])
            paper = escape(plugin.paper)
            console.print(f"  [bold cyan]{name}[/bold cyan]  {purpose}  [dim]{paper}[/dim]")
            for field in dataclasses.fields(plugin):
                text = f"{field.name}: {type_text(field.type)} = {_default(field)}"
                console.print(f"      {escape(text)}")
    return 0


def _default(field: dataclasses.Field) -> str:
    """A field's default as YAML."""
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    return json.dumps(default, default=str)


if __name__ == "__main__":
    raise SystemExit(main())
