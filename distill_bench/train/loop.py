"""The only training loop: one student update, then its fake-score updates, until the end.

`python -m distill_bench.train RUN_FOLDER` trains the run that RUN_FOLDER/run.yaml describes. The
loop does not depend on methods or settings: `distill_bench.train.setup` turns them into objects.
"""

import time
from collections.abc import Callable
from pathlib import Path

from distill_bench.config.resolve import load_run
from distill_bench.networks.ranks import ranks
from distill_bench.store.files import read_record
from distill_bench.train.phase import Collapsed
from distill_bench.train.records import Records
from distill_bench.train.run import Run
from distill_bench.train.setup import build, record_initial


def train(run_dir: Path, stop: Callable[[], bool] = lambda: False) -> dict:
    """Train a run from its newest checkpoint to its end, or until `stop()` is true after an update.

    Writes train.jsonl, checkpoints/, students/ and train.json, whose content is returned: cost,
    seconds, peak memory and `status` "done", "collapsed" (with a `reason`) or "stopped" (train
    again to go on).
    """
    summary = ended(run_dir)
    if summary is not None:
        return summary
    if ranks().first:
        record_initial(run_dir)
    run = build(load_run(run_dir), run_dir.parent)
    records = Records(run, run_dir)
    records.resume()
    return finish(run, records, stop)


def finish(run: Run, records: Records, stop: Callable[[], bool] = lambda: False) -> dict:
    """Train an already built run to its end, or until `stop()`; returns the summary."""
    try:
        with records:
            while run.student_updates < run.config.student_updates:
                began = time.perf_counter()
                update(run)
                run.seconds += time.perf_counter() - began
                if records.write(stop):
                    return records.end("stopped")
    except Collapsed as error:
        records.save()
        return records.end("collapsed", f"{error} at student update {run.student_updates}")
    return records.end("done")


def update(run: Run) -> None:
    """Make one student update and its fake-score updates."""
    kept = run.update_student()
    run.after_student_update()
    for index, samples in enumerate(run.fake_score_samples(kept)):
        run.update_fake_score(index, samples)
    run.student_updates += 1


def ended(run_dir: Path) -> dict | None:
    """The summary of a training that is done or collapsed; None if the training is unfinished."""
    summary = read_record(run_dir / "train.json", status=str)
    return summary if summary is not None and summary["status"] != "stopped" else None
