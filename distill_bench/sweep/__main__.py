"""TODO: sweep.__main__."""

import argparse
import sys
import time
from pathlib import Path

from distill_bench.config.errors import ConfigError
from distill_bench.config.overrides import parse_override, run_value
from distill_bench.config.sweep_file import SweepConfig, load_sweep
from distill_bench.registry import RegistryError
from distill_bench.store.files import kind_of_write, read_record
from distill_bench.store.runs import FAILURES
from distill_bench.sweep import queue as scheduler
from distill_bench.sweep import status
from distill_bench.sweep.cancel import cancel
from distill_bench.sweep.launch import Launch, run_debug, run_local, run_slurm, shares
from distill_bench.sweep.manifest import (
    OpenSweep,
    check_writable,
    manifest_path,
    open_sweep,
    spec_digest,
)
from distill_bench.sweep.plan import print_plan
from distill_bench.sweep.queue import Queue, SchedulerError
from distill_bench.sweep.status import ENDED, TO_LAUNCH, WAITING, Known, read_statuses
from distill_bench.sweep.watch import QUIET_SECONDS, console, print_table, wait
from distill_bench.teachers.folder import TeacherError, outlines
from distill_bench.teachers.hub import make_local


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
    except (ConfigError, RegistryError, SchedulerError, TeacherError) as error:
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
    overrides = dict(parse_override(text) for text in options.set)
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
    make_local(*config.pipelines())
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


def _finish(sweep: OpenSweep, chosen: OpenSweep, launch: Launch, on_slurm: bool) -> int:
    """Report on what there is, and say what there is not."""
    from distill_bench.report.page import ReportError, report

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
            key: run_value(sweep.runs[found[0]], key)
            for key in sweep.config.axes(sweep.runs.values())
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
