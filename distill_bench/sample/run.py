"""TODO: sample.run."""

from pathlib import Path

from distill_bench.config.resolve import load_run
from distill_bench.sample.folder import write_folder
from distill_bench.sample.sampler import Sampler
from distill_bench.train import checkpoint


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
            write_folder(
                folder, sampler.student(student), sampler.prompts, sampler.seeds, row, facts
            )
    return list(folders)
