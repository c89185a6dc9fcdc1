"""Command line: `distill-bench pretrain`, which trains the shipped networks."""

import argparse
import csv
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from distill_bench import ASSETS
from distill_bench.domain import shapes
from distill_bench.evaluate import encoders
from distill_bench.networks.ranks import set_threads
from distill_bench.pretrain.fit_autoencoder import (
    load_latents,
    train_autoencoder,
    training_attributes,
)
from distill_bench.pretrain.fit_encoders import train_encoders
from distill_bench.pretrain.fit_mixture import fit_mixture
from distill_bench.pretrain.fit_teacher import CheckpointError, train_teacher
from distill_bench.pretrain.quality import written_quality

COUNTS = ("measure", "clips", "autoencoder_steps", "steps", "batch", "samples", "every", "threads")
NEW_NOISE = 1001  # first seed of noise that no choice was made on


def main(argv: list[str] | None = None) -> int:
    """Train mini-wan, the mixture's network or the evaluators' networks; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="distill-bench pretrain",
        description="Train mini-wan, or with --mixture or --encoders another shipped network.",
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--encoders", action="store_true", help="train the evaluators' networks")
    kind.add_argument("--mixture", action="store_true", help="fit the mixture teacher's network")
    kind.add_argument(
        "--measure",
        type=int,
        metavar="SETS",
        help="train nothing: print, as CSV, the quality of the written teacher's samples from this "
        "many new sets of noise; minutes per set",
    )
    parser.add_argument("--out", type=Path, help="default: the assets of the package")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/pretrain"),
        help="folder of checkpoints, from which a rerun resumes",
    )
    parser.add_argument(
        "--clips",
        type=int,
        help="rendered training clips; default: 40000, or 4320 for the encoders",
    )
    parser.add_argument("--autoencoder-steps", type=int, default=3000)
    parser.add_argument(
        "--steps",
        type=int,
        help="default: 24000 for the teacher, 5000 for the mixture, 600 per encoder; a longer "
        "teacher goes on from the last checkpoint before the learning rate fell",
    )
    parser.add_argument(
        "--decay-steps", type=int, default=6000, help="last steps, with a falling learning rate"
    )
    parser.add_argument("--batch", type=int, help="default: 32, or 512 for the mixture")
    parser.add_argument("--muon-lr", type=float, default=4e-3, help="of the blocks' matrices")
    parser.add_argument(
        "--lr", type=float, help="of all other weights; default: 1.5e-3, or 2e-3 for the mixture"
    )
    parser.add_argument(
        "--samples", type=int, default=20_000, help="per prompt, to measure the mixture's network"
    )
    parser.add_argument(
        "--every", type=int, default=2000, help="steps between evaluations and exports"
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the network: 1.2 times faster on a CPU"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args(argv)
    for name, value in vars(options).items():
        if value is not None and name in COUNTS and value < 1:
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"{flag} {value}: write a number of at least 1")
    set_threads(options.threads)
    if options.encoders:
        train_encoders(
            options.out or encoders.FOLDER,
            options.steps or 600,
            options.clips or 4320,
            options.seed,
        )
        return 0
    if options.mixture:
        fit_mixture(
            options.out or ASSETS / "mixture",
            options.steps or 5000,
            options.batch or 512,
            options.lr or 2e-3,
            options.seed,
            options.samples,
        )
        return 0
    options.out = options.out or ASSETS / "mini-wan"
    if options.measure:
        if not (options.out / "model_index.json").is_file():
            parser.error(f"--out {options.out}: no pipeline folder; name one that pretrain wrote")
        print_quality(written_quality(options.out, range(NEW_NOISE, NEW_NOISE + options.measure)))
        return 0
    options.batch, options.lr = options.batch or 32, options.lr or 1.5e-3
    options.steps, options.clips = options.steps or 24_000, options.clips or 40_000
    options.work.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = train_autoencoder(options, device)
    captions = [shapes.caption(a) for a in training_attributes(options.clips)]
    try:
        train_teacher(vae, captions, load_latents(vae, options, device), options, device)
    except CheckpointError as error:
        parser.error(str(error))
    return 0


def print_quality(rows: Iterable[dict[str, float]]) -> None:
    """Print rows of equal columns as CSV, each when it is measured."""
    writer = None
    for row in rows:
        if writer is None:
            writer = csv.DictWriter(sys.stdout, list(row), lineterminator="\n")
            writer.writeheader()
        writer.writerow(row)
        sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
