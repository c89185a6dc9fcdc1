"""Seconds and memory of both updates at size, and the gain of each setting: `make bench-gpu`.

Uses the shape of Wan2.1-T2V-1.3B at 81 frames of 480x832, with random weights in bfloat16, one clip
per batch, on one GPU. Prints seconds (median of rounds), model FLOPs utilisation (the ledger's
FLOPs over seconds and the device's peak; forwards that checkpointing runs again do not count) and
peak memory beside the predicted one. Each row differs from the first in one setting; a row that
does not fit says so. `--device cpu --size tiny` tries the command in seconds.
"""

import argparse
import contextlib
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor

from distill_bench.config.resolve import resolve
from distill_bench.config.schema import RunConfig
from distill_bench.networks.ledger import PASSES
from distill_bench.plan.memory import predicted
from distill_bench.plan.outline import Outline, outline
from distill_bench.teachers.folder import outlines
from distill_bench.testing.tiny import tiny_pipeline
from distill_bench.train.assemble import assemble
from distill_bench.train.processes import OneProcess

PEAKS = {  # FLOPs per second in dense bfloat16, as published by the makers
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
}
METHODS = {
    "dmd2": {"name": "dmd2", "preset": "video"},
    "sgmd": {"name": "sgmd", "preset": "official"},
}
REFERENCE = {
    "precision": "bfloat16",
    "weights": "bfloat16",
    "gradient_checkpointing": True,
    "guidance_forwards": "sequential",
    "batch_size": 1,
    "nfe": 4,
    "exit_step": "last",
    "trackers": [],
    "signals_every": None,
}
ROWS: dict[str, dict] = {
    "reference": {},
    "no checkpointing": {"gradient_checkpointing": False},
    "batched guidance": {"guidance_forwards": "batched"},
    "float32 weights under autocast": {"weights": "float32"},
    "shared base by adapters": {"adapter": {}},
    "plain attention": {},
    "compiled blocks": {"compile": True},
}
SIZES = {
    "wan-1.3b": {
        "teacher": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "frames": 81,
        "height": 480,
        "width": 832,
    },
    "tiny": {"frames": 5, "height": 16, "width": 16},
}
HEADINGS = (
    "method",
    "setting",
    "student update, s",
    "fake-score update, s",
    "MFU",
    "peak, GiB",
    "predicted, GiB",
)


class RandomPipeline(Outline):
    """A pipeline of random weights and texts: values change neither seconds nor bytes."""

    def encode_text(self, prompts: list[str]) -> Tensor:
        return torch.randn_like(super().encode_text(prompts)).to(self.device)

    def prompts(self) -> list[str]:
        return ["one"]


def random_pipeline(config: RunConfig, device: torch.device) -> RandomPipeline:
    """The pipeline of a run without its autoencoder, with random weights on `device`."""
    with torch.device(device):
        shapes = outline(config)
    return RandomPipeline(
        shapes.folder,
        shapes.architecture,
        device,
        transformer=shapes.transformer,
        vae=None,
        student_folder=shapes.student_folder,
    )


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of a call, including the device's work."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


@dataclass(frozen=True)
class Measurement:
    """Medians over rounds: seconds by phase, FLOPs of both phases, peak bytes (None on a CPU)."""

    student_seconds: float
    fake_score_seconds: float
    flops: float
    peak: int | None


def measure(config: RunConfig, device: torch.device, rounds: int) -> Measurement:
    """Measure the updates of a run."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    run = assemble(config, random_pipeline(config, device), OneProcess(device), extras={})
    updates = {"student": run.update_student, "fake_score": lambda: run.update_fake_score(0)}
    took: dict[str, list[float]] = {phase: [] for phase in updates}
    flops: dict[str, float] = {}
    for round_ in range(rounds + 1):  # the first warms up
        for phase, update in updates.items():
            run.ledger.counts.clear()
            spent = seconds(update, device)
            if round_:
                took[phase].append(spent)
            flops[phase] = sum(
                PASSES[kind] * count * run.ledger.flops[role]
                for role, row in run.ledger.counts.items()
                for kind, count in row.items()
            )
    return Measurement(
        statistics.median(took["student"]),
        statistics.median(took["fake_score"]),
        sum(flops.values()),
        torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


def row(
    method: str,
    setting: str,
    config: RunConfig,
    device: torch.device,
    rounds: int,
    peak_flops: float | None,
) -> tuple[str, ...]:
    """One line of the table."""
    needs = f"{predicted(config).peak / 2**30:.3g}"
    plain = setting == "plain attention"
    # a network's own `set_attention_backend` would stay for the rows that follow
    backend = attention_backend("_native_math") if plain else contextlib.nullcontext()
    try:
        with backend:
            measured = measure(config, device, rounds)
    except torch.OutOfMemoryError:
        return method, setting, "does not fit", "does not fit", "-", "-", needs
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    spent = measured.student_seconds + measured.fake_score_seconds
    utilisation = "-" if peak_flops is None else f"{measured.flops / spent / peak_flops:.1%}"
    return (
        method,
        setting,
        f"{measured.student_seconds:.3g}",
        f"{measured.fake_score_seconds:.3g}",
        utilisation,
        "-" if measured.peak is None else f"{measured.peak / 2**30:.3g}",
        needs,
    )


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and write its table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=SIZES, default="wan-1.3b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--skip", action="append", default=[], choices=ROWS, help="a setting to leave out"
    )
    parser.add_argument(
        "--peak-tflops",
        type=float,
        help="peak of the device in bfloat16; default: known by its name",
    )
    parser.add_argument("--out", type=Path, default=Path("results/bench_gpu.md"))
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "gpu: no GPU here; --device cpu --size tiny shows that the command runs\n")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "processor"
    peak_flops = next((peak for key, peak in PEAKS.items() if key in name), None)
    peak_flops = options.peak_tflops * 1e12 if options.peak_tflops else peak_flops
    shape = SIZES[options.size]
    if options.size == "tiny":
        folder = Path(tempfile.mkdtemp()) / "tiny-wan"
        tiny_pipeline(folder)
        shape = shape | {"teacher": str(folder)}
    lines = []
    with outlines():
        for method, fields in METHODS.items():
            for setting, changed in ROWS.items():
                if setting not in options.skip:
                    config = resolve(REFERENCE | shape | {"method": fields} | changed)
                    lines.append(row(method, setting, config, device, options.rounds, peak_flops))
                    print("  ".join(lines[-1]), flush=True)
    size = f"{shape['frames']} frames of {shape['height']}x{shape['width']}"
    table = [HEADINGS, ["---"] * len(HEADINGS), *lines]
    text = f"{options.size}, random weights, {size}, batch 1, torch {torch.__version__}, {name}\n\n"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text + "".join(f"| {' | '.join(cells)} |\n" for cells in table))
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
