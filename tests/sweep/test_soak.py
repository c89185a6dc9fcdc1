"""`make soak`: a hundred SIGKILLs at random moments, at drivers and workers, over small local sweeps. Writes results/soak.log.

No run may be lost, none done twice, and each must end in the bits of an undisturbed one.
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
from runs import assert_same_results, workers

from distill_bench.store.claims import attempts
from distill_bench.store.files import read_json
from distill_bench.sweep.__main__ import main

ROOT = Path(__file__).parents[2]
SLOW = ROOT / "tests" / "slurm" / "slow.py"
KILLS, LONGEST_PAUSE = 100, 8.0  # seconds; a worker takes about as long to come up and do a run


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_a_hundred_kills_lose_nothing(tiny_wan: Path, tmp_path: Path, monkeypatch):
    rng, kills, round_number = random.Random(0), 0, 0
    base = {
        "teacher": str(tiny_wan),
        "student_updates": 20,
        "fake_score_updates": 1,
        "batch_size": 2,
        "nfe": 2,
        "frames": 5,
        "height": 16,
        "width": 16,
        "checkpoint_every": 2,
        "log_every": 1,
        "trackers": [],
        "evaluations": 2,
        "threads": 1,
        "protocol": {"clips": 2, "teacher_steps": 2, "evaluators": ["motion"]},
    }
    sweep = {
        "question": "Is anything lost?",
        "base": base,
        "grid": {"method": [f"{SLOW}:Slow", "sgmd"]},
        "seeds": 3,
    }
    file = tmp_path / "soak.yaml"
    file.write_text(json.dumps(sweep))
    assert main(argv(file, tmp_path / "undisturbed", "--cluster=debug")) == 0
    monkeypatch.setenv("SLOW_SECONDS", "0.1")
    lines = [
        f"{time.strftime('%Y-%m-%d %H:%M:%S')} {KILLS} SIGKILLs over sweeps of 6 runs, 2 at once, {os.cpu_count()} cores"
    ]
    while kills < KILLS:
        where, killed, began = (
            tmp_path / f"round-{round_number}",
            {"driver": 0, "worker": 0},
            time.monotonic(),
        )
        driver = None
        while driver is None or driver.poll() != 0:
            if driver is None or driver.poll() is not None:
                command = [
                    sys.executable,
                    "-m",
                    "distill_bench.sweep",
                    *argv(file, where, "--cluster=local", "--jobs=2"),
                ]
                driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
            # a worker whose driver is gone saves and stops: too kind to be the rule
            what = "worker" if rng.random() < 0.8 else "driver"
            time.sleep(rng.uniform(0, LONGEST_PAUSE))
            while what == "worker" and driver.poll() is None and not workers(driver.pid):
                time.sleep(rng.uniform(0, 1))
            running = workers(driver.pid) if what == "worker" else [driver.pid]
            if kills == KILLS:
                driver.wait()
            elif running and driver.poll() is None:
                kill(rng.choice(running))
                killed[what] += 1
                kills += 1
        store = where / "runs"
        assert_same_results(store, tmp_path / "undisturbed" / "runs")
        runs = [path.parent for path in store.glob("*-s*/result.json")]
        ends = [
            [(read_json(a / "exit.json") or {}).get("status", "killed") for a in attempts(run)]
            for run in runs
        ]
        assert len(runs) == 6 and all(end.count("done") <= 1 for end in ends)
        tally = ", ".join(
            f"{sum(e.count(end) for e in ends)} {end}"
            for end in ("killed", "stopped", "error", "done")
        )
        lines.append(
            f"round {round_number}: {killed['driver']} drivers and {killed['worker']} workers killed; "
            f"attempts of 6 runs: {tally}; same bits; {time.monotonic() - began:.0f} s"
        )
        print(lines[-1], flush=True)
        round_number += 1
    lines.append(
        f"{kills} kills, {6 * round_number} runs, none lost, none done twice, all in the bits of an undisturbed sweep"
    )
    log = ROOT / "results" / "soak.log"
    log.parent.mkdir(exist_ok=True)
    log.write_text("\n".join(lines) + "\n")


def argv(file: Path, where: Path, *more: str) -> list[str]:
    return [str(file), f"--store={where / 'runs'}", f"--out={where / 'results'}", *more]


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
