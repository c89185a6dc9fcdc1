"""Seconds and memory of both updates at size, and the gain of each setting.

Uses the shape of Wan2.1-T2V-1.3B at 81 frames of 480x832, with random weights in bfloat16, one clip
per batch, two steps. Per row: seconds of both updates (medians of rounds); how much longer they
take than the passes of their networks alone; model FLOPs utilisation (the ledger's FLOPs over
seconds and the device's peak; forwards that checkpointing runs again do not count); peak memory and
the predicted one, which leaves out what `compile` saves. "8 blocks" are networks with the first 8
of Wan's 30 blocks. A row differs from the reference of its method and blocks in its setting, and
says so if it does not fit or fails.
"""

import contextlib
import functools
import gc
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.attention_dispatch import attention_backend
from gpu_rows import part_parser, show, show_row
from torch import Tensor, nn
from trainer_step import counted_passes, price

from distill_bench.config.resolve import resolve
from distill_bench.config.schema import RunConfig
from distill_bench.networks.ledger import PASSES
from distill_bench.plan.memory import predicted
from distill_bench.plan.outline import Outline, outline
from distill_bench.plan.rehearsal import rehearsed
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
    "nfe": 2,  # a random exit of four steps comes after two or three forwards
    "exit_step": "last",
    "trackers": [],
    "signals_every": None,
}
NO_CHECKPOINTING = {"gradient_checkpointing": False}
FULL_ROWS: dict[str, dict] = {
    "reference": {},
    "compiled blocks": {"compile": True},
}
# Few blocks: without checkpointing, all blocks need more memory than a card has, and a graph of all
# takes minutes to compile. What is compiled comes last, because its time is not known before.
FEW_ROWS: dict[str, dict] = {
    "reference": {},
    "no checkpointing": NO_CHECKPOINTING,
    "batched guidance": {"guidance_forwards": "batched"},
    "float32 weights under autocast": {"weights": "float32"},
    "shared base by adapters": {"adapter": {}},
    "plain attention": {},
    "compiled network, no checkpointing": NO_CHECKPOINTING | {"compile": "network"},
}
FEW_BLOCKS = {"wan-1.3b": 8, "tiny": 1}
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
    "over passes",
    "MFU",
    "peak, GiB",
    "predicted, GiB",
)


class RandomPipeline(Outline):
    """A pipeline of random weights and texts: values change neither seconds nor bytes."""

    def student(self) -> nn.Module:
        with torch.device(self.device):
            return super().student()

    fake_score = student

    def encode_text(self, prompts: list[str]) -> Tensor:
        return torch.randn_like(super().encode_text(prompts)).to(self.device)

    def prompts(self) -> list[str]:
        return ["one"]


def random_pipeline(
    config: RunConfig, device: torch.device, blocks: int | None = None
) -> RandomPipeline:
    """The pipeline of a run without its autoencoder, with random weights on `device`.

    Args:
        blocks: of every network; None: as in its config.
    """
    with torch.device(device):
        shapes = outline(config, (blocks, blocks))
    return RandomPipeline(
        shapes.folder,
        shapes.architecture,
        device,
        transformer=shapes.transformer,
        vae=None,
        student_folder=shapes.student_folder,
        layers=blocks,
    )


def predicted_gib(config: str, blocks: int | None) -> float:
    """Predicted peak memory of a run in GiB, from its config as JSON."""
    with outlines():
        run = RunConfig.model_validate_json(config)
        if blocks is None:
            return predicted(run).peak / 2**30
        return rehearsed(run, (blocks, blocks), 1)[0].peak / 2**30


def timed(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """A clock: the wall-clock seconds of a call, including the device's work."""

    def seconds(work: Callable[[], object]) -> float:
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    return seconds


@dataclass(frozen=True)
class Measurement:
    """Medians over rounds: seconds by phase, of their passes alone, FLOPs, peak bytes.

    Attributes:
        passes: None with adapters, whose passes cannot be run alone.
        peak: None on a processor.
    """

    student_seconds: float
    fake_score_seconds: float
    passes: float | None
    flops: float
    peak: int | None

    @property
    def seconds(self) -> float:
        """Seconds of both updates."""
        return self.student_seconds + self.fake_score_seconds


def measure(
    config: RunConfig, device: torch.device, rounds: int, blocks: int | None
) -> Measurement:
    """Measure the updates of a run."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    pipeline = random_pipeline(config, device, blocks)
    run = assemble(config, pipeline, OneProcess(device), extras={})
    seconds = timed(device)
    updates = {"student": run.update_student, "fake_score": lambda: run.update_fake_score(0)}
    took: dict[str, list[float]] = {phase: [] for phase in updates}
    flops: dict[str, float] = {}
    passes = counted_passes(run)
    for round_ in range(rounds + 1):  # the first warms up
        passes.clear()
        for phase, update in updates.items():
            run.ledger.counts.clear()
            spent = seconds(update)
            if round_:
                took[phase].append(spent)
            flops[phase] = sum(
                PASSES[kind] * number * run.ledger.flops[role]
                for role, row in run.ledger.counts.items()
                for kind, number in row.items()
            )
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Measurement(
        statistics.median(took["student"]),
        statistics.median(took["fake_score"]),
        None if config.adapter else price(run, passes, seconds),
        sum(flops.values()),
        peak,
    )


def row(
    setting: str,
    config: RunConfig,
    blocks: int | None,
    device: torch.device,
    rounds: int,
    peak_flops: float | None,
    needs: Future[float],
) -> tuple[str, ...]:
    """Cells of one line, after method and setting."""
    # a network's own `set_attention_backend` would stay for the rows that follow
    plain = setting == "plain attention"
    backend = attention_backend("_native_math") if plain else contextlib.nullcontext()
    try:
        with backend:
            measured = measure(config, device, rounds, blocks)
    except torch.OutOfMemoryError:
        return "does not fit", *["-"] * 4, f"{needs.result():.3g}"
    finally:
        torch.compiler.reset()  # what is compiled depends on the rows before
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    over = "-" if measured.passes is None else f"{measured.seconds / measured.passes - 1:+.1%}"
    utilisation = "-"
    if peak_flops is not None:
        utilisation = f"{measured.flops / measured.seconds / peak_flops:.1%}"
    return (
        f"{measured.student_seconds:.3g}",
        f"{measured.fake_score_seconds:.3g}",
        over,
        utilisation,
        "-" if measured.peak is None else f"{measured.peak / 2**30:.3g}",
        f"{needs.result():.3g}",
    )


def main(argv: list[str] | None = None) -> int:
    """Print a line per row; returns 1 if a row failed."""
    parser = part_parser("gpu_updates", __doc__)
    parser.add_argument("--rounds", type=int, default=2, help="measured after one to warm up")
    parser.add_argument(
        "--peak-tflops",
        type=float,
        help="peak of the device in bfloat16; default: known by its name",
    )
    options = parser.parse_args(argv)
    end = time.monotonic() + options.seconds
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "processor"
    peak_flops = next((peak for key, peak in PEAKS.items() if key in name), None)
    peak_flops = options.peak_tflops * 1e12 if options.peak_tflops else peak_flops
    shape = SIZES[options.size]
    if options.size == "tiny":
        folder = Path(tempfile.mkdtemp()) / "tiny-wan"
        tiny_pipeline(folder)
        shape = shape | {"teacher": str(folder)}
    size = f"{shape['frames']} frames of {shape['height']}x{shape['width']}"
    print(f"{options.size}, random weights, {size}, batch 1.\n")
    for cells in (HEADINGS, ["---"] * len(HEADINGS)):
        show(cells)
    few, complete, longest = FEW_BLOCKS[options.size], True, 0.0
    rows = [(setting, changed, None) for setting, changed in FULL_ROWS.items()]
    rows[1:1] = [(setting, changed, few) for setting, changed in FEW_ROWS.items()]
    # predictions take seconds of the processor, in which the device would wait
    with outlines(), ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        planned = []
        for setting, changed, blocks in rows:
            for method, fields in METHODS.items():
                if options.size == "tiny" and blocks is not None and method != "dmd2":
                    continue  # a rehearsal tries the other method on whole networks
                config = resolve(REFERENCE | shape | {"method": fields} | changed)
                eager = config.model_copy(update={"compile": False})
                needs = pool.submit(predicted_gib, eager.model_dump_json(), blocks)
                planned.append((method, setting, config, blocks, needs))
        for method, setting, config, blocks, needs in planned:
            began = time.monotonic()
            make = functools.partial(
                row, setting, config, blocks, device, options.rounds, peak_flops, needs
            )
            name = (method, setting if blocks is None else f"{blocks} blocks: {setting}")
            in_time = began + longest < end
            complete &= show_row(name, len(HEADINGS), make if in_time else None)
            longest = max(longest, time.monotonic() - began)
        pool.shutdown(cancel_futures=True)
    return int(not complete)


if __name__ == "__main__":
    sys.exit(main())
