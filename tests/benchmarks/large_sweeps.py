"""CPU seconds of planning, status, submission and report of large sweeps, and how they grow.

    python tests/benchmarks/large_sweeps.py [plan status submission report ...]

`growth` is the ratio of the seconds per run at the larger size to those at the smaller: about 1 if
the time is linear in the runs. `plan-similar` plans beside as many finished runs of equal cost,
which price each planned run. The report's store holds copies of one real run's folder, with the
ids, seeds and settings of a sweep and other scores. `report` has one score and 5 seeds per row;
`report-20` has the twelve scores of the mixture at four evaluations and 20 seeds per row,
`report-1` the same with one seed.
"""

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from distill_bench.config.identity import cost_key
from distill_bench.config.sweep_file import load_sweep
from distill_bench.config.yaml_files import dump_yaml
from distill_bench.report.write import report
from distill_bench.store.files import write_json
from distill_bench.sweep.__main__ import main
from distill_bench.sweep.job import execute
from distill_bench.sweep.launch import (
    LaunchOptions,
    in_launch_order,
    missing_artefacts,
    select_runs,
)
from distill_bench.sweep.manifest import OpenSweep, open_sweep
from distill_bench.sweep.prechecks import check_sweep
from distill_bench.sweep.slurm.queue import Queue

SIZES = {"plan": (1000, 10_000), "status": (1000, 10_000), "submission": (1000, 10_000)}
SIZES |= {"plan-similar": (1000, 10_000)}
REPORTS = {"report": 5, "report-20": 20, "report-1": 1}  # seeds per row
SIZES |= {"report": (250, 1000), "report-20": (200, 1000), "report-1": (200, 1000)}
BASE = {
    "teacher": "gaussian",
    "student_updates": 8,
    "batch_size": 4,
    "nfe": 1,
    "exit_step": "last",
    "guidance_scale": 1.0,
    "evaluations": 4,
    "log_every": 1,
    "signals_every": 4,
    "trackers": [],
    "threads": 1,
    "protocol": {"clips": 4, "teacher_steps": 2, "evaluators": ["exact_divergence"]},
}
TWELVE_SCORES = {
    "teacher": "mixture",
    "protocol": {"clips": 40, "clips_per_prompt": 8, "teacher_steps": 2},
}


def sweep_file(folder: Path, runs: int, seeds: int = 5, twelve_scores: bool = False) -> Path:
    """A sweep of so many runs: two methods, five values of K, and learning rates."""
    rates = [round(1e-4 * (i + 1), 8) for i in range(runs // (10 * seeds))]
    grid = {"method": ["dmd2", "sgmd"], "fake_score_updates": [1, 2, 5, 10, 20]}
    base = BASE | (TWELVE_SCORES if twelve_scores else {})
    content = {"question": "How long does this take?", "base": base, "seeds": seeds}
    path = folder / f"runs-{runs}.yaml"
    path.write_text(dump_yaml(content | {"grid": grid | {"student_lr": rates}}))
    return path


def plan(file: Path, store: Path) -> None:
    """`--dry-run`, without a finished run."""
    run_command([str(file), f"--store={store}", "--cluster=local", "--dry-run"])


def similar_runs(file: Path, store: Path) -> None:
    """Fill a store with a finished run of another sweep per run of this one, at the same cost."""
    for run, config in open_sweep(load_sweep(file), store, store.parent / "results").runs.items():
        folder = store / f"other-{run}"
        folder.mkdir(parents=True)
        (folder / "run.yaml").write_text(dump_yaml(config.model_dump(mode="json")))
        seconds = {"train_seconds": 8.0, "sample_seconds": 1.0, "evaluate_seconds": 2.0}
        result = {"run_id": folder.name, "status": "done", "student_updates": 8} | seconds
        write_json(folder / "result.json", result | {"cost_key": cost_key(config)})


def status(file: Path, store: Path) -> None:
    """`--status` of a store without a manifest of the sweep."""
    run_command([str(file), f"--store={store}", "--cluster=local", "--status"])


def submission(file: Path, store: Path) -> None:
    """Everything that a launch on this machine does before its first run."""
    sweep = open_sweep(load_sweep(file), store, store.parent / "results")
    check_sweep(sweep, 1)
    sweep.record_launch(file)
    sweep.write()
    selected = select_runs(sweep, Queue(), LaunchOptions())
    missing_artefacts(sweep, selected)
    assert len(in_launch_order(sweep, selected)) == len(sweep.runs)


def run_command(arguments: list[str]) -> None:
    """Run `python -m distill_bench.sweep` in this process."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert main(arguments) in (0, 3), output.getvalue()[-1000:]


def filled_store(file: Path, store: Path) -> None:
    """Fill a store with finished runs: copies of one real run."""
    sweep = open_sweep(load_sweep(file), store, store.parent / "results")
    sweep.write()
    first, *others = sweep.runs
    with contextlib.redirect_stdout(io.StringIO()):
        assert execute(store / first) == 0
    draws = np.random.default_rng(0)
    for run in others:
        copy_run(sweep, first, run, float(draws.normal(1, 0.1)))
    sweep.write()  # the references are known now


def copy_run(sweep: OpenSweep, source: str, run: str, factor: float) -> None:
    """Copy the results of a run to another, with its id and scores times a factor."""
    folder = sweep.store / run
    shutil.copytree(
        sweep.store / source,
        folder,
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("run.yaml", "checkpoints", "*.safetensors", "*.pt"),
    )
    result = json.loads((folder / "result.json").read_text())
    write_json(folder / "result.json", result | {"run_id": run})
    for path in folder.rglob("metrics.jsonl"):
        scores = [json.loads(line) for line in path.read_text().splitlines()]
        scores = [score | {"value": factor * score["value"]} for score in scores]
        path.write_text("".join(json.dumps(score) + "\n" for score in scores))


@contextlib.contextmanager
def without_fsync() -> Iterator[None]:
    """Skip the waiting for the disk while a store is filled, which is not measured."""
    fsync, os.fsync = os.fsync, lambda _: None
    try:
        yield
    finally:
        os.fsync = fsync


def cpu_seconds(call: Callable[[], object]) -> float:
    """CPU seconds of a call, those of its child processes included."""
    before = os.times()
    call()
    return sum(os.times()[:4]) - sum(before[:4])


def measure(name: str, runs: int) -> float:
    """CPU seconds of one of SIZES for so many runs."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "runs"
        if name not in REPORTS:
            file = sweep_file(Path(folder), runs)
            if name == "plan-similar":
                with without_fsync():
                    similar_runs(file, store)
            call = globals()[name.removesuffix("-similar")]
            return cpu_seconds(lambda: call(file, store))
        file = sweep_file(Path(folder), runs, REPORTS[name], twelve_scores=name != "report")
        with without_fsync():
            filled_store(file, store)
        return cpu_seconds(lambda: report(file, store, Path(folder) / "results"))


if __name__ == "__main__":
    chosen = sys.argv[1:] or list(SIZES)
    plan(sweep_file(Path(tempfile.mkdtemp()), 50), Path(tempfile.mkdtemp()))  # imports
    print(f"start-up: {time.process_time():.1f} s, once per command")
    for name in chosen:
        small, large = SIZES[name]
        seconds = [measure(name, runs) for runs in (small, large)]
        growth = seconds[1] / large / (seconds[0] / small)
        print(
            f"{name:12} {small:,} runs {seconds[0]:6.2f} s, {large:,} runs {seconds[1]:6.2f} s "
            f"(goal: {30 if name in REPORTS else 5} s), growth {growth:.2f}",
            flush=True,
        )
