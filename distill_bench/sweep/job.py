"""One run from its config to its result: claimed, then train > sample > evaluate, each going on from what is there.

    distill-bench job RUN_FOLDER             do one run
    distill-bench job --prepare RUN_FOLDER   make what runs share: extra data of its method, reference rows with scores

This is what a worker process executes, on this machine or on a node of a cluster; it alone writes into a run's folder.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from distill_bench import __version__
from distill_bench.config.errors import ConfigError
from distill_bench.config.identity import cost_key, short_name
from distill_bench.config.protocol import protocol_hash, student_key
from distill_bench.config.resolve import load_run
from distill_bench.config.schema import RunConfig
from distill_bench.evaluate.score import REFERENCES, evaluate
from distill_bench.networks.pipeline import pipeline_of
from distill_bench.networks.ranks import broadcast, connect, ranks
from distill_bench.plan.memory import check_memory
from distill_bench.registry import RegistryError, evaluators, find_evaluator, method_file
from distill_bench.sample.references import references
from distill_bench.sample.run import sample
from distill_bench.store.claims import Claim, attempts, claim, end_attempt, end_of, once, start_of
from distill_bench.store.files import kind_of_write, read_json, read_record, write_bytes, write_json
from distill_bench.store.runs import output_file, record_outside, result_of
from distill_bench.store.stop import Stopped, StopRequest
from distill_bench.sweep.provenance import code_fingerprint, dirty_diff, provenance
from distill_bench.train import checkpoint
from distill_bench.train.extras import providers
from distill_bench.train.inputs import needs_of
from distill_bench.train.loop import ended, train

# How a worker process ends: its run has a result, was stopped in time to go on later, or is in other hands.
DONE, STOPPED, ELSEWHERE, FAILED = 0, 3, 4, 1
LIVES_WITHOUT_PROGRESS = 3
MORE_TIME = "give it more time (cluster.hours)"
# what a rank says of another that is gone
LOST_RANK = re.compile(r"by peer|remote process exited|Connection was likely closed|Broken pipe")


class CodeChanged(RuntimeError):
    """The code is not that of the attempt before."""


def execute(
    run_dir: Path, stop: StopRequest | None = None, allow_changed_code: bool = False
) -> int:
    """Do the run in `run_dir`, unless it is done or in other hands; returns one of the module's exit codes.

    Any error is written into the attempt's exit.json (where even that fails, into errors/ of the store) and printed; it is not
    raised. With several processes (WORLD_SIZE) the first claims, and samples and scores when all have trained.
    """
    stop = stop or StopRequest()
    here = connect()
    mine, code = _begin(run_dir) if here.first else (None, FAILED)
    attempt, code = broadcast((mine and mine.attempt, code))
    if attempt is None:
        return code
    try:
        if mine is not None:
            _record(mine.attempt, run_dir, allow_changed_code)
        if ended(run_dir) is None:
            check_memory(load_run(run_dir))
        summary = train(run_dir, stop if mine is None else lambda: stop() or mine.taken_over)
        if mine is None:
            if summary["status"] != "stopped" and checkpoint.students(run_dir):
                with stop.at_once():  # its share of the clips
                    references(load_run(run_dir), run_dir.parent)
                    sample(run_dir)
            return STOPPED if summary["status"] == "stopped" else DONE
        with stop.at_once():
            result = _result(run_dir, summary)
        if not mine.newest():
            return _superseded(mine)
        write_json(run_dir / "result.json", result)
        shutil.rmtree(
            run_dir / "checkpoints", ignore_errors=True
        )  # the kept students are what is used from here on
        mine.close(result["status"])
        return DONE
    except Stopped:
        if mine is None:
            return STOPPED
        return _stopped(run_dir, mine, stop) if mine.newest() else _superseded(mine)
    except Exception as error:
        traceback.print_exc()
        said = {"error": f"{type(error).__name__}: {error}", "kind": kind_of(error)}
        # a rank that was killed is no failure of the run, though the others say so
        status = "lost" if here.world > 1 and LOST_RANK.search(said["error"]) else "error"
        try:
            end_attempt(attempt, status, **said) if mine is None else mine.close(status, **said)
        except OSError:
            record_outside(run_dir, **said)
        return FAILED


def _superseded(mine: Claim) -> int:
    """End quietly: somebody took the run over (this process had been silent for long), and the results are theirs."""
    print(f"{mine.attempt.parent.parent.name} was taken over", flush=True)
    mine.close("superseded")
    return ELSEWHERE


def _begin(run_dir: Path) -> tuple[Claim | None, int]:
    """The claim of a run, or why there is none."""
    if result_of(run_dir) is not None:
        return None, DONE
    read_record(
        run_dir / "train.json", status=str
    )  # what says nothing is out of the way before training reads it
    try:
        mine = claim(run_dir, {"command": f"distill-bench job {run_dir}", "log": output_file()})
    except OSError as error:
        record_outside(
            run_dir, error=f"cannot write into {run_dir}: {error.strerror}", kind=kind_of(error)
        )
        return None, FAILED
    if mine is None:
        print(f"{run_dir.name} is in other hands", flush=True)
        return None, ELSEWHERE
    (run_dir.parent / "errors" / f"{run_dir.name}.json").unlink(missing_ok=True)
    return mine, DONE


def _record(attempt: Path, run_dir: Path, allow_changed_code: bool) -> None:
    """Write where this attempt's numbers come from; a run does not go on under other code than it began with, unless allowed.

    Raises:
        CodeChanged: with both fingerprints.
    """
    method = load_run(run_dir).method["name"]
    code, file = code_fingerprint(method), method_file(method)
    write_json(
        attempt / "start.json", start_of(attempt) | provenance() | {"code_fingerprint": code}
    )
    if file is not None:
        write_bytes(
            attempt / file.name, file.read_bytes()
        )  # it may be in no commit, nor in the checkout
    diff = dirty_diff()
    if diff:
        write_bytes(attempt / "dirty.diff", diff.encode())
    began = [code for code in _of_attempts(run_dir, "code_fingerprint") if code]
    if (
        began[0] != code
        and not allow_changed_code
        and (checkpoint.found(run_dir) or (run_dir / "train.json").is_file())
    ):
        raise CodeChanged(
            f"the code has changed since this run began (fingerprint {began[0]}, now {code}): "
            f"--allow-changed-code goes on all the same; to begin anew, remove {run_dir}"
        )


def _of_attempts(run_dir: Path, key: str) -> list[str]:
    """What a run's attempts record under a key, each once, oldest first."""
    starts = [start_of(attempt) for attempt in attempts(run_dir)]
    return list(dict.fromkeys(start[key] for start in starts if key in start))


def _stopped(run_dir: Path, mine: Claim, stop: StopRequest) -> int:
    """End an attempt on request, or as a failure where the run never gets anywhere before it is stopped."""
    newest = [int(folder.name) for folder in checkpoint.found(run_dir)[-1:]] or [0]
    trained = (run_dir / "train.json").is_file()
    before = [end_of(a) or {} for a in attempts(run_dir)[-LIVES_WITHOUT_PROGRESS:-1]]
    rows = run_dir.parent / "references" / protocol_hash(load_run(run_dir))
    at = {
        "student_updates": newest[0],
        "trained": trained,
        "bytes": bytes_in(run_dir / "samples", rows),
    }
    stuck = len(before) == LIVES_WITHOUT_PROGRESS - 1 and all(
        at.items() <= end.items() for end in before
    )
    if stuck and "SLURM_JOB_ID" in os.environ:
        stage = ", in its evaluation," if trained else ""
        error = f"stopped {LIVES_WITHOUT_PROGRESS} times at student update {newest[0]}{stage} with nothing new: {MORE_TIME}"
        mine.close("error", error=error, kind="timeout")
        return FAILED
    mine.close("stopped", signal=stop.signal and stop.signal.name, **at)
    return STOPPED


def bytes_in(*folders: Path) -> int:
    """The size of what clips and scores there are: it changes as long as something is made. Attempts make nothing."""
    size = 0
    for path in (
        path for folder in folders for path in folder.rglob("*") if "attempts" not in path.parts
    ):
        with contextlib.suppress(OSError):  # others work here
            size += path.stat().st_size if path.is_file() else 0
    return size


def _result(run_dir: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """Sample and score a trained run."""
    if summary["status"] == "stopped":
        raise Stopped
    config = load_run(run_dir)
    students = checkpoint.students(run_dir)
    folders = (
        prepare(config, run_dir.parent) if students else {}
    )  # of all runs: no part of this one's seconds
    began = time.perf_counter()
    if students:
        against = {kind: folders[kind] for kind in REFERENCES if kind in folders}
        protocol, names = protocol_hash(config), config.protocol.evaluators
        for clips in sample(run_dir):
            at_end = int(clips.name) == summary["student_updates"] and summary["status"] == "done"
            evaluate(
                clips, against, names, protocol, out=run_dir / "metrics.jsonl" if at_end else None
            )
    return {
        "run_id": run_dir.name,
        "method": short_name(config.method["name"]),
        "seed": config.seed,
        **summary,
        "evaluate_seconds": round(time.perf_counter() - began, 3),
        "protocol": protocol_hash(config),
        "references": {
            kind: str(folder.relative_to(run_dir.parent)) for kind, folder in folders.items()
        },
        "version": __version__,
        "code_fingerprint": "+".join(_of_attempts(run_dir, "code_fingerprint")),
        "hardware": " + ".join(_of_attempts(run_dir, "hardware")),
        "cost_key": cost_key(config),
    }


# --- what runs share ---


def prepare(config: RunConfig, store: Path, wait: bool = True) -> dict[str, Path]:
    """The reference rows of a run's protocol with their scores, made by whoever comes first: kind -> folder.

    A row that the others are held against is not held against itself. Who does not `wait` for another that makes them gets none.
    """
    root = store / "references" / protocol_hash(config)
    marker = root / f"ready-{student_key(config)}.json"
    names = config.protocol.evaluators
    versions = {name: _version(name) for name in (evaluators() if names is None else names)}

    def ready() -> bool:
        found = read_record(marker, evaluators=dict, folders=dict)
        return found is not None and found["evaluators"] == versions

    def make() -> None:
        began = time.perf_counter()
        folders = references(config, store)
        for kind, folder in folders.items():
            against = {key: folders[key] for key in REFERENCES if key in folders and key != kind}
            evaluate(folder, against, names, protocol_hash(config))
        made = {kind: folder.name for kind, folder in folders.items()}
        write_json(
            marker,
            {
                "evaluators": versions,
                "folders": made,
                "seconds": round(time.perf_counter() - began, 3),
            },
        )

    once(root, ready, make, wait)
    return (
        {kind: root / name for kind, name in read_json(marker)["folders"].items()}
        if wait or ready()
        else {}
    )


def prepare_run(run_dir: Path) -> None:
    """Everything that a run shares with others, but for reference rows that another process is making: no slot waits for them."""
    config = load_run(run_dir)
    prepare_extras(config, run_dir.parent)
    prepare(config, run_dir.parent, wait=False)


def prepare_extras(config: RunConfig, store: Path) -> None:
    """The extra data that a run needs, made by whoever comes first."""
    needs = needs_of(config)
    if needs:
        providers(needs, config, pipeline_of(config, ranks().device, store), store)


def _version(name: str) -> Any:
    evaluator = find_evaluator(name)()
    return json.loads(json.dumps([evaluator.version, asdict(evaluator)], default=str))


# --- failures ---


def kind_of(error: BaseException) -> str:
    """The kind of a failure, for `--retry-failed=KIND`."""
    said = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "CUDA out of memory" in said:
        return "cuda_oom"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in said:
        return "host_oom"
    if (
        "No space left on device" in said or "Disk quota exceeded" in said
    ):  # safetensors has an error of its own
        return "disk_full"
    if isinstance(error, CodeChanged):
        return "code_changed"
    return kind_of_write(error) if isinstance(error, OSError) else "exception"


def main(argv: list[str] | None = None) -> int:
    """Command line of a worker."""
    stop = StopRequest().listen()
    parser = argparse.ArgumentParser(prog="distill-bench job", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run folder with run.yaml")
    parser.add_argument("--prepare", action="store_true", help="make what runs share, nothing else")
    parser.add_argument(
        "--allow-changed-code",
        action="store_true",
        help="go on under other code than the run began with",
    )
    options = parser.parse_args(argv)
    try:
        load_run(options.run)
        if options.prepare:
            with stop.at_once():
                prepare_run(options.run)
            return DONE
    except (ConfigError, RegistryError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except Stopped:
        return STOPPED
    return execute(options.run, stop, options.allow_changed_code)


if __name__ == "__main__":
    raise SystemExit(main())
