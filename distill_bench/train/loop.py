"""TODO: train.loop."""

import time
from collections.abc import Callable
from pathlib import Path

from distill_bench.config.resolve import evaluated_updates
from distill_bench.store.files import read_json, write_json
from distill_bench.train.progress import Progress_
from distill_bench.train.trainer import Collapsed, Trainer


def train(run_dir: Path, stop: Callable[[], bool] = lambda: False) -> dict:
    """Train the run in `run_dir` to its end, or until `stop()` is true at the end of an update, and return its summary.

    Writes train.jsonl, checkpoints/, students/ and train.json. The summary has `status` "done", "collapsed" (with `reason`) or
    "stopped" (checkpointed; train again to go on).
    """
    summary = read_json(run_dir / "train.json")
    if summary is not None and summary["status"] != "stopped":
        return summary
    trainer = Trainer(run_dir)
    trainer.resume()
    config, status, reason = trainer.config, "done", None
    evaluated = set(evaluated_updates(config))
    try:
        with Progress_(trainer.accelerator.is_main_process) as report:
            while trainer.student_updates < config.student_updates:
                began = time.perf_counter()
                samples = trainer.update_student()
                trainer.after_student_update()
                for index in range(config.fake_score_updates or 0):
                    trainer.update_fake_score(
                        index, samples if config.reuse_rollout and index == 0 else None
                    )
                trainer.student_updates += 1
                trainer.seconds += time.perf_counter() - began

                at_end = trainer.student_updates == config.student_updates
                stopping = not at_end and trainer.any_rank(stop())
                if at_end or trainer.student_updates % config.log_every == 0:
                    report(trainer.log(), config.student_updates)
                if trainer.student_updates in evaluated:
                    trainer.save_student()
                if at_end or stopping or trainer.student_updates % config.checkpoint_every == 0:
                    trainer.save()
                if stopping:
                    status = "stopped"
                    break
    except Collapsed as error:
        status, reason = "collapsed", f"{error} at student update {trainer.student_updates}"
        trainer.save()
    summary = trainer.summary() | {"status": status, "reason": reason}
    if trainer.accelerator.is_main_process:
        write_json(run_dir / "train.json", summary)
    trainer.accelerator.end_training()
    return summary
