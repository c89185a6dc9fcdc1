"""`make soak`: a hundred SIGKILLs at random moments, at drivers and workers of small local sweeps.

No run may be lost, none done twice, and each must end with the bits of an undisturbed run. Writes
results/soak.log.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import TINY_RUN, assert_same_results, workers

from distill_bench.store.claims import attempts
from distill_bench.store.files import read_json
from distill_bench.sweep.__main__ import main

ROOT = Path(__file__).parents[2]
SLOW = ROOT / "tests" / "slurm" / "slow.py"
KILLS = 100
LONGEST_PAUSE = 8.0  # seconds; a worker takes about as long to start and do a run
WORKER_SHARE = 0.8  # of the kills; a worker whose driver is killed saves, which is too kind


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_a_hundred_kills_lose_nothing(tiny_wan: Path, tmp_path: Path, monkeypatch):
    file = write_sweep(tmp_path / "soak.yaml", tiny_wan)
    assert main(arguments(file, tmp_path / "undisturbed", "--cluster=debug")) == 0
    monkeypatch.setenv("SLOW_SECONDS", "0.1")
    rng = random.Random(0)
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    lines = [f"{now} {KILLS} SIGKILLs over sweeps of 6 runs, 2 at once, {os.cpu_count()} cores"]
    kills, rounds = 0, 0
    while kills < KILLS:
        where, began = tmp_path / f"round-{rounds}", time.monotonic()
        killed = disturbed_sweep(file, where, rng, KILLS - kills)
        kills += sum(killed.values())
        assert_same_results(where / "runs", tmp_path / "undisturbed" / "runs")
        ends = ends_of_runs(where / "runs")
        assert len(ends) == 6
        assert all(end.count("done") <= 1 for end in ends)
        kinds = ("killed", "stopped", "error", "done")
        tally = ", ".join(f"{sum(end.count(kind) for end in ends)} {kind}" for kind in kinds)
        lines.append(
            f"round {rounds}: {killed['driver']} drivers and {killed['worker']} workers killed; "
            f"attempts of 6 runs: {tally}; same bits; {time.monotonic() - began:.0f} s"
        )
        print(lines[-1], flush=True)
        rounds += 1
    lines.append(
        f"{kills} kills, {6 * rounds} runs, none lost, none done twice, "
        "all in the bits of an undisturbed sweep"
    )
    (ROOT / "results" / "soak.log").write_text("\n".join(lines) + "\n")


def write_sweep(path: Path, teacher: Path) -> Path:
    """Write a sweep of six runs."""
    base = TINY_RUN | {"teacher": str(teacher), "student_updates": 20, "fake_score_updates": 1}
    base |= {"batch_size": 2, "checkpoint_every": 2, "evaluations": 2, "threads": 1}
    del base["method"]
    grid = {"method": [f"{SLOW}:Slow", "sgmd"]}
    sweep = {"question": "Is anything lost?", "base": base, "grid": grid, "seeds": 3}
    path.write_text(json.dumps(sweep))
    return path


def disturbed_sweep(file: Path, where: Path, rng: random.Random, most: int) -> dict[str, int]:
    """Run a sweep to its end, killing its driver and workers; returns the kills of each."""
    killed = {"driver": 0, "worker": 0}
    driver = None
    while driver is None or driver.poll() != 0:
        if driver is None or driver.poll() is not None:
            options = arguments(file, where, "--cluster=local", "--jobs=2")
            argv = [sys.executable, "-m", "distill_bench.sweep", *options]
            driver = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL)
        target = "worker" if rng.random() < WORKER_SHARE else "driver"
        time.sleep(rng.uniform(0, LONGEST_PAUSE))
        while target == "worker" and driver.poll() is None and not workers(driver.pid):
            time.sleep(rng.uniform(0, 1))
        running = workers(driver.pid) if target == "worker" else [driver.pid]
        if sum(killed.values()) == most:
            driver.wait()
        elif running and driver.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(running), signal.SIGKILL)
            killed[target] += 1
    return killed


def ends_of_runs(store: Path) -> list[list[str]]:
    """Final status of every attempt, per finished run."""
    return [
        [(read_json(a / "exit.json") or {}).get("status", "killed") for a in attempts(path.parent)]
        for path in store.glob("*-s*/result.json")
    ]


def arguments(file: Path, where: Path, *more: str) -> list[str]:
    return [str(file), f"--store={where / 'runs'}", f"--out={where / 'results'}", *more]
