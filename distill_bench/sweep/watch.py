"""Terminal output while a sweep runs: --status and --watch, --wait, and the board of local runs."""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from distill_bench.store.runs import record_error
from distill_bench.sweep.local.workers import DONE, STOPPED, Task
from distill_bench.sweep.manifest import OpenSweep
from distill_bench.sweep.slurm.queue import Queue, SchedulerError, read_queue
from distill_bench.sweep.status import (
    ENDED,
    TO_LAUNCH,
    WAITING,
    ManifestEntry,
    Status,
    count_states,
    exit_code,
    read_statuses,
    status_json,
    status_table,
)

QUIET_SECONDS = 60.0  # without a running run, after which --watch takes a local sweep as ended

LONG = 500  # lines of a table up to which Rich prints it

# without a terminal, use a fixed width
WIDTH = None if sys.stdout.isatty() else 200
console = Console(highlight=False, markup=False, emoji=False, width=WIDTH)


def print_rows(table: Table) -> None:
    """Print a table; Rich takes a millisecond per line, so a long table becomes plain lines."""
    if table.row_count <= LONG:
        console.print(table)
        return
    columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    widths = [max(map(cell_len, cells)) for cells in columns]
    lines = [
        "  ".join(set_cell_size(cell, width) for cell, width in zip(line, widths, strict=True))
        for line in zip(*columns, strict=True)
    ]
    console.out("\n".join(line.rstrip() for line in lines), highlight=False)


def print_statuses(statuses: Sequence[Status]) -> None:
    """Print the table of --status."""
    print_rows(status_table(statuses))


def warn(message: str) -> None:
    """Print a warning."""
    console.print(Text.assemble(("warning", "yellow"), f": {message}"))


def show_status(
    store: Path,
    entries: Mapping[str, ManifestEntry],
    on_slurm: bool,
    every: float | None = None,
    as_json: bool = False,
) -> int:
    """Print the status of the runs; with `every`, repeat until no run is waiting or running.

    Args:
        every: seconds between two prints; None prints once.

    Returns:
        The exit code of --status.
    """
    queue = read_queue(store, on_slurm)
    active = time.monotonic()
    while True:
        statuses = read_statuses(store, entries, queue)
        if as_json:
            print(status_json(statuses))
        else:
            print_statuses(statuses)
            console.print(count_states(statuses))
        states = {s.state for s in statuses}
        if states & set(WAITING):
            active = time.monotonic()
        # a local driver takes seconds from one run to the next
        patience = QUIET_SECONDS if states & set(TO_LAUNCH) and not on_slurm else 0
        quiet = not states & set(WAITING) and time.monotonic() - active >= patience
        if every is None or quiet:
            return exit_code(statuses)
        time.sleep(every)
        queue = reread_queue(queue, store, on_slurm)


def reread_queue(previous: Queue, store: Path, on_slurm: bool) -> Queue:
    """Read the queue; return `previous` if SLURM does not answer."""
    try:
        return read_queue(store, on_slurm)
    except SchedulerError as error:
        print(f"{time.strftime('%H:%M:%S')} {error}", file=sys.stderr, flush=True)
        return previous


def wait_for_jobs(sweep: OpenSweep, seconds: float = 5.0) -> None:
    """Wait until no run is waiting or running on SLURM.

    Shows a live table in a terminal and prints one line per change elsewhere.
    """
    printed = ""
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            try:
                statuses = read_statuses(sweep.store, sweep.entries, read_queue(sweep.store))
            except SchedulerError as error:  # the jobs go on without this process
                console.print(f"{time.strftime('%H:%M:%S')} {error}; waiting")
                time.sleep(30)
                continue
            line = count_states(statuses)
            if console.is_terminal:
                live.update(status_table(statuses[: console.height]), refresh=True)
            elif line != printed:
                console.print(f"{time.strftime('%H:%M:%S')} {line}")
            printed = line
            if not any(s.state in WAITING for s in statuses):
                return
            time.sleep(seconds)


class ProgressBoard:
    """Progress of local runs: a bar in a terminal, one line at each start and end of a worker."""

    def __init__(self, sweep: OpenSweep, jobs: int, processes: int = 1) -> None:
        self.sweep = sweep
        self.statuses: dict[str, Status] = {}
        self.next_reading = 0.0
        self.bar = None
        if console.is_terminal:
            columns = (TextColumn("student updates"), BarColumn(), MofNCompleteColumn())
            self.bar = Progress(*columns, TimeRemainingColumn(), console=console)
            total = sum(entry.student_updates for entry in sweep.entries.values())
            self.task = self.bar.add_task("runs", total=total)
        together = f", {processes} processes per run" if processes > 1 else ""
        console.print(f"{work_in_words(sweep)}, {jobs} at once on this machine{together}")

    def __enter__(self) -> "ProgressBoard":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def update(self) -> None:
        """Move the bar to the student updates done so far."""
        if self.bar:
            statuses = self._statuses().values()
            done = sum(s.of if s.state in ENDED else s.student_updates for s in statuses)
            self.bar.update(self.task, completed=done)

    def _statuses(self) -> dict[str, Status]:
        """Statuses of all runs, read anew as often as that takes a twentieth of the time.

        Ten thousand take seconds, and one of them ends every few seconds.
        """
        began = time.monotonic()
        if began >= self.next_reading:
            statuses = read_statuses(self.sweep.store, self.sweep.entries, Queue())
            self.statuses = {s.run: s for s in statuses}
            now = time.monotonic()
            self.next_reading = now + 19 * (now - began)
        return self.statuses

    def changed(self, task: Task) -> None:
        """Print that a worker started or ended."""
        is_run = task.name in self.sweep.entries
        if task.error is not None and is_run:
            record_error(self.sweep.store / task.name, task.error, "not_started")
        if task.exit_code is None:
            line = f"start {task.name}"
        elif is_run:
            line = self._run_ended(task)
        else:
            names = {DONE: "done", STOPPED: "stopped"}
            line = f"{names.get(task.exit_code, f'failed (log: {task.log})')} {task.name}"
        console.print(f"{time.strftime('%H:%M:%S')} {line}")

    def _run_ended(self, task: Task) -> str:
        """Line for a run whose worker ended: state, reason, log, number of ended runs."""
        run = task.name
        (s,) = read_statuses(self.sweep.store, {run: self.sweep.entries[run]}, Queue())
        reason = s.note
        if task.processes > 1 and task.exit_code < 0:
            reason = f"one of its processes was killed by signal {-task.exit_code}"
        note = "" if s.state in ("done", "running") else f" ({reason}; log: {s.log or task.log})"
        statuses = self._statuses()
        statuses[run] = s
        ended = sum(other.state in (*ENDED, "failed") for other in statuses.values())
        return f"{s.state} {run}{note} [{ended}/{len(self.sweep.entries)}]"


def work_in_words(sweep: OpenSweep) -> str:
    """Number of runs, of further samplings and of rows that train nothing, in words."""
    further = sum(map(len, sweep.samplings.values()))
    words = [f"{len(sweep.runs)} runs"]
    words += [f"{further} further samplings of their students"] if further else []
    words += [f"{len(sweep.rows)} rows that train nothing"] if sweep.rows else []
    return ", ".join(words)


def print_table(sweep: OpenSweep) -> None:
    """Print the declared contrasts and the headline table of the sweep's results."""
    from distill_bench.report.results import COSTS, load  # pandas takes a second
    from distill_bench.report.tables.contrasts import contrast_heads, contrast_lines, estimates
    from distill_bench.report.tables.scores import score_table

    results = load(sweep.out / sweep.config.name)
    if found := estimates(results):
        contrasts = Table(*contrast_heads(found), box=None, pad_edge=False)
        for line in contrast_lines(found):
            contrasts.add_row(*(cell.text for cell in line))
        console.print(contrasts, "")
    scores = score_table(results, results.headline + COSTS[:1])
    table = Table(*scores.heads, box=None, pad_edge=False)
    for _, line in scores.lines:
        table.add_row(*(cell.text for cell in line))
    console.print(table)
