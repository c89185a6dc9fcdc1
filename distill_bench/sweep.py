"""A sweep from its YAML to its tables: expand, hash, launch what is not done, report.

    python -m distill_bench.sweep sweeps/quick.yaml

Runs go to SLURM where a cluster is configured, else to worker processes on this machine. Started again it goes on where it was:
a run's state is read from its folder, so nothing that is done, here or in another sweep, is done again.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from distill_bench import local, scheduler, status
from distill_bench.config import (
    ClusterConfig,
    ConfigError,
    RunConfig,
    SweepConfig,
    called,
    check_condition,
    cost_key,
    evaluate_expression,
    group_id,
    load_sweep,
    lookup,
    method_of,
    override,
    run_id,
)
from distill_bench.cost import declared, priced
from distill_bench.protocol import protocol, protocol_hash, student_key
from distill_bench.registry import RegistryError
from distill_bench.scheduler import Queue, SchedulerError
from distill_bench.status import ENDED, TO_LAUNCH, WAITING, Known, Status, read_statuses
from distill_bench.store import (
    FAILURES,
    attempts,
    cancels,
    differences,
    kind_of_write,
    note_cancel,
    read_record,
    record_outside,
    result_of,
    start_of,
    state,
    unwritable,
    write_bytes,
    write_json,
)
from distill_bench.teacher import is_outline, outlines, teacher_folder

TRIES = 3  # of a run whose worker process died, in one call
STOPPED = 3  # how a worker process ends that saved on request: `job.STOPPED`, without torch
QUIET_SECONDS = 60.0  # without a running run, until --watch takes a local sweep for ended
console = Console(
    highlight=False, width=None if sys.stdout.isatty() else 200
)  # a log has no width of its own


@dataclass(frozen=True)
class Sweep:
    """A sweep file laid over a store: its runs by id."""

    config: SweepConfig
    runs: dict[str, RunConfig]
    store: Path
    out: Path

    @property
    def known(self) -> dict[str, Known]:
        """What a status needs of each run."""
        return {
            run: Known(config.method["name"], config.student_updates)
            for run, config in self.runs.items()
        }

    def states(self, queue: Queue = Queue()) -> dict[str, str]:  # noqa: B008 - never changed
        """Every run's state, from its folder and what is in the scheduler's queue."""
        return {run: state(self.store / run, bool(queue.active(run))) for run in self.runs}

    def only(self, condition: str | None) -> "Sweep":
        """The runs for which an expression over dotted keys holds."""
        if condition is None:
            return self
        check_condition(condition)
        kept = {
            r: c
            for r, c in self.runs.items()
            if evaluate_expression(condition, c.model_dump(mode="json"))
        }
        if not kept:
            raise ConfigError(f"--only {condition!r}: no run of the sweep is like that")
        return dataclasses.replace(self, runs=kept)

    def write_runs(self) -> None:
        """Write run.yaml into every run folder that lacks one."""
        for run, config in self.runs.items():
            path = self.store / run / "run.yaml"
            if not path.is_file():
                try:
                    write_bytes(
                        path,
                        yaml.dump(
                            config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False
                        ).encode(),
                    )
                except OSError as error:  # this run's trouble alone
                    record_outside(
                        path.parent,
                        error=f"cannot write into {path.parent}: {error.strerror}",
                        kind=kind_of_write(error),
                    )

    def write(self) -> None:
        """Write run.yaml into every run folder that lacks one, and the sweep's manifest."""
        self.write_runs()
        results = [result for run in self.runs if (result := result_of(self.store / run))]
        found = dict.fromkeys(
            pair for result in results for pair in result.get("references", {}).items()
        )
        presets = self.config.presets()
        kinds = Counter(
            kind for kind, _ in found
        )  # a sweep over the student's steps has rows of one kind for each
        references = {
            kind if kinds[kind] == 1 else Path(folder).name: folder for kind, folder in found
        }
        manifest = {
            "name": self.config.name,
            "question": self.config.question,
            "baseline": self.config.baseline,
            "axes": self.config.axes(self.runs.values()),
            "presets": {
                run: presets[group]
                for run, config in self.runs.items()
                if (group := group_id(config)) in presets
            },
            "run_ids": list(self.runs),
            "groups": {run: group_id(config) for run, config in self.runs.items()},
            "references": references,
            "spec": spec_digest(self.config),
            "runs": {run: dataclasses.asdict(known) for run, known in self.known.items()},
        }
        write_json(manifest_path(self.store, self.config.name), manifest)


_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def manifest_path(store: Path, name: str) -> Path:
    """Where a sweep says which runs are its own."""
    return store / "sweeps" / f"{name}.json"


def spec_digest(config: SweepConfig) -> str:
    """What a sweep's run ids follow from, but for weights and clips: its file, files that it names, the code that resolves it."""
    package, spec = Path(__file__).parent, config.model_dump(mode="json", exclude={"cluster"})
    sources = [
        package / "config.py",
        package / "method.py",
        *sorted((package.parent / "methods").glob("*.py")),
    ]
    sources += [
        Path(text.partition(":")[0]) for text in _texts(spec) if len(text.encode()) < 256
    ]  # prompts, methods by path
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode())
    for path in sources:
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _texts(value: object) -> Iterator[str]:
    """Every text in a tree of mappings and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(each)


def open_sweep(config: SweepConfig, store: Path, out: Path) -> Sweep:
    """A sweep, expanded.

    Raises:
        ConfigError: for a run that cannot be.
    """
    runs = {run_id(run): run for run in config.expand()}
    _refuse_protocols(config.name, runs.values())
    return Sweep(config, runs, store, out)


def check_writable(*folders: Path) -> None:
    """ConfigError for a folder that cannot be written, or not be made: before anything is launched into it."""
    for folder in folders:
        if (why := unwritable(folder)) is not None:
            raise ConfigError(f"cannot write into {folder}: {why}")


def _refuse_protocols(name: str, runs: Iterable[RunConfig]) -> None:
    """ConfigError for runs whose scores could share no table: better now than when all have been trained."""
    first, *others = {protocol_hash(run): protocol(run) for run in runs}.values()
    if others:
        raise ConfigError(
            f"{name}: its runs are of {1 + len(others)} protocols, and scores of unlike ones share no table; the first two "
            f"differ in {differences(first, others[0])}: make a sweep of each"
        )


# --- launching ---


@dataclass(frozen=True)
class Launch:
    """Which runs a call may start, and how."""

    retry: frozenset[str] | None = None  # kinds of failure to try again; {"all"} is every one
    stale: str = "warn"
    allow_changed_code: bool = False

    def chosen(self, sweep: Sweep, queue: Queue) -> list[str]:
        """Runs to start; with stale "rerun" those of other code are first set aside."""
        chosen = []
        for s in read_statuses(sweep.store, sweep.known, queue):
            if s.stale and self.stale == "rerun":
                _set_aside(sweep.store / s.run)
                chosen.append(s.run)
            elif s.state in TO_LAUNCH or (
                s.state == "failed" and self.retry and self.retry & {"all", s.kind}
            ):
                chosen.append(s.run)
        sweep.write_runs()
        return chosen


def _set_aside(folder: Path) -> None:
    """Move a run's folder away, results and all, so that the run is missing."""
    for n in range(1, 1000):
        aside = folder.with_name(f"{folder.name}.stale-{n}")
        if not aside.exists():
            folder.rename(aside)
            console.print(f"{folder.name}: made by other code; set aside as {aside.name}")
            return


def shares(cluster: ClusterConfig) -> tuple[int, int]:
    """How many runs this machine does at once, and by how many processes each: one a GPU, as on the cluster, if it has as many.

    Without GPUs a run has several processes where `tasks` says so.
    """
    gpus = len(local.gpus())
    wanted = cluster.nodes * cluster.processes if gpus else cluster.tasks or 1
    processes = min(wanted, gpus) if gpus else wanted
    if processes < wanted:
        console.print(
            f"[yellow]warning[/yellow]: {wanted} processes a run are asked for, here are {gpus} GPUs: each has {gpus}"
        )
    return cluster.jobs or max(1, (gpus or os.cpu_count() or 1) // processes), processes


def run_local(sweep: Sweep, jobs: int, launch: Launch, processes: int = 1) -> None:
    """Do every run that is not done by workers of this machine; returns when none is left to do.

    Args:
        jobs: runs at once.
        processes: that train a run together.
    """
    tries: Counter[str] = Counter()
    began, todo = time.time(), []

    def cancelled() -> set[str]:
        return {run for call in cancels(sweep.store, began) for run in call["runs"]}

    def drop(task: local.Task) -> bool:
        told = cancelled()
        return (
            task.name in told if task.name in sweep.runs else told.issuperset(todo)
        )  # what nobody needs is not prepared

    with _Board(sweep, jobs, processes) as board:
        while True:
            todo = [
                run
                for run in launch.chosen(sweep, Queue())
                if tries[run] < TRIES and run not in cancelled()
            ]
            launch = dataclasses.replace(
                launch, retry=None
            )  # what fails in this call is not tried again
            if todo:
                tries.update(todo)
                todo.sort(key=lambda run: _place_in_queue(sweep.runs[run]))
                tasks = [
                    *_preparations(sweep, todo),
                    *(_task(sweep, run, launch, processes) for run in todo),
                ]
                local.run_queue(tasks, jobs, board.changed, board, drop=drop)
            elif "running" in sweep.states().values():
                time.sleep(1)  # another process has them; should it die, they are taken over
                board()
            else:
                return


def _place_in_queue(config: RunConfig) -> tuple[int, float]:
    """Seed by seed, so that rows can soon be compared; of one seed the longest first, so that all cores end together."""
    return config.seed, -config.student_updates * priced(declared(config), {})


def _task(sweep: Sweep, run: str, launch: Launch, processes: int) -> local.Task:
    folder = sweep.store / run
    flags = ["--allow-changed-code"] if launch.allow_changed_code else []
    return local.Task(
        run,
        local.python("distill_bench.job", str(folder), *flags),
        folder / "log.txt",
        True,
        processes,
    )


def _sharing(sweep: Sweep, todo: Iterable[str]) -> dict[str, str]:
    """One run for each set of shared data that is not there yet: name -> run."""
    first: dict[tuple, str] = {}
    for run in todo:
        config = sweep.runs[run]
        needs = ", ".join(sorted(method_of(config).needs))
        first.setdefault(
            (protocol_hash(config), student_key(config), needs, needs and config.guidance_scale),
            run,
        )
    ready = {
        key: (sweep.store / "references" / key[0] / f"ready-{key[1]}.json").is_file()
        for key in first
    }
    return {
        ", ".join(filter(None, (f"references {key[0]}", key[2]))): run
        for key, run in first.items()
        if not ready[key]
    }


def _preparations(sweep: Sweep, todo: list[str]) -> list[local.Task]:
    """Tasks that make what the runs share: first in the queue, so that no run waits for them long."""
    logs = sweep.store / "logs"
    return [
        local.Task(
            name,
            local.python("distill_bench.job", "--prepare", str(sweep.store / run)),
            logs / f"{run}.txt",
            forks=True,
        )
        for name, run in _sharing(sweep, todo).items()
    ]


def run_debug(sweep: Sweep, launch: Launch) -> None:
    """Do every run that is not done in this process, one after the other."""
    from distill_bench.job import execute

    for run in launch.chosen(sweep, Queue()):
        console.print(f"[bold]{run}[/bold]")
        execute(sweep.store / run, allow_changed_code=launch.allow_changed_code)


def run_slurm(sweep: Sweep, launch: Launch) -> None:
    """Submit every run that is not done, and return."""
    from distill_bench import slurm

    todo = launch.chosen(sweep, scheduler.read_queue(sweep.store))
    if not todo:
        console.print("nothing to submit")
        return
    warn(sweep.config.cluster)
    shared = [sweep.store / run for run in _sharing(sweep, todo).values()]
    cluster, folders = sweep.config.cluster, [sweep.store / run for run in todo]
    ids = slurm.submit(folders, cluster, sweep.store, shared, launch.allow_changed_code)
    arrays = list(dict.fromkeys(job.partition("_")[0] for job in ids))
    console.print(f"submitted {len(ids)} runs as {len(set(ids))} jobs: {', '.join(arrays)}")
    console.print("watch: this command with --status or --wait, or squeue --me")


def wait(sweep: Sweep, seconds: float = 5.0) -> None:
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


def cancel(store: Path, runs: Iterable[str], queue: Queue) -> int:
    """Cancel the jobs of the runs and what was to be prepared for them alone, ask those that work on this machine to save and
    stop, and tell the drivers of local sweeps to start them no more; returns how many jobs and processes were told.

    Raises:
        ConfigError: if a job has further runs: it would end them too.
    """
    runs = set(runs)
    jobs = {job for run in runs for job in queue.active(run)}
    for run in queue.jobs.keys() - runs:
        if (shared := jobs.intersection(queue.active(run))) and state(store / run) not in (
            *ENDED,
            "failed",
        ):
            raise ConfigError(
                f"job {shared.pop()} does {run} too (runs_per_job): choose all runs of a job, or none of them"
            )
    waiting = {job: first for job, first in queue.first.items() if job in queue.states}
    prepare = {waiting[job] for job in jobs & waiting.keys()} & queue.states.keys()
    prepare -= {first for job, first in waiting.items() if job not in jobs}  # others need it
    try:
        note_cancel(store, runs, jobs)
    except OSError as error:
        say = f"cannot write into {store} ({error.strerror}): a local sweep goes on with its other runs"
        console.print(f"[yellow]warning[/yellow]: {say}")
    if jobs:
        scheduler.cancel(sorted(jobs | prepare))
    stopped = len(jobs | prepare)
    for run in runs:
        start = start_of(attempts(store / run)[-1]) if attempts(store / run) else {}
        here = start.get("host") == socket.gethostname() and start["job"] is None and start["pid"]
        if here and state(store / run) == "running":
            with contextlib.suppress(ProcessLookupError):
                os.kill(start["pid"], signal.SIGTERM)
                stopped += 1
    return stopped


class _Board:
    """Progress of local runs: a rich bar in a terminal, a line at each start and end elsewhere."""

    def __init__(self, sweep: Sweep, jobs: int, processes: int = 1) -> None:
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


# --- the plan ---


def print_plan(sweep: Sweep, statuses: Sequence[Status], on_slurm: bool) -> None:
    """The runs with their ids, what varies, what they will cost by what like runs took, and what the cluster lacks."""
    axes = [key for key in sweep.config.axes(sweep.runs.values()) if key != "method"]
    table = Table(
        "run", "method", *axes, "seed", "updates", "state", "estimate", box=None, pad_edge=False
    )
    history, presets = _history(sweep.store), sweep.config.presets()
    known, unknown, total = 0, 0, 0.0
    for s in statuses:
        config = sweep.runs[s.run]
        like = history.get(cost_key(config), [])
        ended, seconds = s.state in ENDED, None
        if like:
            pace, evaluation = (statistics.median(column) for column in zip(*like, strict=True))
            seconds = pace * (s.of - s.student_updates) + evaluation
        if not ended:
            known, unknown, total = (
                known + bool(like),
                unknown + (not like),
                total + (seconds or 0.0),
            )
        estimate = (
            ""
            if ended
            else "unknown"
            if seconds is None
            else f"{status.duration(seconds)} (of {len(like)} like runs)"
        )
        values = [_shown(lookup(config, key)) for key in axes]
        table.add_row(
            s.run, called(config, presets), *values, str(config.seed), str(s.of), s.state, estimate
        )
    console.print(table)
    console.print(f"{len(statuses)} runs ({status.counts(statuses)}), {known + unknown} to do")
    for teacher in dict.fromkeys(config.teacher for config in sweep.runs.values()):
        if is_outline(teacher_folder(teacher)):
            console.print(
                f"the weights of {teacher} are not here: by its configs; with them the runs have other ids"
            )
    cluster = sweep.config.cluster
    if known:
        hours = total / 3600 * cluster.nodes * (cluster.gpus or 1) / cluster.runs_per_job
        unit = "GPU-hours" if cluster.gpus else "process-hours"
        console.print(
            f"cost of {known} of them by like runs: {hours:.3g} {unit}, one run at a time {status.duration(total)}"
        )
    if unknown:
        console.print(f"cost of {unknown} of them: unknown, no like run is done yet")
    if on_slurm:
        _print_cluster(sweep)
    elif cluster.partition or cluster.gpus or cluster.nodes > 1:
        from distill_bench import slurm

        console.print("\non SLURM each run would be a job like this:\n")
        console.print(slurm.script(cluster, sweep.store), markup=False, soft_wrap=True)


def _history(store: Path) -> dict[str, list[tuple[float, float]]]:
    """Seconds a student update, and seconds of evaluation, of the runs that are done; by `config.cost_key`."""
    paces: dict[str, list[tuple[float, float]]] = {}
    for path in store.glob("*/result.json"):
        result = result_of(path.parent) or {}
        if result.get("student_updates") and {"cost_key", "evaluate_seconds"} <= result.keys():
            pace = result["train_seconds"] / result["student_updates"]
            paces.setdefault(result["cost_key"], []).append((pace, result["evaluate_seconds"]))
    return paces


def _print_cluster(sweep: Sweep) -> None:
    """How the jobs will look, and what this cluster cannot do for them."""
    from distill_bench import slurm

    wanted = sweep.config.cluster
    found = scheduler.cluster(wanted.partition)
    size = f"{wanted.nodes} x {wanted.processes} processes of {wanted.cpus} CPUs, {wanted.gpus} GPUs a node, {wanted.hours:g} h"
    console.print(
        f"slurm: partition {found.partition}, {size}, runs a job {wanted.runs_per_job}, jobs at once {wanted.jobs or 16}"
    )
    warn(wanted)
    console.print(slurm.script(wanted, sweep.store), markup=False, soft_wrap=True)


def warn(wanted: ClusterConfig) -> None:
    """Say what this cluster cannot do for such jobs: some would wait in its queue for ever."""
    found = scheduler.cluster(wanted.partition)
    cpus, mem = wanted.processes * wanted.cpus, wanted.mem_gb or 0
    lacks = {
        f"{wanted.hours:g} h is over the partition's {found.max_hours} h": found.max_hours
        and wanted.hours > found.max_hours,
        f"{wanted.nodes} nodes are more than the partition's {found.nodes}": wanted.nodes
        > found.nodes,
        f"{wanted.processes} x {wanted.cpus} CPUs are more than any node's {found.cpus}": cpus
        > found.cpus,
        f"{mem} GB are more than any node's {found.mem_gb:.3g}": mem > found.mem_gb,
        f"{wanted.gpus} GPUs are more than any node's {found.gpus}": wanted.gpus > found.gpus,
        "preemption sends no signal: a run saves when it is told to end, within GraceTime": found.preemptible
        and not found.preemption_signal,
        "jobs are not requeued on this cluster: start the sweep again after a preemption": not found.requeue,
        "no accounting: how a lost job ended is known for some minutes only": not found.accounting,
    }
    for text, true in lacks.items():
        if true:
            console.print(f"[yellow]warning[/yellow]: {text}")


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def print_table(sweep: Sweep) -> None:
    """The headline table."""
    from distill_bench.results import COSTS, load
    from distill_bench.tables import table as score_table

    results = load(sweep.out / sweep.config.name)
    found = score_table(results, results.main + COSTS[:1])
    table = Table(*found.heads, box=None, pad_edge=False)
    for _, line in found.lines:
        table.add_row(*(cell.text for cell in line))
    console.print(table)


# --- the command ---


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns 0 where all is done or submitted, 1 where a run failed, 2 for bad input; with --status 0 where all is done, 3 where
    work is left, 4 where a run failed.
    """
    parser = argparse.ArgumentParser(
        prog="distill_bench.sweep", description=__doc__.splitlines()[0]
    )
    parser.add_argument("file", type=Path, help="the sweep's YAML")
    parser.add_argument("--cluster", choices=["auto", "slurm", "local", "debug"], default="auto")
    parser.add_argument(
        "--profile", help="settings of a cluster by name, from the user's file of profiles"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        help="runs at once; default: the GPUs or cores of this machine, or 16 in an array",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of every run",
    )
    parser.add_argument(
        "--only",
        metavar="CONDITION",
        help="some of the runs, for instance \"method == 'a' and seed < 2\"",
    )
    parser.add_argument(
        "--store", type=Path, default=Path("runs"), help="where runs live, shared by all sweeps"
    )
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument(
        "--wait",
        action="store_true",
        help="on SLURM: stay with a live table until all have ended, then report",
    )
    parser.add_argument(
        "--retry-failed",
        nargs="?",
        const="all",
        metavar="KIND,...",
        help="also start runs that failed, with = those of a kind",
    )
    parser.add_argument(
        "--stale",
        choices=["warn", "rerun", "ignore"],
        default="warn",
        help="results of other code than now",
    )
    parser.add_argument(
        "--allow-changed-code",
        action="store_true",
        help="go on with runs that began under other code",
    )
    show = parser.add_mutually_exclusive_group()
    show.add_argument(
        "--dry-run",
        action="store_true",
        help="print the runs, their cost and how a job would look; start nothing",
    )
    show.add_argument(
        "--status", action="store_true", help="print what every run is doing; start nothing"
    )
    show.add_argument("--watch", type=float, metavar="SECONDS", help="--status again and again")
    show.add_argument(
        "--explain",
        metavar="RUN",
        help="everything about one run, by the beginning of its id or any part",
    )
    show.add_argument(
        "--cancel",
        action="store_true",
        help="cancel the jobs of the sweep's runs; what is running saves first",
    )
    parser.add_argument("--json", action="store_true", help="--status for scripts")
    arguments = sys.argv[1:] if argv is None else argv
    # bare, the option would take the file that follows it for a kind
    options = parser.parse_args(
        ["--retry-failed=all" if a == "--retry-failed" else a for a in arguments]
    )
    try:
        return _main(options)
    except (ConfigError, RegistryError, SchedulerError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if kind_of_write(error) == "exception":
            raise
        print(
            f"{parser.prog}: {error.filename or options.store}: {error.strerror}", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130


def _main(options: argparse.Namespace) -> int:
    overrides = dict(override(text) for text in options.set)
    if options.jobs is not None:
        if options.jobs < 1:
            raise ConfigError(f"--jobs {options.jobs}: at least 1")
        overrides["cluster.jobs"] = options.jobs
    if options.profile is not None:
        overrides["cluster.profile"] = options.profile
    retry = None if options.retry_failed is None else frozenset(options.retry_failed.split(","))
    if unknown := sorted((retry or set()) - {"all", *FAILURES}):
        raise ConfigError(
            f"--retry-failed: no kind of failure is called {unknown[0]!r}; known: {', '.join(FAILURES)}"
        )
    config = load_sweep(options.file, overrides)
    on_slurm = options.cluster in ("auto", "slurm") and scheduler.available()
    if options.cluster == "slurm" and not on_slurm:
        raise ConfigError(
            "--cluster slurm: no configured sbatch on this machine; allowed here: local, debug"
        )
    if options.watch is not None and not options.watch > 0:
        raise ConfigError(f"--watch {options.watch:g}: seconds between two looks, above 0")
    if (
        options.json
        or options.status
        or options.watch
        or options.explain is not None
        or options.cancel
    ):
        return _tell(config, options, on_slurm)
    if options.dry_run:
        with outlines():
            sweep = open_sweep(config, options.store, options.out)
            chosen, queue = sweep.only(options.only), scheduler.read_queue(options.store, on_slurm)
            seeds = config.seeds if isinstance(config.seeds, int) else len(config.seeds)
            if again := sum(1 for _ in config.cells()) * seeds - len(sweep.runs):
                console.print(
                    f"{again} more cells are runs of these: they differ in nothing that changes a run's numbers"
                )
            print_plan(chosen, read_statuses(chosen.store, chosen.known, queue), on_slurm)
        return 0
    sweep = open_sweep(config, options.store, options.out)
    chosen = sweep.only(options.only)
    check_writable(options.store, options.out)
    sweep.write()
    launch = Launch(retry, options.stale, options.allow_changed_code)
    if on_slurm:
        run_slurm(chosen, launch)
        if not options.wait:
            return 0
        wait(chosen)
    elif options.cluster == "debug":
        run_debug(chosen, launch)
    else:
        jobs, processes = shares(config.cluster)
        run_local(chosen, jobs, launch, processes)
    return _finish(sweep, chosen, launch, on_slurm)


def _finish(sweep: Sweep, chosen: Sweep, launch: Launch, on_slurm: bool) -> int:
    """Report on what there is, and say what there is not."""
    from distill_bench.report import ReportError, report

    sweep.write()  # the references are known now
    statuses = read_statuses(
        chosen.store, chosen.known, scheduler.read_queue(chosen.store, on_slurm)
    )
    if any(s.state in ENDED for s in statuses):
        try:
            page = report(sweep.config.name, sweep.store, sweep.out)
            print_table(sweep)
        except ReportError as error:
            raise ConfigError(str(error)) from error
        console.print(str(page))
    stale = [s.run for s in statuses if s.stale]
    if stale and launch.stale == "warn":
        say = f"{len(stale)} results are of other code than now: {stale[0]} ... (--stale=rerun makes them again)"
        console.print(f"[yellow]warning[/yellow]: {say}")
    if not all(s.state in ENDED for s in statuses):
        console.print(status.as_table([s for s in statuses if s.state not in ENDED]))
        return 1
    return 0


def _tell(config: SweepConfig, options: argparse.Namespace, on_slurm: bool) -> int:
    """--status and its like: by the manifest of the last launch where the sweep is still that one, else expanded anew."""
    store, manifest = (
        options.store,
        read_record(manifest_path(options.store, config.name), run_ids=list) or {},
    )
    if manifest.get("spec") == spec_digest(config) and not options.only and options.explain is None:
        runs = {run: Known(**known) for run, known in manifest["runs"].items()}
        sweep = None
    else:
        sweep = open_sweep(config, store, options.out).only(options.only)
        runs = sweep.known
    queue = scheduler.read_queue(store, on_slurm)
    if options.explain is not None:
        found = [run for run in runs if options.explain in run]
        if len(found) != 1:
            names = ", ".join(found or runs)
            raise ConfigError(
                f"--explain {options.explain!r} is {len(found) or 'no'} runs of the sweep; known: {names}"
            )
        axes = {
            key: lookup(sweep.runs[found[0]], key) for key in sweep.config.axes(sweep.runs.values())
        }
        console.print(status.explain(store, found[0], axes, queue, runs[found[0]]), markup=False)
        return 0
    if options.cancel:
        console.print(f"{cancel(store, runs, queue)} jobs and processes are told to stop")
        return 0
    waited = time.monotonic()
    while True:
        statuses = read_statuses(store, runs, queue)
        if options.json:
            print(status.as_json(statuses))
        else:
            console.print(status.as_table(statuses))
            console.print(status.counts(statuses))
        states = {s.state for s in statuses}
        if states & set(WAITING):
            waited = time.monotonic()
        # a local sweep's driver takes seconds from one run to the next
        patience = QUIET_SECONDS if states & set(TO_LAUNCH) and not on_slurm else 0
        if (
            options.watch is None
            or time.monotonic() - waited >= patience
            and not states & set(WAITING)
        ):
            return status.exit_code(statuses)
        time.sleep(options.watch)
        queue = _queue_again(store, on_slurm, queue)


def _queue_again(store: Path, on_slurm: bool, before: Queue) -> Queue:
    """The queue, or where SLURM does not answer the one before: it comes back."""
    try:
        return scheduler.read_queue(store, on_slurm)
    except SchedulerError as error:
        print(f"{time.strftime('%H:%M:%S')} {error}", file=sys.stderr, flush=True)
        return before


if __name__ == "__main__":
    raise SystemExit(main())
