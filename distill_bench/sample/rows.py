"""Samples rows that train nothing, and trained students in further ways.

A further way of a run is requested by `samplings/<name>.yaml` in its folder; its clips, scores and
result are in the folder `samplings/<name>`.
"""

from pathlib import Path

from torch import nn

from distill_bench.config.resolve import load_run
from distill_bench.config.rows.row import TEACHER, UNTRAINED, RowConfig
from distill_bench.config.rows.sampling import Sampling
from distill_bench.config.validation import validate
from distill_bench.config.yaml_files import load_yaml
from distill_bench.sample.released_weights import load_released
from distill_bench.sample.sampler import Sampler
from distill_bench.sample.write_folder import is_written, write_folder
from distill_bench.store.runs import requested_samplings
from distill_bench.teachers.folder import teacher_folder
from distill_bench.train import checkpoint


def sample_row(folder: Path, row: RowConfig) -> Path:
    """Sample a row into samples/0, unless that folder exists; returns it."""
    config = load_run(folder)
    target = folder / "samples" / "0"
    if is_written(target):
        return target
    target.parent.mkdir(exist_ok=True)
    sampler = Sampler(config, folder.parent)
    net: nn.Module | None = None
    if row.network == TEACHER:
        source = sampler.sampled_teacher(row.sampling)
    else:
        if row.network == UNTRAINED:
            net = sampler.placed(sampler.pipeline.student())
        else:
            net = sampler.placed(load_released(Path(row.network), teacher_folder(config.teacher)))
        source = sampler.student(net, row.sampling)
    about = {"kind": row.label, "fps": config.protocol.fps}
    write_folder(target, source, sampler.prompts, sampler.seeds, about)
    return target


def sample_further(run_dir: Path) -> dict[Path, Sampling]:
    """Sample the last kept student of a run in every requested way that has no clips yet.

    Returns:
        Folder of each requested way.
    """
    folders = {
        run_dir / "samplings" / name: validate(Sampling, load_yaml(path), str(path))
        for name, path in requested_samplings(run_dir).items()
    }
    missing = {folder: way for folder, way in folders.items() if not is_written(folder)}
    if missing:
        config = load_run(run_dir)
        students = checkpoint.students(run_dir)
        sampler = Sampler(config, run_dir.parent)
        student = sampler.placed(sampler.pipeline.student())
        checkpoint.load_student(students[max(students)], student, config.adapter)
        for folder, way in missing.items():
            about = {"kind": "student", "fps": config.protocol.fps, "sampling": way.name}
            source = sampler.student(student, way)
            write_folder(folder, source, sampler.prompts, sampler.seeds, about)
    return folders
