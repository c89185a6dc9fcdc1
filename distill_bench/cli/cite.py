"""Print the BibTeX entries of the papers of methods and evaluators.

    distill-bench cite dmd2 sgmd fvd >> paper.bib

A paper that several of them name is printed once.
"""

import argparse
import sys

from distill_bench.evaluator import Citation
from distill_bench.registry import RegistryError, find_plugin


def main(argv: list[str] | None = None) -> int:
    """Print the entries; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="distill-bench cite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="+", help="a method or an evaluator")
    options = parser.parse_args(argv)
    entries: dict[str, str] = {}
    try:
        for name in options.name:
            kind, plugin = find_plugin(name)
            if isinstance(plugin.paper, Citation):
                entries[plugin.paper.arxiv] = plugin.paper.bibtex()
            else:
                reason = f"the {kind} {name} has no paper on arXiv; source: {plugin.paper}"
                print(f"{parser.prog}: {reason}", file=sys.stderr)
    except RegistryError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print("\n\n".join(entries.values()))
    return 0 if entries else 1


if __name__ == "__main__":
    raise SystemExit(main())
