"""Samples the clips of a run's kept students."""

from pathlib import Path

from distill_bench.config.resolve import load_run
from distill_bench.sample.sampler import Sampler
from distill_bench.sample.write_folder import write_folder
from distill_bench.train import checkpoint


def sample(run_dir: Path) -> list[Path]:
    """Sample every kept student into samples/<student_updates>/, unless that folder exists.

    Returns:
        The folders, in the order of student updates.

    Raises:
        ValueError: if the run has kept no student.
    """
    config = load_run(run_dir)
    students = checkpoint.students(run_dir)
    if not students:
        raise ValueError(
            f"{run_dir} has no student; train it first: python -m distill_bench.train {run_dir}"
        )
    (run_dir / "samples").mkdir(exist_ok=True)
    folders = {run_dir / "samples" / str(updates): path for updates, path in students.items()}
    missing = {
        folder: path for folder, path in folders.items() if not (folder / "clips.npy").is_file()
    }
    if missing:
        sampler = Sampler(config, run_dir.parent)
        student = sampler.placed(sampler.pipeline.student())
        row = {"kind": "student", "fps": config.protocol.fps}
        for folder, path in missing.items():
            checkpoint.load_student(path, student, config.adapter)
            source = sampler.student(student)
            write_folder(folder, source, sampler.prompts, sampler.seeds, row)
    return list(folders)
