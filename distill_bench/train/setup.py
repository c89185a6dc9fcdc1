"""Loads teacher, initial student and extra data of a run, and assembles the run."""

from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from distill_bench.config.errors import ConfigError
from distill_bench.config.resolve import load_run, stored_config
from distill_bench.config.schema import RunConfig
from distill_bench.draws import Draws
from distill_bench.method import Method
from distill_bench.networks.adapters import merge_adapter
from distill_bench.networks.pipeline import pipeline_of
from distill_bench.networks.ranks import set_threads
from distill_bench.networks.role_networks import Start
from distill_bench.store.files import write_json
from distill_bench.store.runs import initial_path, read_initial, read_result
from distill_bench.teachers.contents import file_hash
from distill_bench.train import checkpoint
from distill_bench.train.assemble import assemble, check_batch_size
from distill_bench.train.extras import providers
from distill_bench.train.inputs import needs_of
from distill_bench.train.processes import launched
from distill_bench.train.run import Run


def build(
    config: RunConfig,
    store: Path,
    method: Method | None = None,
    draws: type[Draws] = Draws,
) -> Run:
    """Load the teacher and the extra data of a run, and assemble the run at its start.

    Args:
        config: a resolved run.
        store: folder of run folders; embeddings and extra data are cached in it.
        method: the objective; None: the config's.
        draws: class that makes the draws of a batch.

    Raises:
        ValueError: if a file has changed, or the launched processes cannot share the batch.
    """
    set_threads(config.threads)
    processes = launched()
    check_batch_size(config, processes.world)
    pipeline = pipeline_of(config, processes.device, store)
    # before the networks are built, because the teacher may have to make the data
    extras = providers(needs_of(config), config, pipeline, store)
    start = None if config.init_run is None else _start(config, store / config.init_run)
    return assemble(config, pipeline, processes, extras, method, draws, start)


def build_from(run_dir: Path) -> Run:
    """Build the run of a folder with run.yaml, at its start."""
    return build(load_run(run_dir), run_dir.parent)


def record_initial(run_dir: Path) -> None:
    """Record in initial.json which student a run starts from: its content, and its cost.

    Does nothing for a run without `init`.

    Raises:
        ConfigError: if the initial run is not done, or its student differs from the one that it
            ended with, or from the one that this run began with.
    """
    config = load_run(run_dir)
    if config.init_run is None:
        return
    folder = run_dir.parent / config.init_run
    path, result = initial_student(folder), read_result(folder) or {}
    content = file_hash(path)
    if (ended_with := result.get("student_content", content)) != content:
        raise ConfigError(
            f"{path} has changed since {folder.name} ended (content {content}, its result records "
            f"{ended_with}): restore the file, or remove {folder} to train it again"
        )
    began_with = (read_initial(run_dir) or {}).get("content", content)
    if began_with != content and checkpoint.folders(run_dir):
        raise ConfigError(
            f"{path} has changed since {run_dir.name} began (content {began_with}, now {content}): "
            f"restore the file, or remove {run_dir} to start again"
        )
    earlier = read_initial(folder) or {}
    unit = stored_config(folder).batch_size / config.batch_size  # costs are per batch
    record = {
        "run_id": folder.name,
        "content": content,
        "cost_forward_equivalents": unit
        * (result["cost_forward_equivalents"] + earlier.get("cost_forward_equivalents", 0.0)),
        "train_seconds": result["train_seconds"] + earlier.get("train_seconds", 0.0),
    }
    write_json(initial_path(run_dir), record)


def initial_student(folder: Path) -> Path:
    """File of the student that other runs start from: the last that a run has kept.

    It holds the weights that are sampled and scored, of the moving average if there is one.

    Raises:
        ConfigError: if the run is not done.
    """
    result, students = read_result(folder), checkpoint.students(folder)
    if result is None or result["status"] != "done" or not students:
        state = "missing" if result is None else result["status"]
        raise ConfigError(
            f"init {folder.name}: its result is {state}, so there is no student to start from; do "
            f"this run first: distill-bench job {folder}"
        )
    return students[max(students)]


def _start(config: RunConfig, folder: Path) -> Start:
    """Copies the student of the run in a folder into a new student of `config`."""
    path, adapter = initial_student(folder), stored_config(folder).adapter

    def start(student: nn.Module) -> None:
        if config.adapter is None:
            checkpoint.load_student(path, student, adapter)
            if adapter is not None:
                merge_adapter(student).requires_grad_(True)
        else:  # the view of an adapter with the same layers
            student.load_state_dict(load_file(path))

    return start
