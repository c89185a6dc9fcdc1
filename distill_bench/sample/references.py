"""TODO: sample.references."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from distill_bench.config.protocol import protocol, protocol_hash, student_key
from distill_bench.config.schema import RunConfig
from distill_bench.domain import controls, shapes
from distill_bench.networks.pipeline import CLIPS_PER_BATCH
from distill_bench.networks.ranks import ranks
from distill_bench.sample.folder import ClipSource, write_folder
from distill_bench.sample.sampler import Sampler
from distill_bench.store.files import write_json


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
    rows: dict[str, Callable[[], tuple[ClipSource, list[int]]]] = {
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
        kind: (lambda make=make: (ClipSource(lambda *_: make(), n), sampler.seeds))
        for kind, make in whole.items()
    }
    for kind, folder in sorted(
        folders.items(), key=lambda row: row[0] != "untrained"
    ):  # a device holds one network at a time
        if not (folder / "clips.npy").is_file():
            if ranks().first:
                print(f"reference {kind}: {n} clips", flush=True)
            row, seeds = rows[kind]()
            about = {"kind": kind, "protocol": root.name, "fps": config.protocol.fps}
            write_folder(folder, row, sampler.prompts, seeds, about)
    return folders


def _clips_of(folder: Path) -> np.ndarray:
    return np.load(folder / "clips.npy", allow_pickle=False)


def _in_domain(prompt: str) -> bool:
    try:
        shapes.parse(prompt)
    except ValueError:
        return False
    return True


def _rendered(prompts: list[str], seeds: list[int]) -> ClipSource:
    def frames(first: int, end: int) -> np.ndarray:
        pairs = zip(prompts[first:end], seeds[first:end], strict=True)
        return np.stack([shapes.render(shapes.parse(prompt), seed) for prompt, seed in pairs])

    return ClipSource(frames, CLIPS_PER_BATCH)
