"""Command line: `distill-bench evaluate FOLDER`, the same as `python -m distill_bench.evaluate`."""

import argparse
from pathlib import Path
from typing import Any

import torch

# Extractors import it, too. If a process group exists by then, default arguments of its functions
# keep the group, whose threads outlive `destroy_process_group` and may abort the process at exit.
import torch.distributed.nn

from distill_bench.config.errors import ConfigError
from distill_bench.config.yaml_files import parse_yaml
from distill_bench.evaluate.score import NEEDS, evaluate
from distill_bench.networks.ranks import group_ranks, ranks, set_threads
from distill_bench.registry import evaluators as all_evaluators
from distill_bench.registry import usual_evaluators
from distill_bench.sample.reference_kinds import COMPARED
from distill_bench.store.files import user_text

DESCRIPTION = """\
Score a folder of clips and write one line per score to its metrics.jsonl.

The folder holds videos (mp4, avi, mkv, ...), gif, webp or npy files, one per clip, and optionally
manifest.jsonl with one line per clip:

  {"file": "a.mp4", "prompt": "a red circle moving left slowly", "seed": 0, "fps": 16}

seed and fps are optional. Without a manifest the clips have no captions, and evaluators that need
captions are skipped. Clips and references must agree in frame count, size and frame rate."""

EXAMPLES = """\
examples:
  distill-bench evaluate clips/                             every evaluator that applies
  distill-bench evaluate clips/ --reference teacher_clips/  also distances and ratios to the teacher
  distill-bench evaluate a/ --reference teacher=b/ --reference data=c/ --evaluators fvd,motion
  distill-bench evaluate a/ --set fvd.extractor=i3d-k400-logits-400:/path/i3d_torchscript.pt
  torchrun --nproc_per_node 4 -m distill_bench.evaluate a/  ranks share the forward passes

`distill-bench list` shows evaluators and settings; eval/README.md explains the columns."""


def main(argv: list[str] | None = None) -> int:
    """Score one folder of clips; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="distill-bench evaluate",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="folder of clips")
    parser.add_argument(
        "--reference",
        action="append",
        default=[],
        metavar="[KIND=]FOLDER",
        help=f"reference clips; KIND is one of {', '.join(COMPARED)} (default: teacher); may be "
        "given once per kind",
    )
    parser.add_argument(
        "--evaluators",
        metavar="NAME,NAME",
        help="default: every evaluator that applies to the clips",
    )
    parser.add_argument(
        "--set",
        type=user_text,
        action="append",
        default=[],
        metavar="EVALUATOR.FIELD=VALUE",
        help="a setting of an evaluator; may be repeated",
    )
    parser.add_argument(
        "--protocol",
        metavar="HASH",
        help="protocol to record with the scores; default: a digest of prompts, seeds, counts, "
        "size, rate and references",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: metrics.jsonl in the folder"
    )
    parser.add_argument(
        "--device",
        help="device of the networks: cpu, cuda or cuda:N; default: the GPU of this process, or "
        "the processor without a GPU",
    )
    options = parser.parse_args(argv)
    if ranks().world == 1:
        return _score(parser, options)
    torch.distributed.init_process_group("gloo")  # launched by torchrun
    try:
        return _score(parser, options)
    finally:
        torch.distributed.destroy_process_group()


def _score(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Score the folder on this rank; rank 0 prints the scores."""
    here = group_ranks()
    set_threads(None)
    try:
        names = _names(options.evaluators)
        settings = _settings(options.set, names or usual_evaluators())
        references = references_of(options.reference)
        lines = evaluate(
            options.folder,
            references,
            names,
            options.protocol,
            options.out,
            settings,
            options.device,
        )
        without_score = set(names or ()) - {line["metric"] for line in lines}
        if without_score:
            raise ValueError(f"{min(without_score)} {NEEDS}")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted; scores so far are kept\n")
    except (ValueError, OSError) as error:
        rank = "" if here.first else f", rank {here.rank}"
        parser.exit(2, f"{parser.prog}{rank}: {error}\n")
    if here.first:
        _print_scores(lines)
    return 0


def _names(text: str | None) -> list[str] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError(
            f"--evaluators {text!r} names no evaluator; known: {', '.join(all_evaluators())}"
        )
    return names


def references_of(arguments: list[str]) -> dict[str, Path]:
    folders: dict[str, Path] = {}
    for text in arguments:
        kind, equals, path = text.partition("=")
        if not equals or "/" in kind:  # no kind, or the = belongs to the path
            kind, path = "teacher", text
        if kind not in COMPARED:
            raise ValueError(f"--reference {text}: no kind {kind!r}; known: {', '.join(COMPARED)}")
        if kind in folders:
            raise ValueError(f"--reference gives {kind} twice: {folders[kind]} and {path}")
        folders[kind] = Path(path)
    return folders


def _settings(arguments: list[str], names: list[str]) -> dict[str, dict[str, Any]]:
    settings: dict[str, dict[str, Any]] = {}
    for text in arguments:
        key, equals, value = text.partition("=")
        name, dot, field = key.rpartition(".")
        if not (equals and dot and name and field):
            raise ValueError(f"--set takes EVALUATOR.FIELD=VALUE; found {text!r}")
        if name not in names:
            raise ValueError(
                f"--set {text}: {name!r} is not among the evaluators: {', '.join(names)}"
            )
        try:
            settings.setdefault(name, {})[field] = parse_yaml(value)
        except ConfigError as error:
            raise ValueError(f"--set {text}: {value!r} is not a YAML value") from error
    return settings


def _print_scores(lines: list[dict]) -> None:
    for line in lines:
        sd = "" if line["sd"] is None else f" (sd {line['sd']:.3g})"
        unit = f" {line['unit']}" if line["unit"] else ""
        extractor = f" [{line['extractor']}]" if line["extractor"] else ""
        value = f"{line['value']:.4g}{sd}{unit}"
        print(f"{line['column']:22} {value}  {line['title']}, {line['n']} clips{extractor}")
    warnings = [f"{line['column']}: {warning}" for line in lines for warning in line["warnings"]]
    for warning in dict.fromkeys(warnings):
        print(f"warning: {warning}")


if __name__ == "__main__":
    raise SystemExit(main())
