"""One run from its config to its result: claimed, then train > sample > evaluate, each going on from what is there.

    python -m distill_bench.job RUN_FOLDER             do one run
    python -m distill_bench.job --prepare RUN_FOLDER   make what runs share: the reference rows of its protocol, with their scores

This is what a worker process executes, on this machine or on a node of a cluster; it alone writes into a run's folder.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill_bench import __version__, checkpoint
from distill_bench.config import ConfigError, RunConfig, load_run, method_label
from distill_bench.evaluate import evaluate
from distill_bench.local import DRIVER
from distill_bench.registry import RegistryError, evaluators, find_evaluator
from distill_bench.sample import protocol_hash, references, sample
from distill_bench.store import claim, once, read_json, write_json
from distill_bench.train import train

# How a worker process ends: its run has a result, was stopped in time to go on later, or is in other hands.
DONE, STOPPED, ELSEWHERE, FAILED = 0, 3, 4, 1
AGAINST = ("teacher", "teacher_other", "data", "data_other")  # the reference rows that all others are held against


def execute(run_dir: Path, stop: Callable[[], bool] = lambda: False) -> int:
    """Do the run in `run_dir`, unless it is done or in other hands; returns one of the module's exit codes.

    Any error is written into the attempt's exit.json and printed; it is not raised.
    """
    if (run_dir / "result.json").is_file():
        return DONE
    attempt = claim(run_dir, {"command": f"python -m distill_bench.job {run_dir}"})
    if attempt is None:
        print(f"{run_dir.name} is in other hands", flush=True)
        return ELSEWHERE
    try:
        result = _result(run_dir, stop)
        if result is None:
            attempt.close("stopped")
            return STOPPED
        if attempt.newest():
            write_json(run_dir / "result.json", result)
            shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)  # the kept students are what is used from here on
        attempt.close(result["status"])
        return DONE
    except Exception as error:
        attempt.close("error", f"{type(error).__name__}: {error}")
        traceback.print_exc()
        return FAILED


def _result(run_dir: Path, stop: Callable[[], bool]) -> dict[str, Any] | None:
    """Train, sample and score a run; None where `stop` came first."""
    config = load_run(run_dir)
    summary = train(run_dir, stop)
    if summary["status"] == "stopped":
        return None
    folders: dict[str, Path] = {}
    began = time.perf_counter()
    if checkpoint.students(run_dir):
        folders = prepare(config, run_dir.parent)
        against = {kind: folders[kind] for kind in AGAINST if kind in folders}
        protocol, names = protocol_hash(config), config.protocol.evaluators
        for clips in sample(run_dir):
            at_end = int(clips.name) == summary["student_updates"] and summary["status"] == "done"
            evaluate(clips, against, names, protocol, out=run_dir / "metrics.jsonl" if at_end else None)
    return {
        "run_id": run_dir.name,
        "method": method_label(config.method["name"]),
        "seed": config.seed,
        **summary,
        "evaluate_seconds": round(time.perf_counter() - began, 3),
        "protocol": protocol_hash(config),
        "references": {kind: str(folder.relative_to(run_dir.parent)) for kind, folder in folders.items()},
        "version": __version__,
    }


def prepare(config: RunConfig, store: Path) -> dict[str, Path]:
    """The reference rows of a run's protocol with their scores, made by whoever comes first: kind -> folder.

    A row that the others are held against is not held against itself.
    """
    root = store / "references" / protocol_hash(config)
    marker = root / f"ready-nfe{config.nfe}-{config.stepping}.json"
    names = config.protocol.evaluators
    versions = {name: _version(name) for name in (evaluators() if names is None else names)}

    def ready() -> bool:
        found = read_json(marker)
        return found is not None and found["evaluators"] == versions

    def make() -> None:
        folders = references(config, store)
        for kind, folder in folders.items():
            against = {key: folders[key] for key in AGAINST if key in folders and key != kind}
            evaluate(folder, against, names, protocol_hash(config))
        write_json(marker, {"evaluators": versions, "folders": {kind: folder.name for kind, folder in folders.items()}})

    once(root, ready, make)
    return {kind: root / name for kind, name in read_json(marker)["folders"].items()}


def _version(name: str) -> Any:
    evaluator = find_evaluator(name)()
    return json.loads(json.dumps([evaluator.version, asdict(evaluator)], default=str))


class StopRequest:
    """True once the process was asked to stop, or its driver is gone: training ends at the next update, with a checkpoint."""

    def __init__(self) -> None:
        self.asked, self.driver = False, os.environ.get(DRIVER)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, _: object) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def __call__(self) -> bool:
        return self.asked or (self.driver is not None and os.getppid() != int(self.driver))


def main(argv: list[str] | None = None) -> int:
    """Command line of a worker."""
    parser = argparse.ArgumentParser(prog="distill_bench.job", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run folder with run.yaml")
    parser.add_argument("--prepare", action="store_true", help="make the shared reference rows of its protocol, nothing else")
    options = parser.parse_args(argv)
    try:
        if options.prepare:
            prepare(load_run(options.run), options.run.parent)
            return DONE
        load_run(options.run)
    except (ConfigError, RegistryError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return execute(options.run, StopRequest())


if __name__ == "__main__":
    raise SystemExit(main())
