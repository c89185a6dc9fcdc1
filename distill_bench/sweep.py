"""A sweep from its YAML to its tables: expand, hash, launch what is not done, report.

    python -m distill_bench.sweep sweeps/quick.yaml

Runs go to SLURM where `sbatch` is, else to worker processes on this machine. Started again it goes on where it was: a run's
state is read from its folder, so nothing that is done, here or in another sweep, is done again.
"""

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from distill_bench import local, slurm
from distill_bench.config import ConfigError, RunConfig, SweepConfig, load_sweep, load_yaml, lookup, parse_yaml, run_id
from distill_bench.registry import RegistryError
from distill_bench.report import ReportError, report
from distill_bench.results import COSTS, load, show
from distill_bench.store import attempts, read_json, read_jsonl, state, write_bytes, write_json
from distill_bench.tables import table as score_table

TRIES = 3  # of a run whose worker process died, in one call
TO_LAUNCH = ("missing", "lost")
console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)  # a log has no width of its own


@dataclass(frozen=True)
class Sweep:
    """A sweep file laid over a store: its runs by id."""

    config: SweepConfig
    runs: dict[str, RunConfig]
    store: Path
    out: Path

    @property
    def manifest(self) -> Path:
        return self.store / "sweeps" / f"{self.config.name}.json"

    def states(self, queued: set[str] = frozenset()) -> dict[str, str]:
        """Every run's state, from its folder and what is in the scheduler's queue."""
        return {run: state(self.store / run, run in queued) for run in self.runs}

    def write(self) -> None:
        """Write run.yaml into every run folder that lacks one, and the sweep's manifest."""
        for run, config in self.runs.items():
            path = self.store / run / "run.yaml"
            if not path.is_file():
                write_bytes(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode())
        results = [result for run in self.runs if (result := read_json(self.store / run / "result.json"))]
        references = {kind: folder for result in results for kind, folder in result["references"].items()}
        manifest = {"name": self.config.name, "question": self.config.question, "axes": self.config.axes()}
        write_json(self.manifest, manifest | {"run_ids": list(self.runs), "references": references})


def open_sweep(path: Path, overrides: Mapping[str, Any], store: Path, out: Path) -> Sweep:
    """A sweep file, expanded.

    Raises:
        ConfigError: for bad input, or where the store or the output folder cannot be written.
    """
    config = load_sweep(path, overrides)
    runs = {run_id(run): run for run in config.expand()}
    for folder in (store, out):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ConfigError(f"cannot write into {folder}: {error.strerror}") from error
    return Sweep(config, runs, store, out)


# --- launching ---


def run_local(sweep: Sweep, jobs: int, retry_failed: bool) -> None:
    """Do every run that is not done in worker processes of this machine; returns when none is left to do."""
    tries: Counter[str] = Counter()
    launch = (*TO_LAUNCH, "failed") if retry_failed else TO_LAUNCH
    with _Board(sweep, jobs) as board:
        while True:
            states = sweep.states()
            todo = [run for run, now in states.items() if now in launch and tries[run] < TRIES]
            launch = TO_LAUNCH  # what fails in this call is not tried again
            if todo:
                tries.update(todo)
                local.run_queue([*_preparations(sweep, todo), *(_task(sweep, run) for run in todo)], jobs, board.changed, board)
            elif "running" in states.values():
                time.sleep(1)  # another process has them; should it die, they are taken over
                board()
            else:
                return


def _task(sweep: Sweep, run: str) -> local.Task:
    folder = sweep.store / run
    return local.Task(run, local.python("distill_bench.job", str(folder)), folder / "log.txt")


def _preparations(sweep: Sweep, todo: list[str]) -> list[local.Task]:
    """A task for each set of reference rows that the runs need: first in the queue, so that no run waits for them long."""
    from distill_bench.sample import protocol_hash

    first = {}
    for run in todo:
        config = sweep.runs[run]
        first.setdefault((protocol_hash(config), config.nfe, config.stepping), run)
    return [
        local.Task(
            f"references {key[0]}",
            local.python("distill_bench.job", "--prepare", str(sweep.store / run)),
            sweep.store / "references" / key[0] / "log.txt",
        )
        for key, run in first.items()
    ]


def run_debug(sweep: Sweep, retry_failed: bool) -> None:
    """Do every run that is not done in this process, one after the other."""
    from distill_bench.job import execute

    launch = (*TO_LAUNCH, "failed") if retry_failed else TO_LAUNCH
    for run, now in sweep.states().items():
        if now in launch:
            console.print(f"[bold]{run}[/bold]")
            execute(sweep.store / run)


def run_slurm(sweep: Sweep, retry_failed: bool) -> None:
    """Submit every run that is not done as one array, and return."""
    states = sweep.states(slurm.queued_runs(sweep.store))
    launch = (*TO_LAUNCH, "failed") if retry_failed else TO_LAUNCH
    todo = [run for run, now in states.items() if now in launch]
    if not todo:
        console.print("nothing to submit")
        return
    ids = slurm.submit([sweep.store / run for run in todo], sweep.config.cluster, sweep.store)
    console.print(f"submitted {len(ids)} runs as {ids[0]} ... {ids[-1]}; watch: squeue --me, or this command with --status")


class _Board:
    """Progress of local runs: a rich bar in a terminal, a line at each start and end elsewhere."""

    def __init__(self, sweep: Sweep, jobs: int) -> None:
        self.sweep, self.bar = sweep, None
        self.total = sum(config.student_updates for config in sweep.runs.values())
        if console.is_terminal:
            columns = (TextColumn("student updates"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=console)
            self.task = self.bar.add_task("runs", total=self.total)
        console.print(f"{len(sweep.runs)} runs, {jobs} at once on this machine")

    def __enter__(self) -> "_Board":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def __call__(self) -> None:
        """Called now and then."""
        if self.bar:
            done = sum(_progress(self.sweep.store / run, config)[0] for run, config in self.sweep.runs.items())
            self.bar.update(self.task, completed=done)

    def changed(self, task: local.Task) -> None:
        """A worker process started or ended."""
        folder, clock = self.sweep.store / task.name, time.strftime("%H:%M:%S")
        if task.code is None:
            console.print(f"{clock} start {task.name}")
        elif task.name not in self.sweep.runs:
            console.print(f"{clock} {'done ' if task.code == 0 else '[red]failed[/red]'} {task.name}")
        else:
            now = state(folder)
            states = Counter(self.sweep.states().values())
            ended = states["done"] + states["collapsed"] + states["failed"]
            note = f" ({_note(folder, now)}; log: {task.log})" if now not in ("done", "running") else ""
            console.print(f"{clock} {now} {task.name}{note} [{ended}/{len(self.sweep.runs)}]", markup=False)


# --- telling ---


def _progress(folder: Path, config: RunConfig) -> tuple[int, float]:
    """Student updates and seconds of training so far."""
    result = read_json(folder / "train.json")
    lines = [result | {"seconds": result["train_seconds"]}] if result else read_jsonl(folder / "train.jsonl")
    last = lines[-1] if lines else {"student_updates": 0, "seconds": 0.0}
    done = (folder / "result.json").is_file()
    return (config.student_updates if done else last["student_updates"]), last["seconds"]


def _note(folder: Path, now: str) -> str:
    """Why a run has no result, in a line."""
    if now == "collapsed":
        return str((read_json(folder / "result.json") or {}).get("reason"))
    tried = attempts(folder)
    error = (read_json(tried[-1] / "exit.json") or {}).get("error") if tried else None
    if now == "failed":
        return str(error).strip().splitlines()[-1]
    return {"lost": "its process is gone; the same command starts it again"}.get(now, "")


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for heading in others:
        table.add_column(heading)
    return table


def print_status(sweep: Sweep, states: Mapping[str, str]) -> None:
    """What every run is doing."""
    table = _table("run", "state", "student updates", "seconds", "left", "note")
    for run, config in sweep.runs.items():
        folder, now = sweep.store / run, states[run]
        updates, seconds = _progress(folder, config)
        left = seconds / updates * (config.student_updates - updates) if now == "running" and updates else None
        shown = [f"{updates}/{config.student_updates}", f"{seconds:.0f}", "" if left is None else f"{left:.0f} s"]
        table.add_row(run, now, *shown, _note(folder, now))
    console.print(table)
    console.print(", ".join(f"{count} {now}" for now, count in Counter(states.values()).items()))


def print_plan(sweep: Sweep, states: Mapping[str, str]) -> None:
    """The runs with their ids, what varies, and the seconds that like runs took per student update."""
    axes = [key for key in sweep.config.axes() if key != "method"]
    table = _table("run", "method", *axes, "seed", "updates", "state", "estimate")
    history = _history(sweep.store)
    total = 0.0
    for run, config in sweep.runs.items():
        pace = history.get(_pace_key(config.model_dump(mode="json")))
        seconds = None if pace is None or states[run] == "done" else pace * config.student_updates
        total += seconds or 0.0
        values = [show(lookup(config, key)) for key in axes]
        estimate = "" if states[run] == "done" else "unknown" if seconds is None else f"{seconds:.0f} s"
        shown = [config.method["name"], *values, str(config.seed), str(config.student_updates), states[run]]
        table.add_row(run, *shown, estimate)
    console.print(table)
    todo = sum(now not in ("done", "collapsed") for now in states.values())
    known = f"about {total / 60:.1f} process-minutes by what like runs took" if total else "cost unknown: no like run is done yet"
    console.print(f"{len(sweep.runs)} runs, {todo} to do: {known}")


def _pace_key(config: Mapping[str, Any]) -> str:
    """Runs that cost the same a student update: alike but for seed, length, optimiser and protocol."""
    alike = ("method", "teacher_hash", "fake_score_updates", "batch_size", "frames", "height", "width", "nfe", "reuse_rollout")
    return str([config.get(key) for key in alike])


def _history(store: Path) -> dict[str, float]:
    """Seconds a student update of the runs that are done, by `_pace_key`."""
    paces: dict[str, float] = {}
    for path in store.glob("*/result.json"):
        result = read_json(path)
        if result and result.get("student_updates"):
            paces[_pace_key(load_yaml(path.parent / "run.yaml"))] = result["train_seconds"] / result["student_updates"]
    return paces


def print_table(sweep: Sweep) -> None:
    """The headline table."""
    results = load(sweep.out / sweep.config.name)
    found = score_table(results, results.main + COSTS[:1])
    table = _table(*found.heads)
    for _, line in found.lines:
        table.add_row(*(cell.text for cell in line))
    console.print(table)


# --- the command ---


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0 where all is done or submitted, 1 where a run failed, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="distill_bench.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="the sweep's YAML")
    parser.add_argument("--cluster", choices=["auto", "slurm", "local", "debug"], default="auto")
    parser.add_argument("--jobs", type=int, help="runs at once; default: the cores of this machine, or 16 in an array")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of every run")
    parser.add_argument("--store", type=Path, default=Path("runs"), help="where runs live, shared by all sweeps")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--dry-run", action="store_true", help="print the runs and their estimated cost, start nothing")
    parser.add_argument("--status", action="store_true", help="print what every run is doing, start nothing")
    parser.add_argument("--retry-failed", action="store_true", help="also start runs that failed")
    options = parser.parse_args(argv)
    try:
        return _main(options)
    except (ConfigError, RegistryError, ReportError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130


def _main(options: argparse.Namespace) -> int:
    overrides = dict(_override(text) for text in options.set)
    if options.jobs is not None:
        if options.jobs < 1:
            raise ConfigError(f"--jobs {options.jobs}: at least 1")
        overrides["cluster.jobs"] = options.jobs
    sweep = open_sweep(options.file, overrides, options.store, options.out)
    on_slurm = options.cluster == "slurm" or (options.cluster == "auto" and slurm.available())
    if on_slurm and not slurm.available():
        raise ConfigError("--cluster slurm: no configured sbatch on this machine; allowed here: local, debug")
    if options.dry_run or options.status:
        states = sweep.states(slurm.queued_runs(sweep.store) if on_slurm else set())
        (print_plan if options.dry_run else print_status)(sweep, states)
        return 0
    sweep.write()
    if on_slurm:
        run_slurm(sweep, options.retry_failed)
    elif options.cluster == "debug":
        run_debug(sweep, options.retry_failed)
    else:
        run_local(sweep, sweep.config.cluster.jobs or os.cpu_count() or 1, options.retry_failed)
    sweep.write()  # the references are known now
    states = sweep.states()
    if any(now in ("done", "collapsed") for now in states.values()):
        page = report(sweep.config.name, sweep.store, sweep.out)
        print_table(sweep)
        console.print(str(page))
    failed = [run for run, now in states.items() if now not in ("done", "collapsed", "queued", "running")]
    if failed and not on_slurm:
        print_status(sweep, {run: states[run] for run in sweep.runs})
        return 1
    return 0


def _override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {text!r}: write key=value")
    return key.strip(), parse_yaml(value)


if __name__ == "__main__":
    raise SystemExit(main())
