"""TODO: sweep.watch."""

import sys
import time
from collections import Counter

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from distill_bench.store.runs import record_outside
from distill_bench.sweep import queue as scheduler
from distill_bench.sweep import status
from distill_bench.sweep import workers as local
from distill_bench.sweep.manifest import OpenSweep
from distill_bench.sweep.queue import Queue, SchedulerError
from distill_bench.sweep.status import ENDED, WAITING, read_statuses

STOPPED = 3  # how a worker process ends that saved on request: `job.STOPPED`, without torch


QUIET_SECONDS = 60.0  # without a running run, until --watch takes a local sweep for ended


console = Console(
    highlight=False, width=None if sys.stdout.isatty() else 200
)  # a log has no width of its own


def wait(sweep: OpenSweep, seconds: float = 5.0) -> None:
    """Stay until no run is waiting or running; a live table in a terminal, a line at each change elsewhere."""
    said = ""
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            try:
                statuses = read_statuses(
                    sweep.store, sweep.known, scheduler.read_queue(sweep.store)
                )
            except SchedulerError as error:  # it comes back; the runs do not need this process
                console.print(f"{time.strftime('%H:%M:%S')} {error}; waiting", markup=False)
                time.sleep(30)
                continue
            line = status.counts(statuses)
            if console.is_terminal:
                live.update(status.as_table(statuses), refresh=True)
            elif line != said:
                console.print(f"{time.strftime('%H:%M:%S')} {line}")
            said = line
            if not any(s.state in WAITING for s in statuses):
                return
            time.sleep(seconds)


class Board:
    """Progress of local runs: a rich bar in a terminal, a line at each start and end elsewhere."""

    def __init__(self, sweep: OpenSweep, jobs: int, processes: int = 1) -> None:
        self.sweep, self.bar = sweep, None
        self.total = sum(config.student_updates for config in sweep.runs.values())
        if console.is_terminal:
            columns = (
                TextColumn("student updates"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=console)
            self.task = self.bar.add_task("runs", total=self.total)
        each = f", each by {processes} processes" if processes > 1 else ""
        console.print(f"{len(sweep.runs)} runs, {jobs} at once on this machine{each}")

    def __enter__(self) -> "Board":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def __call__(self) -> None:
        """Called now and then."""
        if self.bar:
            statuses = read_statuses(self.sweep.store, self.sweep.known, Queue())
            self.bar.update(
                self.task,
                completed=sum(s.of if s.state in ENDED else s.student_updates for s in statuses),
            )

    def changed(self, task: local.Task) -> None:
        """A worker process started or ended."""
        run, clock, store = task.name, time.strftime("%H:%M:%S"), self.sweep.store
        if task.error is not None and run in self.sweep.runs:
            record_outside(store / run, error=task.error, kind="not_started")
        if task.code is None:
            console.print(f"{clock} start {run}")
        elif run not in self.sweep.runs:
            ended = {0: "done", STOPPED: "stopped"}.get(
                task.code, f"[red]failed[/red] (log: {task.log})"
            )
            console.print(f"{clock} {ended} {run}")
        else:
            (s,) = read_statuses(store, {run: self.sweep.known[run]}, Queue())
            ended = Counter(self.sweep.states().values())
            why = (
                f"one of its processes was killed by signal {-task.code}"
                if task.processes > 1 and task.code < 0
                else s.note
            )
            note = "" if s.state in ("done", "running") else f" ({why}; log: {s.log or task.log})"
            count = ended["done"] + ended["collapsed"] + ended["failed"]
            console.print(
                f"{clock} {s.state} {run}{note} [{count}/{len(self.sweep.runs)}]", markup=False
            )


def print_table(sweep: OpenSweep) -> None:
    """The headline table."""
    from distill_bench.report.results import COSTS, load
    from distill_bench.report.tables.scores import score_table

    results = load(sweep.out / sweep.config.name)
    found = score_table(results, results.headline + COSTS[:1])
    table = Table(*found.heads, box=None, pad_edge=False)
    for _, line in found.lines:
        table.add_row(*(cell.text for cell in line))
    console.print(table)
