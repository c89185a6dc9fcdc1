"""TODO: evaluate.__main__."""

import argparse
from pathlib import Path
from typing import Any

import torch
import yaml

from distill_bench.evaluate.score import NEEDS, REFERENCES, evaluate
from distill_bench.networks.ranks import group_ranks, ranks
from distill_bench.registry import evaluators as all_evaluators


def main(argv: list[str] | None = None) -> int:
    """Command line: score one folder of clips."""
    parser = argparse.ArgumentParser(
        prog="distill_bench.evaluate", description=evaluate.__doc__.splitlines()[0]
    )
    parser.add_argument(
        "folder",
        type=Path,
        help="a folder of clips: clips.npy, or mp4, gif, webp, npy files and manifest.jsonl",
    )
    parser.add_argument(
        "--reference",
        action="append",
        default=[],
        metavar="[KIND=]FOLDER",
        help="teacher=... (also without KIND=), data=...",
    )
    parser.add_argument(
        "--evaluators", help="names with commas between; default: every one that applies"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="EVALUATOR.FIELD=VALUE",
        help="a setting of an evaluator",
    )
    parser.add_argument(
        "--protocol",
        help="protocol of the row; default: a digest of prompts, counts, sizes and references",
    )
    parser.add_argument(
        "--out", type=Path, help="file of the lines; default: metrics.jsonl in the folder"
    )
    options = parser.parse_args(argv)
    if ranks().world == 1:
        return _command(parser, options)
    torch.distributed.init_process_group("gloo")  # as torchrun starts it
    try:
        return _command(parser, options)
    finally:
        torch.distributed.destroy_process_group()


def _command(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """What the command line asks for, on one of its ranks."""
    here = group_ranks()
    names = (
        None
        if options.evaluators is None
        else [n.strip() for n in options.evaluators.split(",") if n.strip()]
    )
    try:
        if names == []:
            raise ValueError(f"--evaluators names none; known: {', '.join(all_evaluators())}")
        references = _references(options.reference)
        settings = _settings(options.set)
        if unknown := [key for key in settings if key not in (names or all_evaluators())]:
            raise ValueError(
                f"--set names {unknown[0]!r}, which is not among the evaluators: {', '.join(names or all_evaluators())}"
            )
        lines = evaluate(options.folder, references, names, options.protocol, options.out, settings)
        if mute := set(names or ()) - {line["metric"] for line in lines}:
            raise ValueError(f"{min(mute)} {NEEDS}")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted; what is scored is kept\n")
    except (ValueError, OSError) as error:
        who = (
            parser.prog if here.first else f"{parser.prog}, rank {here.rank}"
        )  # it may be that rank's alone
        parser.exit(2, f"{who}: {error}\n")
    if not here.first:
        return 0
    for line in lines:
        sd = "" if line["sd"] is None else f" (sd {line['sd']:.3g})"
        unit = f" {line['unit']}" if line["unit"] else ""
        extractor = f" [{line['extractor']}]" if line["extractor"] else ""
        print(
            f"{line['column']:22} {line['value']:.4g}{sd}{unit}  {line['title']}, {line['n']} clips{extractor}"
        )
    for warning in dict.fromkeys(
        f"{line['column']}: {warning}" for line in lines for warning in line["warnings"]
    ):
        print(f"warning: {warning}")
    return 0


def _references(given: list[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for text in given:
        before, equals, after = text.partition("=")
        key, path = (before, after) if equals else ("teacher", text)
        if "/" in key:  # of a path that has a = in it
            key, path = "teacher", text
        if key not in REFERENCES:
            raise ValueError(f"--reference {text}: no kind {key!r}; known: {', '.join(REFERENCES)}")
        if key in found:
            raise ValueError(f"--reference gives {key} twice: {found[key]} and {path}")
        found[key] = Path(path)
    return found


def _settings(given: list[str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for text in given:
        where, equals, value = text.partition("=")
        name, dot, field = where.rpartition(".")
        if not (equals and dot and name and field):
            raise ValueError(f"--set takes EVALUATOR.FIELD=VALUE; found {text!r}")
        try:
            found.setdefault(name, {})[field] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {text}: {value!r} is no YAML value") from error
    return found


if __name__ == "__main__":
    raise SystemExit(main())
