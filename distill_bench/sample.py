"""Clips of a run and of the rows that every table has beside it, from the same prompts and seeds.

`sample(run_dir)` draws the student's clips; `references(config, store)` the rows to hold them against. A folder of clips is
`clips.npy` (uint8, (N, T, 3, H, W)) with `manifest.jsonl` (index, prompt, seed) and `row.json` (kind, fps), and for a
teacher with an autoencoder of its own `videos/*.mp4`; a folder that is there is done.

    torchrun --nproc_per_node 8 -m distill_bench.sample RUN    ranks share the clips

Clips are kept as they are made, in `.parts-<name>` beside the folder, so that a row goes on where it was stopped. What is drawn
together is the same however often it is stopped and however many ranks there are, so that no bit depends on either.
"""

import argparse
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill_bench import checkpoint, controls, shapes
from distill_bench.config import RunConfig, load_run
from distill_bench.cost import Ledger
from distill_bench.draws import generator
from distill_bench.masters import cast
from distill_bench.media import write_video
from distill_bench.models import Denoiser, Guided, Pipeline, pipeline_of, place_of_launch
from distill_bench.networks import offloaded
from distill_bench.noise import student_sigmas, teacher_sigmas
from distill_bench.protocol import protocol, protocol_hash, student_key
from distill_bench.rollout import euler, rollout
from distill_bench.store import write_json

BATCH, VALUES = (
    16,
    2**26,
)  # clips drawn together, and values of their frames, which cuts that of large clips
Latents = Callable[
    [list[Tensor], Tensor], Tensor
]  # of noises, one (B, C, T, H, W) a step, and text (B, L, D): (B, C, T, H, W)
PATIENCE = 60.0  # seconds without a clip of the other ranks before the first one makes theirs: or three times its own


def sample(run_dir: Path) -> list[Path]:
    """Draw the clips of every kept student into samples/<student_updates>/; returns those folders in order."""
    config, kept = load_run(run_dir), checkpoint.students(run_dir)
    if not kept:
        raise ValueError(
            f"{run_dir} has no student: train it first (python -m distill_bench.train {run_dir})"
        )
    (run_dir / "samples").mkdir(exist_ok=True)
    folders = {run_dir / "samples" / str(updates): path for updates, path in kept.items()}
    missing = {
        folder: path for folder, path in folders.items() if not (folder / "clips.npy").is_file()
    }
    if missing:
        sampler = Sampler(config, run_dir.parent)
        student = sampler.placed(sampler.pipeline.student())
        for folder, path in missing.items():
            checkpoint.load_student(path, student, config.adapter)
            facts = sampler.facts(student)
            row = {"kind": "student", "fps": config.protocol.fps}
            _write(folder, sampler.student(student), sampler.prompts, sampler.seeds, row, facts)
    return list(folders)


def references(config: RunConfig, store: Path) -> dict[str, Path]:
    """The reference rows of a run's protocol, made where they are missing: kind -> folder.

    `data` and `data_other` are rendered clips (only where the prompts are of the embedded domain), `teacher` and
    `teacher_other` the teacher's many-step clips; "other" means other seeds, so that each pair is a floor. `teacher_few` is the
    teacher's ODE at the student's step count, `untrained` the student before training. Three rows are wrong on purpose: `frozen`
    and `shuffled` are the teacher's clips standing still and with their frames out of order, `noise` is uniform noise.
    """
    root = store / "references" / protocol_hash(config)
    few = student_key(config)
    names = {
        "data": "data",
        "data_other": "data_other",
        "teacher": "teacher",
        "teacher_other": "teacher_other",
    }
    names |= {"teacher_few": f"teacher_few-nfe{config.nfe}", "untrained": f"untrained-{few}"}
    names |= {kind: kind for kind in ("frozen", "shuffled", "noise")}
    folders = {kind: root / name for kind, name in names.items()}
    if all((folder / "clips.npy").is_file() for folder in folders.values()):
        return folders
    write_json(root / "protocol.json", protocol(config))
    sampler = Sampler(config, store)
    n = config.protocol.clips
    other = [seed + n for seed in sampler.seeds]
    if not all(map(_in_domain, sampler.prompts)):
        del folders["data"], folders["data_other"]
    steps = config.protocol.teacher_steps
    whole = {
        "frozen": lambda: controls.frozen(_clips_of(folders["teacher"])),
        "shuffled": lambda: controls.shuffled(_clips_of(folders["teacher"]), config.protocol.seed),
        "noise": sampler.noise,
    }
    rows: dict[str, Callable[[], tuple[Row, list[int]]]] = {
        "data": lambda: (_rendered(sampler.prompts, sampler.seeds), sampler.seeds),
        "data_other": lambda: (_rendered(sampler.prompts, other), other),
        "teacher": lambda: (sampler.teacher(steps, sampler.seeds), sampler.seeds),
        "teacher_other": lambda: (sampler.teacher(steps, other), other),
        "teacher_few": lambda: (sampler.teacher(config.nfe, sampler.seeds), sampler.seeds),
        "untrained": lambda: (
            sampler.student(sampler.placed(sampler.pipeline.student())),
            sampler.seeds,
        ),
    } | {
        kind: (lambda make=make: (Row(lambda *_: make(), n), sampler.seeds))
        for kind, make in whole.items()
    }
    for kind, folder in sorted(
        folders.items(), key=lambda row: row[0] != "untrained"
    ):  # a device holds one network at a time
        if not (folder / "clips.npy").is_file():
            if not place_of_launch()[0]:
                print(f"reference {kind}: {n} clips", flush=True)
            row, seeds = rows[kind]()
            about = {"kind": kind, "protocol": root.name, "fps": config.protocol.fps}
            _write(folder, row, sampler.prompts, seeds, about)
    return folders


def drawn_together(config: RunConfig) -> int:
    """How many clips of a run's size are drawn at once; what is drawn together is part of its bits."""
    return max(1, min(BATCH, VALUES // (3 * config.frames * config.height * config.width)))


@dataclass(frozen=True)
class Row:
    """How the clips of a row are made: `frames(first, end)` are those of these indices, uint8 (N, T, 3, H, W)."""

    frames: Callable[[int, int], np.ndarray]
    together: int  # clips that are drawn at once
    videos: bool = False  # beside the frames


class Sampler:
    """The prompts, seeds and starting noises of a protocol; every row begins from the same noise."""

    def __init__(self, config: RunConfig, store: Path | None = None) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config, protocol = config, config.protocol
        self.device = place_of_launch()[2]
        self.pipeline: Pipeline = pipeline_of(config, self.device, store)
        self.dtype = getattr(torch, protocol.precision)
        self.shape = self.pipeline.latent_shape(config.frames, config.height, config.width)
        known = self.pipeline.prompts()
        order = torch.randperm(len(known), generator=generator("protocol", protocol.seed)).tolist()
        # two clips a prompt: clips of one prompt must differ, and that is scored
        distinct = min(len(known), math.ceil(protocol.clips / 2))
        self.prompts = [known[order[i % distinct]] for i in range(protocol.clips)]
        self.seeds = [protocol.seed + i for i in range(protocol.clips)]
        self.texts = self.pipeline.texts(self.prompts)

    def placed(self, net: torch.nn.Module, offload: bool = False) -> torch.nn.Module:
        """The network where and in which precision it samples; with `offload` its blocks in host memory."""
        if self.dtype != torch.float32:
            cast(net, self.dtype)
        return offloaded(net, self.device) if offload else net.to(self.device)

    def student(self, net: torch.nn.Module) -> Row:
        """Clips in the student's own steps, without guidance."""
        config = self.config
        denoiser = self._denoiser(net, "student")
        sigmas = student_sigmas(config.nfe, config.shift).to(self.device)
        return self._clips(
            self.seeds,
            lambda noises, text: rollout(denoiser, noises, sigmas, text, config.stepping),
        )

    def facts(self, net: torch.nn.Module) -> dict[str, np.ndarray]:
        """What the teacher's kind knows exactly of the student's distribution; for a network of unknown density nothing."""
        sigmas = student_sigmas(self.config.nfe, self.config.shift)
        return self.pipeline.facts(
            net, sigmas, self.config.stepping, self.config.protocol.teacher_guidance
        )

    def teacher(self, steps: int, seeds: list[int]) -> Row:
        """Clips by `steps` Euler steps of the guided teacher."""
        batched = self.config.guidance_forwards == "batched"
        guided = Guided(
            self._teacher, self.texts.null_text, self.config.protocol.teacher_guidance, batched
        )
        sigmas = teacher_sigmas(steps, self.config.shift).to(self.device)
        return self._clips(seeds, lambda noises, text: euler(guided, noises[0], sigmas, text))

    @cached_property
    def _teacher(self) -> Denoiser:
        return self._denoiser(
            self.placed(self.pipeline.transformer, self.config.teacher_offload), "teacher"
        )

    def _denoiser(self, net: torch.nn.Module, role: str) -> Denoiser:
        return Denoiser(
            net, role, Ledger(1), autocast=None if self.dtype == torch.float32 else self.dtype
        )

    def noise(self) -> np.ndarray:
        """Uniform noise frames (N, T, 3, H, W): the known-bad row."""
        config, n = self.config, len(self.seeds)
        rng = np.random.default_rng(config.protocol.seed)
        return rng.integers(
            0, 256, (n, config.frames, 3, config.height, config.width), dtype=np.uint8
        )

    def _clips(self, seeds: list[int], latents: Latents) -> Row:
        def frames(first: int, end: int) -> np.ndarray:
            return self._drawn(seeds[first:end], range(first, end), latents).numpy()

        return Row(frames, drawn_together(self.config), videos=self.pipeline.fps is not None)

    @torch.no_grad()
    def _drawn(self, seeds: list[int], which: Iterable[int], latents: Latents) -> Tensor:
        """Frames uint8 (B, T, 3, H, W) of these prompts."""
        return self.pipeline.decode(latents(self._noises(seeds), self.texts.rows(which)))

    def _noises(self, seeds: list[int]) -> list[Tensor]:
        """Noise (B, C, T, H, W) for each of the student's steps; the first is where a row begins."""
        return [
            torch.stack([self._noise(seed, step) for seed in seeds]).to(self.device)
            for step in range(self.config.nfe)
        ]

    def _noise(self, seed: int, step: int) -> Tensor:
        return self.pipeline.draw(self.shape, step, generator("sample", seed, step))


def _clips_of(folder: Path) -> np.ndarray:
    return np.load(folder / "clips.npy", allow_pickle=False)


def _in_domain(prompt: str) -> bool:
    try:
        shapes.parse(prompt)
    except ValueError:
        return False
    return True


def _rendered(prompts: list[str], seeds: list[int]) -> Row:
    def frames(first: int, end: int) -> np.ndarray:
        pairs = zip(prompts[first:end], seeds[first:end], strict=True)
        return np.stack([shapes.render(shapes.parse(prompt), seed) for prompt, seed in pairs])

    return Row(frames, BATCH)


def _write(
    folder: Path, row: Row, prompts: list[str], seeds: list[int], about: dict, facts: Mapping = {}
) -> None:  # noqa: B006
    """Write a folder of clips; who comes second finds it done. `facts` are exact arrays beside the frames.

    Every rank makes its share, the first one puts them together; it makes the others' too where they do not come.
    """
    parts, (rank, ranks, _) = folder.with_name(f".parts-{folder.name}"), place_of_launch()
    firsts, began = list(range(0, len(prompts), row.together)), time.monotonic()
    for first in firsts[rank::ranks]:
        _make_part(folder, parts, row, first, len(prompts), about["fps"])
    if rank:
        return
    seen, since = 0, time.monotonic()
    patience = max(PATIENCE, 3 * (since - began) * ranks / len(firsts))
    while missing := [first for first in firsts if not _part(parts, first).is_file()]:
        if len(missing) != seen:
            seen, since = len(missing), time.monotonic()
        if time.monotonic() - since > patience:
            _make_part(folder, parts, row, missing[-1], len(prompts), about["fps"])
        else:
            time.sleep(0.2)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".writing-"))
    try:
        _join([_part(parts, first) for first in firsts], temporary / "clips.npy", len(prompts))
        if videos := sorted(parts.glob("*.mp4")):
            (temporary / "videos").mkdir()
            for path in videos:
                path.rename(temporary / "videos" / path.name)
        lines = [
            {"index": i, "prompt": p, "seed": s}
            for i, (p, s) in enumerate(zip(prompts, seeds, strict=True))
        ]
        (temporary / "manifest.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )
        if facts:
            np.savez(temporary / "facts.npz", **facts)
        (temporary / "row.json").write_text(json.dumps(about) + "\n")
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / "clips.npy").is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(parts, ignore_errors=True)


def _part(parts: Path, first: int) -> Path:
    return parts / f"{first:06d}.npy"


def _make_part(folder: Path, parts: Path, row: Row, first: int, n: int, fps: float) -> None:
    """Make the clips from `first` on that are drawn together, unless they are there."""
    path = _part(parts, first)
    if path.is_file() or (folder / "clips.npy").is_file():
        return
    frames = row.frames(first, min(first + row.together, n))
    parts.mkdir(parents=True, exist_ok=True)
    if row.videos:
        for index, clip in enumerate(frames, first):
            write_video(parts / f"{index:06d}.mp4", clip, fps)
    temporary = parts / f".{path.name}.{os.getpid()}"
    try:
        with temporary.open("wb") as file:
            np.save(file, frames)
        temporary.replace(path)
    except FileNotFoundError:
        if not (folder / "clips.npy").is_file():  # else somebody was faster, and has tidied up
            raise


def _join(paths: list[Path], out: Path, n: int) -> None:
    """One file of many, clip by clip: all of them at size fit no memory."""
    shape = (n, *np.load(paths[0], mmap_mode="r").shape[1:])
    clips, at = np.lib.format.open_memmap(out, mode="w+", dtype=np.uint8, shape=shape), 0
    for path in paths:
        part = np.load(path)
        clips[at : at + len(part)] = part
        at += len(part)
    clips.flush()


def main(argv: list[str] | None = None) -> int:
    """Command line: sample one trained run folder."""
    parser = argparse.ArgumentParser(
        prog="distill_bench.sample", description=sample.__doc__.splitlines()[0]
    )
    parser.add_argument("run", type=Path, help="a run folder with run.yaml and a checkpoint")
    options = parser.parse_args(argv)
    try:
        print(*sample(options.run), sep="\n")
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
