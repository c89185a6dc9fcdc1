"""Clips per second of RAFT, I3D and CLIP on a device, with random weights in their real sizes.

Scores the same clips twice as `distill-bench evaluate` does, the first time to warm up. The seconds
include reading the clips and all that is not a network.
"""

import functools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from gpu_rows import part_parser, show_row
from gpu_scores import clear_features
from random_networks import write_clip, write_i3d, write_textures
from real_i3d import InceptionI3d
from torch import nn

from distill_bench.evaluate.device import peak_bytes
from distill_bench.evaluate.score import evaluate

CLIP = "ViT-L-14"
SHAPES = {"wan-1.3b": (4, 81, 480, 832), "tiny": (2, 10, 128, 136)}  # clips, frames, height, width


def raft(folder: Path, size: str) -> dict[str, str]:
    """Settings of `motion` with RAFT."""
    from torchvision.models.optical_flow import raft_large, raft_small

    torch.manual_seed(0)
    net = raft_small(weights=None) if size == "tiny" else raft_large(weights=None)
    torch.save(net.state_dict(), folder / "raft.pth")
    return {"raft": f"{folder}/raft.pth"}


def i3d(folder: Path, size: str) -> dict[str, str]:
    """Settings of `fvd` with I3D."""
    net: nn.Module | None = None if size == "tiny" else InceptionI3d()
    return {"extractor": f"i3d-k400-logits-400:{write_i3d(folder, net)}"}


def clip(folder: Path, size: str) -> dict[str, str]:
    """Settings of `clip_score` with a CLIP."""
    import open_clip

    if size == "tiny":
        return {"model": f"local-dir:{write_clip(folder / 'clip')}"}
    config = open_clip.get_model_config(CLIP)
    return {"model": f"local-dir:{write_clip(folder / 'clip', config)}"}


NETWORKS: dict[str, tuple[str, Callable[[Path, str], dict[str, str]]]] = {
    "I3D (400 logits)": ("fvd", i3d),
    f"CLIP {CLIP}": ("clip_score", clip),
    "RAFT large": ("motion", raft),
}


def seconds_per_clip(folder: Path, size: str, evaluator: str, settings: dict, device: str) -> float:
    """Seconds that an evaluator takes per clip of `own` and of `teacher`, the second time."""
    own, teacher = folder / "own", folder / "teacher"
    for _ in range(2):
        clear_features(own, teacher)
        (folder / "metrics.jsonl").unlink(missing_ok=True)
        began = time.perf_counter()
        evaluate(
            own,
            {"teacher": teacher},
            [evaluator],
            None,
            folder / "metrics.jsonl",
            {evaluator: settings},
            device,
        )
        took = time.perf_counter() - began
    counts = [len(path.read_text().splitlines()) for path in folder.glob("*/manifest.jsonl")]
    return took / sum(counts)


def main(argv: list[str] | None = None) -> int:
    """Print a line per network; returns 1 if one failed."""
    options = part_parser("gpu_throughput", __doc__).parse_args(argv)
    began = time.monotonic()
    count, frames, height, width = SHAPES[options.size]
    print(f"{count} clips of a student and of its teacher, {frames} frames of {height}x{width}.\n")
    print("| network | evaluator | seconds per clip | clips per second | peak, GiB |")
    print("|---|---|---:|---:|---:|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, seed in (("own", 0), ("teacher", 100)):
            write_textures(folder / name, seed, frames, count, (height, width))

        def measured(evaluator: str, write: Callable[[Path, str], dict[str, str]]) -> list[str]:
            settings = write(folder, options.size)
            took = seconds_per_clip(folder, options.size, evaluator, settings, options.device)
            peak = peak_bytes(torch.device(options.device)) / 2**30
            return [f"{number:.3g}" for number in (took, 1 / took, peak)]

        complete = True
        for name, (evaluator, write) in NETWORKS.items():
            in_time = time.monotonic() - began < options.seconds
            make = functools.partial(measured, evaluator, write) if in_time else None
            complete &= show_row([name, evaluator], 5, make)
    return int(not complete)


if __name__ == "__main__":
    sys.exit(main())
