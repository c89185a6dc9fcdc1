"""Scores and features on a device against those on the processor.

Every evaluator with a network scores the same clips on both, with random weights of the real
classes or with the shipped weights. Prints the largest differences of features and scores as shares
of the tolerances of eval/README.md, and fails if one is above 1.
"""

import functools
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from clip_folders import write_sampled
from gpu_rows import part_parser, show_row
from random_networks import RANDOM, write_textures
from safetensors.torch import load_file
from torch import Tensor

from distill_bench.evaluate.score import evaluate

SHIPPED = "shipped networks"
EVERY = (*RANDOM, SHIPPED)
CASES = {"wan-1.3b": EVERY, "tiny": ("dino_similarity",)}  # all clips are small
FEATURES, OPTICAL_FLOW = 1e-4, 1e-3  # of the norm of all features
RELATIVE, ABSOLUTE = 1e-3, 1e-4  # of a score


@dataclass(frozen=True)
class Case:
    """Clips, and networks that score them."""

    folder: Path
    evaluators: list[str] | None  # None: all that have shipped networks
    settings: dict[str, dict[str, str]]


@dataclass(frozen=True)
class Scored:
    """Scores by column, features by the name of their cache file, and the devices."""

    scores: Mapping[str, float]
    features: Mapping[str, Tensor]
    devices: frozenset[str]


def write_case(folder: Path, name: str) -> Case:
    """Write textures and the networks of an evaluator, or shapes for the shipped networks.

    Args:
        folder: a new folder.
        name: one of `EVERY`.
    """
    if name == SHIPPED:
        write_sampled(folder / "own", count=16)
        write_sampled(folder / "teacher", first=100, count=16)
        return Case(folder, None, {})
    size = {"clips": 2, "frames": 3} if name == "motion" else {}  # RAFT is slow
    write_textures(folder / "own", 0, **size)
    write_textures(folder / "teacher", 100, **size)
    return Case(folder, [name], {name: RANDOM[name](folder)})


def score_on(device: str, case: Case) -> Scored:
    """Scores and features on a device, named as by `distill-bench evaluate --device`."""
    own, teacher, out = (case.folder / name for name in ("own", "teacher", "metrics.jsonl"))
    out.unlink(missing_ok=True)
    clear_features(own, teacher)
    lines = evaluate(own, {"teacher": teacher}, case.evaluators, None, out, case.settings, device)
    features = {
        f"{place.name} {path.stem}": load_file(path)["features"]
        for place in (own, teacher)
        for path in (place / ".features").glob("*.safetensors")
    }
    scores = {line["column"]: line["value"] for line in lines}
    return Scored(scores, features, frozenset(line["device"] for line in lines))


def clear_features(*folders: Path) -> None:
    """Remove cached features of clips."""
    for folder in folders:
        shutil.rmtree(folder / ".features", ignore_errors=True)


def differences(one: Scored, other: Scored) -> tuple[float, float]:
    """Largest difference of features, and of scores, as shares of their tolerances."""
    assert one.features.keys() == other.features.keys() and one.scores.keys() == other.scores.keys()
    of_features = OPTICAL_FLOW if "motion" in one.scores else FEATURES
    features = [
        float((other.features[name] - rows).norm() / rows.norm()) / of_features
        for name, rows in one.features.items()
    ]
    scores = [
        abs(other.scores[column] - value) / max(RELATIVE * abs(value), ABSOLUTE)
        for column, value in one.scores.items()
    ]
    return max(features), max(scores)


def main(argv: list[str] | None = None) -> int:
    """Print a line per evaluator; returns 1 if a difference is above its tolerance."""
    options = part_parser("gpu_scores", __doc__).parse_args(argv)
    began, worst, complete = time.monotonic(), 0.0, True
    print("| networks of | device | features / tolerance | scores / tolerance |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:

        def compared(name: str) -> list[str]:
            nonlocal worst
            case = write_case(Path(folder) / name, name)
            one, other = (score_on(place, case) for place in ("cpu", options.device))
            shares = differences(one, other)
            worst = max(worst, *shares)
            return [", ".join(sorted(other.devices)), *(f"{share:.2g}" for share in shares)]

        for name in CASES[options.size]:
            in_time = time.monotonic() - began < options.seconds
            make = functools.partial(compared, name) if in_time else None
            complete &= show_row([name], 4, make)
    return int(worst > 1 or not complete)


if __name__ == "__main__":
    sys.exit(main())
