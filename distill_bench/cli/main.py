"""The console script `distill-bench COMMAND ...`; each command is the `main` of a module."""

import importlib
import sys
from collections.abc import Iterable

from distill_bench import __version__

# group of --help -> command -> (module with its `main`, what it does)
GROUPS = {
    "a sweep": {
        "sweep": ("sweep.__main__", "run a sweep file from its grid to its tables"),
        "cost": ("plan.command", "predict network passes and memory of a sweep's runs"),
        "power": ("report.tables.power", "print the seeds that declared contrasts need"),
        "keys": ("config.reference", "print every YAML key with its meaning, as Markdown"),
        "job": ("sweep.job", "do one run of a sweep, or prepare what runs share"),
    },
    "one run": {
        "train": ("train.__main__", "train the run in a folder"),
        "sample": ("sample.__main__", "draw the clips of a trained run"),
        "score": ("sweep.score_network", "sample and score a network by a sweep's protocol"),
        "evaluate": ("evaluate.__main__", "score a folder of clips"),
        "export": ("export.__main__", "write a run's student as a diffusers pipeline folder"),
    },
    "results": {
        "report": ("report.__main__", "write tables, figures and page of a sweep"),
        "plot": ("report.plot", "draw a column of the results against another"),
        "compare": ("report.compare", "compare configs and scores of two runs"),
        "verify": ("report.verify", "recompute the tables of a results folder"),
    },
    "methods and evaluators": {
        "list": ("cli.listing", "print all of them with their fields"),
        "check": ("testing.__main__", "run the conformance checks of a method or an evaluator"),
        "new-method": ("cli.new_method", "write a commented file of a method"),
        "new-evaluator": ("cli.new_evaluator", "write a commented file of an evaluator"),
        "cite": ("cli.cite", "print the BibTeX entries of methods and evaluators"),
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
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
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
            yield f"  {name:13} {summary}"
