"""Makes the reference rows of a protocol: clips that the clips of every run are compared with."""

from pathlib import Path

import numpy as np

from distill_bench.config.protocol import protocol, protocol_hash, student_key
from distill_bench.config.schema import RunConfig
from distill_bench.domain import controls
from distill_bench.networks.ranks import ranks
from distill_bench.sample.reference_kinds import CONTROL, role_of
from distill_bench.sample.sampler import Sampler
from distill_bench.sample.write_folder import ClipSource, is_written, write_folder
from distill_bench.store.files import write_json


def references(config: RunConfig, store: Path) -> dict[str, Path]:
    """Folders of the reference rows by kind (see `roles`); missing rows are made first.

    All rows have the prompts of the protocol. `data` and `data_other` exist only if the teacher has
    real clips of the prompts, and `equalised` only if the teacher can make it.
    """
    root = store / "references" / protocol_hash(config)
    folders = {kind: root / name for kind, name in folder_names(config).items()}
    if all(map(is_written, folders.values())):
        return folders
    write_json(root / "protocol.json", protocol(config))
    sampler = Sampler(config, store)
    if not sampler.pipeline.has_clips(sampler.prompts):
        del folders["data"], folders["data_other"]
    damage = {**controls.CONTROL_ROWS, **sampler.pipeline.controls(sampler.prompts)}
    folders = {
        kind: folder
        for kind, folder in folders.items()
        if role_of(kind) != CONTROL or kind in damage
    }
    # the untrained student first, so that the device holds only one network at a time
    for kind in sorted(folders, key=lambda kind: kind != "untrained"):
        folder = folders[kind]
        if is_written(folder):
            continue
        if ranks().first:
            print(f"reference {kind}: {config.protocol.clips} clips", flush=True)
        if kind in damage:
            source, seeds = _damaged(damage[kind], folders["teacher"], sampler), sampler.seeds
        else:
            source, seeds = _source(kind, sampler)
        row = {"kind": kind, "protocol": root.name, "fps": config.protocol.fps}
        write_folder(folder, source, sampler.prompts, seeds, row)
    return folders


def folder_names(config: RunConfig) -> dict[str, str]:
    """Kind of each reference row -> name of its folder, in the order of the tables."""
    return {
        "data": "data",
        "data_other": "data_other",
        "teacher": "teacher",
        "teacher_other": "teacher_other",
        # these two also depend on settings of the run outside the protocol
        "teacher_few": f"teacher_few-nfe{config.nfe}",
        "untrained": f"untrained-{student_key(config)}",
        "equalised": "equalised",
    } | {kind: kind for kind in controls.CONTROL_ROWS}


def _damaged(damage: controls.Damage, teacher: Path, sampler: Sampler) -> ClipSource:
    """Clips of the folder `teacher`, damaged all at once."""

    def frames(first: int, end: int) -> np.ndarray:
        clips = np.load(teacher / "clips.npy", allow_pickle=False)
        return damage(clips, sampler.config.protocol.seed)

    return ClipSource(frames, len(sampler.seeds), facts=sampler.facts())


def _source(kind: str, sampler: Sampler) -> tuple[ClipSource, list[int]]:
    """Source and seeds of a reference row that is no control."""
    config, seeds = sampler.config, sampler.seeds
    other_seeds = [max(seeds) + 1 + i for i in range(len(seeds))]
    steps = config.protocol.teacher_steps
    match kind:
        case "data":
            return sampler.data(seeds), seeds
        case "data_other":
            return sampler.data(other_seeds), other_seeds
        case "teacher":
            return sampler.teacher(steps, seeds), seeds
        case "teacher_other":
            return sampler.teacher(steps, other_seeds), other_seeds
        case "teacher_few":
            return sampler.teacher(config.nfe, seeds), seeds
        case "untrained":
            return sampler.student(sampler.placed(sampler.pipeline.student())), seeds
    raise AssertionError(f"no source for the reference row {kind!r}")
