"""Write a student's clips as VBench reads them: `{prompt}-{number}.mp4` in one folder.

VBench@45e79ec, README and vbench/__init__.py: five clips per prompt, numbered from 0, and the
prompts of its `vbench_full_info.json`.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from distill_bench.config.resolve import load_run
from distill_bench.networks.ranks import ranks
from distill_bench.sample.clip_files import write_video
from distill_bench.sample.sampler import Sampler
from distill_bench.store.files import unwritable
from distill_bench.store.progress import tracked
from distill_bench.teachers.prompts import read_prompts
from distill_bench.train import checkpoint

CLIPS_PER_PROMPT = 5
NAME_BYTES = 255  # of a file name on common file systems


def sample_for_vbench(
    run_dir: Path, folder: Path, prompts: Path, per_prompt: int = CLIPS_PER_PROMPT
) -> list[Path]:
    """Sample the last student of a run for every prompt of a file; existing clips are kept.

    Clip i of prompt p has the seed `protocol.seed` + p * per_prompt + i. Clips play at the
    teacher's frame rate. Ranks share the clips.

    Args:
        prompts: a file of prompts, for instance VBench's `vbench_full_info.json`.

    Returns:
        The files, in the order of prompts and numbers.

    Raises:
        ValueError: if the run has no student, a prompt cannot name a file, or PyAV is missing.
    """
    config, students = load_run(run_dir), checkpoint.students(run_dir)
    if not students:
        raise ValueError(
            f"{run_dir} has no student; train it first: python -m distill_bench.train {run_dir}"
        )
    if importlib.util.find_spec("av") is None:
        raise ValueError("writing mp4 needs PyAV: pip install 'distill-bench[video]'")
    if per_prompt < 1:
        raise ValueError(f"--clips-per-prompt {per_prompt}: at least 1 is needed")
    listed = list(dict.fromkeys(read_prompts(prompts)))
    names = clip_names(listed, per_prompt)
    folder.mkdir(parents=True, exist_ok=True)
    if (reason := unwritable(folder)) is not None:
        raise ValueError(f"cannot write into {folder}: {reason}")
    sampler = Sampler(
        config, run_dir.parent, prompts=[prompt for prompt in listed for _ in range(per_prompt)]
    )
    student = sampler.placed(sampler.pipeline.student())
    checkpoint.load_student(students[max(students)], student, config.adapter)
    source, files = sampler.student(student), [folder / name for name in names]
    fps = sampler.pipeline.fps or config.protocol.fps
    here = ranks()
    firsts = range(0, len(files), source.batch_size)[here.rank :: here.world]
    for first in tracked(firsts, "clips for VBench", here.first):
        batch = files[first : first + source.batch_size]
        if all(file.is_file() for file in batch):
            continue
        for file, frames in zip(batch, source.frames(first, first + len(batch)), strict=True):
            if file.is_file():
                continue
            partial = folder / f".{here.rank}.mp4"
            write_video(partial, frames, fps)
            partial.rename(file)  # a killed command leaves no broken clip
    return files


def clip_names(prompts: Sequence[str], per_prompt: int) -> list[str]:
    """File names of the clips of different prompts, in order.

    Raises:
        ValueError: for a prompt that cannot name a file.
    """
    for prompt in prompts:
        if "/" in prompt or prompt.startswith("."):
            raise ValueError(
                f"prompt {prompt[:60]!r} cannot name a file: it has / or begins with ."
            )
        if len(f"{prompt}-{per_prompt - 1}.mp4".encode()) > NAME_BYTES:
            raise ValueError(
                f"prompt {prompt[:60]!r}... is too long to name a file ({NAME_BYTES} bytes); "
                "VBench names clips by its own prompts, which are shorter"
            )
    return [f"{prompt}-{number}.mp4" for prompt in prompts for number in range(per_prompt)]
