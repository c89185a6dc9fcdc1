"""One student update and one fake-score update at size, and what each setting buys: `make bench-gpu`.

For the shape of Wan2.1-T2V-1.3B at 81 frames of 480x832, with random weights in bfloat16, one clip a batch, on one GPU: seconds
(median of rounds), model FLOPs utilisation (the FLOPs that the ledger counts, over seconds and the device's peak; forwards that
checkpointing runs again are none) and peak memory beside the predicted one. Every row differs from the first in one thing. What
does not fit is a row that says so. `--device cpu --size tiny` runs the same in seconds, to see that it does.
"""

import argparse
import contextlib
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor

from distill_bench.config.resolve import resolve
from distill_bench.config.schema import RunConfig
from distill_bench.networks.ledger import PASSES
from distill_bench.plan.memory import predicted
from distill_bench.plan.outline import Outline, outline
from distill_bench.teachers.folder import outlines, teacher_folder
from distill_bench.teachers.kinds import Pipeline
from distill_bench.testing.tiny import tiny_pipeline
from distill_bench.train.trainer import Trainer

PEAKS = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
}  # dense bfloat16, by the makers
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


class Made(Outline):
    """A pipeline of random weights: what a network has learnt changes no second and no byte."""

    def encode_text(self, prompts: list[str]) -> Tensor:
        return torch.randn_like(super().encode_text(prompts)).to(self.device)

    def prompts(self) -> list[str]:
        return ["one"]


class Measured(Trainer):
    """A trainer whose pipeline is made up."""

    def __init__(self, config: RunConfig, folder: Path, device: torch.device) -> None:
        self.folder, self.wanted = folder, device
        super().__init__(Path(tempfile.mkdtemp()) / "run", config)

    def _place(self) -> tuple[int, int, torch.device]:
        return 1, 0, self.wanted

    def _check_memory(self) -> None:
        """What does not fit is to be seen here."""

    def _pipeline(self) -> Pipeline:
        with torch.device(self.wanted):
            found = outline(self.config)
        return Made(
            found.folder,
            found.architecture,
            self.wanted,
            transformer=found.transformer,
            vae=None,
            student_folder=found.student_folder,
        )


def seconds(work: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def measure(
    config: RunConfig, folder: Path, device: torch.device, rounds: int
) -> dict[str, float | None]:
    """Seconds of both updates, FLOPs of both, and peak bytes, which nothing counts on a processor."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    trainer = Measured(config, folder, device)
    took: dict[str, list[float]] = {"student": [], "fake_score": []}
    updates = {
        "student": trainer.update_student,
        "fake_score": lambda: trainer.update_fake_score(0, None),
    }
    flops = {}
    for number in range(rounds + 1):  # the first warms up
        for role, update in updates.items():
            trainer.ledger.counts.clear()
            spent = seconds(update, device)
            if number:
                took[role].append(spent)
            counts = trainer.ledger.counts.items()
            flops[role] = sum(
                PASSES[k] * n * trainer.ledger.flops[r] for r, row in counts for k, n in row.items()
            )
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {f"{role} s": statistics.median(times) for role, times in took.items()} | {
        "flops": sum(flops.values()),
        "peak": peak,
    }


def row(
    name: str,
    setting: str,
    config: RunConfig,
    folder: Path,
    device: torch.device,
    rounds: int,
    peak_flops: float | None,
):
    """One line of the table."""
    needs = f"{predicted(config).peak / 2**30:.3g}"
    try:
        # a network's own `set_attention_backend` would stay for the rows that follow
        with (
            attention_backend("_native_math")
            if setting == "plain attention"
            else contextlib.nullcontext()
        ):
            found = measure(config, folder, device, rounds)
    except torch.OutOfMemoryError:
        return name, setting, "does not fit", "does not fit", "-", "-", needs
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    spent = found["student s"] + found["fake_score s"]
    peak = "-" if found["peak"] is None else f"{found['peak'] / 2**30:.3g}"
    used = "-" if peak_flops is None else f"{found['flops'] / spent / peak_flops:.1%}"
    return (
        name,
        setting,
        f"{found['student s']:.3g}",
        f"{found['fake_score s']:.3g}",
        used,
        peak,
        needs,
    )


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=SIZES, default="wan-1.3b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--skip", action="append", default=[], choices=ROWS, help="a setting to leave out"
    )
    parser.add_argument(
        "--peak-tflops", type=float, help="of the device in bfloat16; default: by its name"
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
                    folder = teacher_folder(config.teacher)
                    lines.append(
                        row(method, setting, config, folder, device, options.rounds, peak_flops)
                    )
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
