"""Run a sweep file from grid to tables, on SLURM if a cluster is configured, else locally.

    python -m distill_bench.sweep sweeps/quick.yaml

The same command resumes the sweep. Runs that this or another sweep has finished are skipped.
sweeps/README.md is the reference.
"""

import argparse
import sys
from pathlib import Path

from distill_bench.config.errors import ConfigError
from distill_bench.config.overrides import parse_override, run_value
from distill_bench.config.sweep_file import SweepConfig, load_sweep
from distill_bench.config.validation import check_arguments
from distill_bench.registry import RegistryError
from distill_bench.store.failures import FAILURE_KINDS
from distill_bench.store.files import user_path, user_text
from distill_bench.sweep.cancel import cancel_runs
from distill_bench.sweep.launch import LaunchOptions, local_slots, run_debug, run_local, run_slurm
from distill_bench.sweep.manifest import OpenSweep, check_writable, open_sweep, recorded_entries
from distill_bench.sweep.slurm.queue import SchedulerError, read_queue, slurm_available
from distill_bench.sweep.status import ENDED, ManifestEntry, explanation, read_statuses
from distill_bench.sweep.watch import (
    console,
    print_statuses,
    print_table,
    show_status,
    wait_for_jobs,
    warn,
)
from distill_bench.teachers.folder import TeacherError, outlines
from distill_bench.teachers.hub import make_local

EXIT_CODES = """\
exit codes:
  0    all runs are done, or submitted to SLURM
  1    a run failed or is not done
  2    bad input
  130  stopped by Ctrl-C
  with --status and --watch: 0 all runs are done, 3 work is left, 4 a run failed
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns one of EXIT_CODES."""
    parser = make_parser()
    arguments = sys.argv[1:] if argv is None else argv
    # without "=", argparse would take the file after --retry-failed for its KIND
    options = parser.parse_args(
        ["--retry-failed=all" if a == "--retry-failed" else a for a in arguments]
    )
    try:
        check_arguments(vars(options))
        return _run(options)
    except (ConfigError, RegistryError, SchedulerError, TeacherError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno is None:  # not a problem of a file
            raise
        path = error.filename or options.store
        print(f"{parser.prog}: {path}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command resumes", file=sys.stderr)
        return 130


def make_parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="distill-bench sweep",
        usage="python -m distill_bench.sweep [options] FILE",
        description=__doc__.splitlines()[0],
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the sweep's YAML")

    runs = parser.add_argument_group("which runs")
    runs.add_argument(
        "--only",
        type=user_text,
        metavar="CONDITION",
        help="only runs that satisfy the condition, e.g. \"method == 'a' and seed < 2\"",
    )
    runs.add_argument(
        "--set",
        type=user_text,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of every run, or of the sweep, e.g. seeds=1; may be repeated",
    )
    runs.add_argument(
        "--retry-failed",
        nargs="?",
        const="all",
        metavar="KIND,...",
        help="also start failed runs; with =KIND,... only failures of these kinds: "
        + ", ".join(FAILURE_KINDS),
    )
    runs.add_argument(
        "--stale",
        choices=["warn", "rerun", "ignore"],
        default="warn",
        help="results made by different code: warn (default), rerun them, or ignore it",
    )
    runs.add_argument(
        "--allow-changed-code",
        action="store_true",
        help="resume unfinished runs that began under different code",
    )

    where = parser.add_argument_group("where they run")
    where.add_argument(
        "--cluster",
        choices=["auto", "slurm", "local", "debug"],
        default="auto",
        help="slurm, local: worker processes on this machine, debug: in this process; "
        "auto (default): slurm if it is configured, else local",
    )
    where.add_argument(
        "--profile",
        type=user_text,
        metavar="NAME",
        help="cluster settings of this name in clusters.yaml",
    )
    where.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="runs at once; default: as many as this machine has GPUs, else cores; 16 on SLURM",
    )
    where.add_argument(
        "--wait",
        action="store_true",
        help="on SLURM: stay with a live table until all runs have ended, then report",
    )
    where.add_argument(
        "--store",
        type=user_path,
        default=Path("runs"),
        metavar="FOLDER",
        help="run folders, shared by all sweeps; default: runs",
    )
    where.add_argument(
        "--out",
        type=user_path,
        default=Path("results"),
        metavar="FOLDER",
        help="results go to FOLDER/<name of the sweep>; default: results",
    )

    look = parser.add_argument_group("look or cancel; start nothing")
    action = look.add_mutually_exclusive_group()
    action.add_argument(
        "--dry-run",
        action="store_true",
        help="print the runs, their cost and the job that SLURM would get",
    )
    action.add_argument("--status", action="store_true", help="print the state of every run")
    action.add_argument(
        "--watch",
        type=float,
        metavar="SECONDS",
        help="print the status every SECONDS until no run is waiting or running",
    )
    action.add_argument(
        "--explain",
        metavar="RUN",
        help="print config, jobs, attempts and log of one run, given by a part of its id",
    )
    action.add_argument(
        "--cancel", action="store_true", help="cancel the runs; running ones save first"
    )
    look.add_argument(
        "--measure",
        action="store_true",
        help="with --dry-run: time one batch of each evaluator's network on this machine",
    )
    look.add_argument("--json", action="store_true", help="print the status as JSON")
    return parser


def _run(options: argparse.Namespace) -> int:
    """Dispatch to the action that the options select."""
    retry = _failure_kinds(options.retry_failed)
    config = load_sweep(options.file, _overrides(options))
    on_slurm = options.cluster in ("auto", "slurm") and slurm_available()
    if options.cluster == "slurm" and not on_slurm:
        raise ConfigError(
            "--cluster slurm: sbatch is missing or not configured on this machine; "
            "allowed here: local, debug"
        )
    if options.watch is not None and not options.watch > 0:
        raise ConfigError(f"--watch {options.watch:g}: seconds between two prints must be above 0")
    if options.measure and not options.dry_run:
        raise ConfigError("--measure belongs to --dry-run: add it, or leave out --measure")
    if options.dry_run:
        return _preview(config, options, on_slurm)
    if options.explain is not None:
        return _explain(config, options, on_slurm)
    if options.cancel:
        runs = _entries(config, options, initial=False)
        signalled = cancel_runs(options.store, runs, read_queue(options.store, on_slurm))
        console.print(f"told {signalled} jobs and processes to stop")
        return 0
    if options.status or options.watch is not None or options.json:
        entries = _entries(config, options)
        return show_status(options.store, entries, on_slurm, options.watch, options.json)
    launch = LaunchOptions(retry, options.stale, options.allow_changed_code)
    return _launch(config, options, launch, on_slurm)


def _failure_kinds(kinds: str | None) -> frozenset[str]:
    """The kinds of --retry-failed.

    Raises:
        ConfigError: for an unknown kind.
    """
    chosen = frozenset(kinds.split(",")) if kinds is not None else frozenset()
    if unknown := sorted(chosen - {"all", *FAILURE_KINDS}):
        known = ", ".join(FAILURE_KINDS)
        raise ConfigError(f"--retry-failed: no kind of failure {unknown[0]!r}; known: {known}")
    return chosen


def _overrides(options: argparse.Namespace) -> dict[str, object]:
    """Keys of the sweep file that the command line sets."""
    overrides = dict(parse_override(text) for text in options.set)
    if options.jobs is not None:
        if options.jobs < 1:
            raise ConfigError(f"--jobs {options.jobs}: must be at least 1")
        overrides["cluster.jobs"] = options.jobs
    if options.profile is not None:
        overrides["cluster.profile"] = options.profile
    return overrides


def _entries(
    config: SweepConfig, options: argparse.Namespace, initial: bool = True
) -> dict[str, ManifestEntry]:
    """Manifest entries of the runs; expands the sweep only if the manifest is out of date.

    Args:
        initial: with `--only`, also of the runs from whose students the selected ones start.
    """
    if options.only is None:
        entries = recorded_entries(config, options.store)
        if entries is not None:
            return entries
    return open_sweep(config, options.store, options.out).only(options.only, initial).entries


def _explain(config: SweepConfig, options: argparse.Namespace, on_slurm: bool) -> int:
    sweep = open_sweep(config, options.store, options.out).only(options.only)
    matching = [run for run in sweep.entries if options.explain in run]
    if len(matching) != 1:
        known = ", ".join(matching or sweep.entries)
        raise ConfigError(
            f"--explain {options.explain!r}: {len(matching) or 'no'} runs of the sweep match; "
            f"name one of: {known}"
        )
    (run,) = matching
    axes = sweep.config.axes(sweep.runs.values())
    values = {key: run_value(sweep.configs[run], key) for key in axes}
    if run in sweep.rows:
        values = {"row": sweep.rows[run][0].label}
    queue = read_queue(sweep.store, on_slurm)
    text = explanation(sweep.store, run, values, queue, sweep.entries[run])
    console.print(text)
    return 0


def _preview(config: SweepConfig, options: argparse.Namespace, on_slurm: bool) -> int:
    with outlines():
        sweep = open_sweep(config, options.store, options.out)
        chosen = sweep.only(options.only)
        queue = read_queue(options.store, on_slurm)
        _print_unused(sweep)
        statuses = read_statuses(chosen.store, chosen.entries, queue)
        # torch takes seconds
        from distill_bench.sweep.preview import print_preview
        from distill_bench.sweep.scoring_estimate import scoring_estimate

        print_preview(chosen, statuses, on_slurm)
        try:
            _, processes = _slots(config, options, on_slurm)
            warnings = _check_before(chosen, processes, options.stale)
            with console.status("timing a batch of each evaluator's network"):
                for line in scoring_estimate(chosen, statuses, options.measure):
                    console.print(line, soft_wrap=True)
        except ConfigError as error:
            warnings = [f"the runs would not start: {error}"]
    for warning in warnings:
        warn(warning)
    return 0


def _launch(
    config: SweepConfig, options: argparse.Namespace, launch: LaunchOptions, on_slurm: bool
) -> int:
    make_local(*config.pipelines())
    sweep = open_sweep(config, options.store, options.out)
    chosen = sweep.only(options.only)
    check_writable(options.store, options.out)
    _print_unused(sweep)
    jobs, processes = _slots(config, options, on_slurm)
    for warning in _check_before(chosen, processes, launch.stale):
        warn(warning)
    if not set(chosen.states().values()) <= set(ENDED):
        sweep.record_launch(options.file)
    sweep.write()
    if on_slurm:
        run_slurm(chosen, launch)
        if not options.wait:
            return 0
        wait_for_jobs(chosen)
    elif options.cluster == "debug":
        run_debug(chosen, launch)
    else:
        run_local(chosen, jobs, launch, processes)
    return _finish(sweep, chosen, launch, on_slurm)


def _print_unused(sweep: OpenSweep) -> None:
    """Print the cells that are no runs of their own, and the conditions that exclude none."""
    config = sweep.config
    seeds = config.seeds if isinstance(config.seeds, int) else len(config.seeds)
    if duplicates := len(config.cells()) * seeds - len(sweep.runs):
        console.print(
            f"{duplicates} more cells are the same runs as others: "
            "they differ in nothing that changes a run's numbers"
        )
    every = len(config.model_copy(update={"exclude": []}).cells()) if config.exclude else 0
    for condition in config.exclude:
        if len(config.model_copy(update={"exclude": [condition]}).cells()) == every:
            warn(f"exclude {condition!r} removes no cell")


def _slots(config: SweepConfig, options: argparse.Namespace, on_slurm: bool) -> tuple[int, int]:
    """Number of runs at once on this machine, and of processes per run."""
    if on_slurm:
        return 1, config.cluster.nodes * config.cluster.processes
    return (1, 1) if options.cluster == "debug" else local_slots(config.cluster)


def _check_before(sweep: OpenSweep, processes: int, stale: str) -> list[str]:
    """Check what follows training, unless every run has ended; returns warnings.

    Raises:
        ConfigError: if the runs or their report would fail.
    """
    states = sweep.states()
    if set(states.values()) <= set(ENDED):
        return []
    # torch takes seconds
    from distill_bench.sweep.prechecks import check_stored_scores, check_sweep

    warnings = check_sweep(sweep, processes)
    return warnings if stale == "rerun" else warnings + check_stored_scores(sweep, states)


def _finish(sweep: OpenSweep, chosen: OpenSweep, launch: LaunchOptions, on_slurm: bool) -> int:
    """Write the report, and list the runs without a result."""
    # pandas and Jinja take a second to import, and few commands write a report
    from distill_bench.report.write import ReportError, report

    sweep.write()  # the reference rows are known now
    statuses = read_statuses(chosen.store, chosen.entries, read_queue(chosen.store, on_slurm))
    if any(s.state in ENDED for s in statuses):
        try:
            page = report(sweep.config.name, sweep.store, sweep.out)
            print_table(sweep)
        except ReportError as error:
            raise ConfigError(str(error)) from error
        console.print(str(page))
    stale = [s.run for s in statuses if s.stale]
    if stale and launch.stale == "warn":
        warn(
            f"{len(stale)} results were made by other code: {stale[0]} ... "
            "(--stale=rerun does them again)"
        )
    unfinished = [s for s in statuses if s.state not in ENDED]
    if unfinished:
        print_statuses(unfinished)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
