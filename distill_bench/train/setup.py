"""Loads the teacher and the extra data of a run, and assembles the run."""

from pathlib import Path

from distill_bench.config.resolve import load_run
from distill_bench.config.schema import RunConfig
from distill_bench.draws import Draws
from distill_bench.method import Method
from distill_bench.networks.pipeline import pipeline_of
from distill_bench.networks.ranks import set_threads
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
    return assemble(config, pipeline, processes, extras, method, draws)


def build_from(run_dir: Path) -> Run:
    """Build the run of a folder with run.yaml, at its start."""
    return build(load_run(run_dir), run_dir.parent)
