"""The console script `distill-bench`, and commands for authors of methods and evaluators."""

from distill_bench.cli.main import COMMANDS, main

__all__ = ["COMMANDS", "main"]
