"""Clips of a run and of the rows that every table has beside it, from the same prompts and seeds.

`sample(run_dir)` draws the student's clips; `references(config, store)` the rows to hold them against. A folder of clips is
`clips.npy` (uint8, (N, T, 3, H, W)) with `manifest.jsonl` (index, prompt, seed); a folder that is there is done.
"""

import argparse
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill_bench import checkpoint, controls, shapes
from distill_bench.config import RunConfig, load_run
from distill_bench.cost import Ledger
from distill_bench.draws import generator
from distill_bench.models import Denoiser, Guided, Pipeline, load_pipeline
from distill_bench.noise import student_sigmas, teacher_sigmas
from distill_bench.protocol import protocol, protocol_hash
from distill_bench.rollout import euler, rollout
from distill_bench.store import write_json

BATCH = 16


def sample(run_dir: Path) -> list[Path]:
    """Draw the clips of every kept student into samples/<student_updates>/; returns those folders in order."""
    config, kept = load_run(run_dir), checkpoint.students(run_dir)
    if not kept:
        raise ValueError(f"{run_dir} has no student: train it first (python -m distill_bench.train {run_dir})")
    folders = {run_dir / "samples" / str(updates): path for updates, path in kept.items()}
    missing = {folder: path for folder, path in folders.items() if not (folder / "clips.npy").is_file()}
    if missing:
        sampler = Sampler(config)
        student = sampler.pipeline.student().to(sampler.device)
        for folder, path in missing.items():
            checkpoint.load_student(path, student, config.adapter)
            facts = sampler.facts(student)
            _write(folder, lambda: sampler.student(student), sampler.prompts, sampler.seeds, {"kind": "student"}, facts)
    return list(folders)


def references(config: RunConfig, store: Path) -> dict[str, Path]:
    """The reference rows of a run's protocol, made where they are missing: kind -> folder.

    `data` and `data_other` are rendered clips (only where the prompts are of the embedded domain), `teacher` and
    `teacher_other` the teacher's many-step clips; "other" means other seeds, so that each pair is a floor. `teacher_few` is the
    teacher's ODE at the student's step count, `untrained` the student before training. Three rows are wrong on purpose: `frozen`
    and `shuffled` are the teacher's clips standing still and with their frames out of order, `noise` is uniform noise.
    """
    root = store / "references" / protocol_hash(config)
    few = f"nfe{config.nfe}-{config.stepping}"
    names = {"data": "data", "data_other": "data_other", "teacher": "teacher", "teacher_other": "teacher_other"}
    names |= {"teacher_few": f"teacher_few-nfe{config.nfe}", "untrained": f"untrained-{few}"}
    names |= {kind: kind for kind in ("frozen", "shuffled", "noise")}
    folders = {kind: root / name for kind, name in names.items()}
    if all((folder / "clips.npy").is_file() for folder in folders.values()):
        return folders
    write_json(root / "protocol.json", protocol(config))
    sampler = Sampler(config)
    n = config.protocol.clips
    other = [seed + n for seed in sampler.seeds]
    if not all(map(_in_domain, sampler.prompts)):
        del folders["data"], folders["data_other"]
    steps = config.protocol.teacher_steps
    makers: dict[str, tuple[Callable[[], np.ndarray], list[int]]] = {
        "data": (lambda: _rendered(sampler.prompts, sampler.seeds), sampler.seeds),
        "data_other": (lambda: _rendered(sampler.prompts, other), other),
        "teacher": (lambda: sampler.teacher(steps, sampler.seeds), sampler.seeds),
        "teacher_other": (lambda: sampler.teacher(steps, other), other),
        "teacher_few": (lambda: sampler.teacher(config.nfe, sampler.seeds), sampler.seeds),
        "untrained": (lambda: sampler.student(sampler.pipeline.student().to(sampler.device)), sampler.seeds),
        "frozen": (lambda: controls.frozen(_clips_of(folders["teacher"])), sampler.seeds),
        "shuffled": (lambda: controls.shuffled(_clips_of(folders["teacher"]), config.protocol.seed), sampler.seeds),
        "noise": (sampler.noise, sampler.seeds),
    }
    for kind, folder in folders.items():
        if not (folder / "clips.npy").is_file():
            print(f"reference {kind}: {n} clips", flush=True)
            make, seeds = makers[kind]
            _write(folder, make, sampler.prompts, seeds, {"kind": kind, "protocol": root.name})
    return folders


class Sampler:
    """The prompts, seeds and starting noises of a protocol; every row begins from the same noise."""

    def __init__(self, config: RunConfig) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config, protocol = config, config.protocol
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.pipeline: Pipeline = load_pipeline(config.teacher, self.device)
        self.shape = self.pipeline.latent_shape(config.frames, config.height, config.width)
        known = self.pipeline.prompts()
        order = torch.randperm(len(known), generator=generator("protocol", protocol.seed)).tolist()
        # two clips a prompt: clips of one prompt must differ, and that is scored
        distinct = min(len(known), math.ceil(protocol.clips / 2))
        self.prompts = [known[order[i % distinct]] for i in range(protocol.clips)]
        self.seeds = [protocol.seed + i for i in range(protocol.clips)]
        *texts, null_text = self.pipeline.encode_text([*self.prompts, ""])
        self.text, self.null_text = torch.stack(texts), null_text[None]

    def student(self, net: torch.nn.Module) -> np.ndarray:
        """Frames (N, T, 3, H, W) in the student's own steps, without guidance."""
        config = self.config
        denoiser = Denoiser(net, "student", Ledger(1))
        sigmas = student_sigmas(config.nfe, config.shift).to(self.device)
        return self._clips(
            self.seeds,
            lambda noises, text: rollout(denoiser, noises, sigmas, text, config.stepping),
        )

    def facts(self, net: torch.nn.Module) -> dict[str, np.ndarray]:
        """What the teacher's kind knows exactly of the student's distribution; for a network of unknown density nothing."""
        sigmas = student_sigmas(self.config.nfe, self.config.shift)
        return self.pipeline.facts(net, sigmas, self.config.stepping, self.config.protocol.teacher_guidance)

    def teacher(self, steps: int, seeds: list[int]) -> np.ndarray:
        """Frames (N, T, 3, H, W) by `steps` Euler steps of the guided teacher."""
        teacher = Denoiser(self.pipeline.transformer, "teacher", Ledger(1))
        guided = Guided(teacher, self.null_text, self.config.protocol.teacher_guidance)
        sigmas = teacher_sigmas(steps, self.config.shift).to(self.device)
        return self._clips(seeds, lambda noises, text: euler(guided, noises[0], sigmas, text))

    def noise(self) -> np.ndarray:
        """Uniform noise frames (N, T, 3, H, W): the known-bad row."""
        config, n = self.config, len(self.seeds)
        rng = np.random.default_rng(config.protocol.seed)
        return rng.integers(0, 256, (n, config.frames, 3, config.height, config.width), dtype=np.uint8)

    @torch.no_grad()
    def _clips(self, seeds: list[int], latents: Callable[[list[Tensor], Tensor], Tensor]) -> np.ndarray:
        frames = []
        for at in range(0, len(seeds), BATCH):
            noises = [
                torch.stack([self._noise(seed, step) for seed in seeds[at : at + BATCH]]).to(self.device)
                for step in range(self.config.nfe)
            ]
            frames.append(self.pipeline.decode(latents(noises, self.text[at : at + BATCH])))
        return torch.cat(frames).numpy()

    def _noise(self, seed: int, step: int) -> Tensor:
        return torch.randn(*self.shape, generator=generator("sample", seed, step))


def _clips_of(folder: Path) -> np.ndarray:
    return np.load(folder / "clips.npy", allow_pickle=False)


def _in_domain(prompt: str) -> bool:
    try:
        shapes.parse(prompt)
    except ValueError:
        return False
    return True


def _rendered(prompts: list[str], seeds: list[int]) -> np.ndarray:
    return np.stack([shapes.render(shapes.parse(p), s) for p, s in zip(prompts, seeds, strict=True)])


def _write(
    folder: Path, make: Callable[[], np.ndarray], prompts: list[str], seeds: list[int], row: dict, facts: Mapping = {}
) -> None:  # noqa: B006, E501
    """Write a folder of clips whole or not at all; who comes second finds it done. `facts` are exact arrays beside the frames."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".writing-"))
    try:
        np.save(temporary / "clips.npy", make())
        lines = [{"index": i, "prompt": p, "seed": s} for i, (p, s) in enumerate(zip(prompts, seeds, strict=True))]
        (temporary / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if facts:
            np.savez(temporary / "facts.npz", **facts)
        (temporary / "row.json").write_text(json.dumps(row) + "\n")
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / "clips.npy").is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    """Command line: sample one trained run folder."""
    parser = argparse.ArgumentParser(prog="distill_bench.sample", description=sample.__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run folder with run.yaml and a checkpoint")
    options = parser.parse_args(argv)
    try:
        print(*sample(options.run), sep="\n")
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
