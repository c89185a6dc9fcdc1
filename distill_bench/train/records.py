"""The records of a training: train.jsonl, checkpoints/, students/, train.json and trackers."""

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Self

import torch
from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from distill_bench.config.resolve import evaluated_updates
from distill_bench.networks.sharding import whole
from distill_bench.store.files import append_jsonl, read_jsonl, write_bytes, write_json
from distill_bench.train import checkpoint
from distill_bench.train.run import Run
from distill_bench.train.signals import signals_of


class Records:
    """Writes the records of a run: rank 0 writes files, the other ranks join collectives.

    As a context manager, it shows the progress of training.
    """

    def __init__(self, run: Run, run_dir: Path) -> None:
        self.run = run
        self.run_dir = run_dir
        self.writes = run.processes.rank == 0
        self.evaluated = set(evaluated_updates(run.config))
        self.progress = TrainingProgress(run.config.student_updates, shown=self.writes)
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            log_with=list(run.config.trackers) or None,
            project_dir=run_dir / "tracking",
        )
        self.accelerator.init_trackers("train")

    def __enter__(self) -> Self:
        self.progress.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.__exit__(*exception)

    def write(self, stop: Callable[[], bool]) -> bool:
        """Write the records due after an update; returns True if training should stop early."""
        run, config = self.run, self.run.config
        at_end = run.student_updates == config.student_updates
        stopping = not at_end and run.processes.any(stop())
        if at_end or run.student_updates % config.log_every == 0:
            self.progress(self.log())
        if run.student_updates in self.evaluated:
            self.save_student()
        if at_end or stopping or run.student_updates % config.checkpoint_every == 0:
            self.save()
        return stopping

    def log(self) -> dict:
        """Append the newest scalars to train.jsonl and to the trackers; returns the line."""
        run, config = self.run, self.run.config
        signals = {}
        if config.signals_every and run.student_updates % config.signals_every == 0:
            signals = signals_of(run)
        scalars = {name: float(value) for name, value in run.scalars.items()}
        if config.fake_score_updates is not None:
            # ratio of the time scales: a step of Adam moves a weight by about its learning rate
            scalars["rho"] = config.fake_score_updates * config.fake_score_lr / config.student_lr
        line = {
            "student_updates": run.student_updates,
            "seconds": round(run.seconds, 3),
            "cost_forward_equivalents": run.ledger.forward_equivalents(),
            **scalars,
            **signals,
        }
        if self.writes:
            append_jsonl(self.run_dir / "train.jsonl", line)
        self.accelerator.log(scalars | signals, step=run.student_updates)
        return line

    def save(self) -> None:
        """Write checkpoints/<student_updates>/ atomically and prune all but the two newest.

        Raises:
            RuntimeError: if ranks have different weights.
        """
        run = self.run
        self.check_ranks()
        state = {
            "student_updates": run.student_updates,
            "seconds": run.seconds,
            "cost": run.ledger.counts,
        }
        checkpoint.save(
            self.run_dir,
            run.student_updates,
            run.trained,
            run.average.weights,
            run.optimisers,
            state,
            self.writes,
        )
        run.processes.wait()

    def save_student(self) -> None:
        """Write the weights to sample from to students/<student_updates>.safetensors."""
        weights = self.run.average.sampled()
        checkpoint.save_student(self.run_dir, self.run.student_updates, weights, self.writes)

    def resume(self) -> None:
        """Continue from the newest sound checkpoint, if any, and cut train.jsonl back to it."""
        run = self.run
        state = checkpoint.load(self.run_dir, run.trained, run.average.weights, run.optimisers)
        if state is not None:
            run.student_updates = state["student_updates"]
            run.seconds = state["seconds"]
            run.ledger.counts = state["cost"]
        self.check_ranks()
        path = self.run_dir / "train.jsonl"
        if path.exists() and self.writes:
            lines = [
                line for line in read_jsonl(path) if line["student_updates"] <= run.student_updates
            ]
            write_bytes(path, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def check_ranks(self) -> None:
        """Check that all ranks are at the same update and have the same weights.

        Raises:
            RuntimeError: if they differ; it names the roles.
        """
        if self.run.processes.world == 1:
            return
        state = {"student_updates": self.run.student_updates}
        for role, net in self.run.trained.items():
            state[role] = sum(float(whole(p.detach()).double().sum()) for p in net.parameters())
        unequal = self.run.processes.unequal(state)
        if unequal:
            raise RuntimeError(f"ranks have different values of: {', '.join(unequal)}")

    def end(self, status: str, reason: str | None = None) -> dict:
        """Write train.json and close the trackers; returns the summary."""
        summary = self.summary() | {"status": status, "reason": reason}
        if self.writes:
            write_json(self.run_dir / "train.json", summary)
        self.accelerator.end_training()
        return summary

    def summary(self) -> dict:
        """Updates, seconds, cost by role and peak memory, for the tables."""
        run = self.run
        if run.processes.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**30
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return {
            "student_updates": run.student_updates,
            "train_seconds": round(run.seconds, 3),
            "cost_forward_equivalents": run.ledger.forward_equivalents(),
            "cost": run.ledger.counts,
            "peak_memory_gib": round(peak, 3),
            "samples_seen": run.student_updates * run.config.batch_size,
        }


class TrainingProgress:
    """A progress bar in a terminal, elsewhere one line per log entry."""

    def __init__(self, student_updates: int, shown: bool) -> None:
        self.student_updates = student_updates
        self.shown = shown
        self.bar: Progress | None = None
        if shown and sys.stderr.isatty():
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(TextColumn("student updates"), *columns, transient=True)

    def __enter__(self) -> Self:
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task("train", total=self.student_updates)
        return self

    def __call__(self, line: dict) -> None:
        """Show an entry of train.jsonl."""
        if self.bar is not None:
            self.bar.update(self.task, completed=line["student_updates"])
        elif self.shown:
            values = "  ".join(f"{k} {v:.4g}" for k, v in line.items() if k != "student_updates")
            done = f"{line['student_updates']}/{self.student_updates}"
            print(f"student update {done}  {values}", flush=True)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
