"""Do one run from config to result: claim, train, sample, evaluate. Resumes an interrupted run.

    distill-bench job RUN_FOLDER             do one run
    distill-bench job --prepare RUN_FOLDER   make only the artefacts shared with other runs

Worker processes execute this, on this machine or on a node of a cluster. Only they write into a
run's folder.
"""

import argparse
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from distill_bench import __version__
from distill_bench.config.errors import ConfigError
from distill_bench.config.identity import cost_key, short_name
from distill_bench.config.protocol import protocol_hash
from distill_bench.config.resolve import load_run, stored_config
from distill_bench.config.rows.row import RowConfig, load_row
from distill_bench.config.schema import RunConfig
from distill_bench.evaluate.device import scoring_device
from distill_bench.networks.ranks import broadcast, connect
from distill_bench.plan.memory import check_memory
from distill_bench.registry import RegistryError, method_file
from distill_bench.sample.reference_kinds import COMPARED
from distill_bench.sample.references import references
from distill_bench.sample.rows import sample_further, sample_row
from distill_bench.sample.run import sample
from distill_bench.store.claims import (
    Claim,
    attempts,
    end_attempt,
    read_exit,
    read_start,
    try_claim,
)
from distill_bench.store.compiled import compiled_networks
from distill_bench.store.failures import CodeChanged, failure_kind, os_error
from distill_bench.store.files import write_bytes, write_json
from distill_bench.store.machine import keep_freed_memory
from distill_bench.store.runs import (
    error_path,
    output_file,
    read_result,
    record_error,
    requested_samplings,
    run_state,
    unsampled,
)
from distill_bench.store.stop import Stopped, StopRequest
from distill_bench.sweep.local.workers import CLAIMED_ELSEWHERE, DONE, FAILED, STOPPED
from distill_bench.sweep.prepare import (
    bytes_in,
    prepare_references,
    prepare_run,
    retry_references,
    score_clips,
)
from distill_bench.sweep.provenance import code_fingerprint, dirty_diff, provenance
from distill_bench.sweep.status import ENDED, waits_for
from distill_bench.teachers.contents import file_hash
from distill_bench.train import checkpoint
from distill_bench.train.loop import ended, train

STOPS_WITHOUT_PROGRESS = 3  # consecutive; a SLURM job then fails instead of requeueing
MORE_TIME = "give it more time (cluster.hours)"
# errors of a rank that has lost its peer
LOST_RANK = re.compile(r"by peer|remote process exited|Connection was likely closed|Broken pipe")


def execute(
    run_dir: Path, stop: StopRequest | None = None, allow_changed_code: bool = False
) -> int:
    """Do the run in `run_dir`, unless it has a result or is claimed; returns a worker's exit code.

    With several processes (WORLD_SIZE), all train and sample; rank 0 claims the run and scores it.
    Errors are printed and recorded in the attempt's exit.json, not raised.
    """
    stop = stop or StopRequest()
    here = connect()
    claim, code = _claim(run_dir) if here.first else (None, FAILED)
    attempt, code = broadcast((claim and claim.attempt, code))
    if attempt is None:
        return code
    try:
        if claim is None:
            return _follow(run_dir, stop)
        return _lead(run_dir, claim, stop, allow_changed_code)
    except Stopped:
        if claim is None:
            return STOPPED
        return record_stop(run_dir, claim, stop) if claim.is_newest() else _superseded(claim)
    except Exception as error:
        traceback.print_exc()
        message, kind = f"{type(error).__name__}: {error}", failure_kind(error)
        # a lost rank makes the others raise; the run itself has not failed
        status = "lost" if here.world > 1 and LOST_RANK.search(message) else "error"
        try:
            if claim is None:
                end_attempt(attempt, status, error=message, kind=kind)
            else:
                claim.close(status, error=message, kind=kind)
        except OSError:
            record_error(run_dir, message, kind)
        return FAILED


def _claim(run_dir: Path) -> tuple[Claim | None, int]:
    """Claim a run; returns the claim, or None and the exit code that explains its absence."""
    if run_state(run_dir, samplings=requested_samplings(run_dir)) in ENDED:
        return None, DONE
    trains = load_row(run_dir) is None
    if trains and (reason := waits_for(run_dir, stored_config(run_dir).init_run)) is not None:
        print(f"{run_dir.name} {reason}", flush=True)
        return None, FAILED
    try:
        claim = try_claim(
            run_dir, {"command": f"distill-bench job {run_dir}", "log": output_file()}
        )
    except OSError as error:
        message = f"cannot write into {run_dir}: {os_error(error)}"
        record_error(run_dir, message, failure_kind(error))
        return None, FAILED
    if claim is None:
        print(f"{run_dir.name} is claimed by another process", flush=True)
        return None, CLAIMED_ELSEWHERE
    error_path(run_dir).unlink(missing_ok=True)
    return claim, DONE


def _lead(run_dir: Path, claim: Claim, stop: StopRequest, allow_changed_code: bool) -> int:
    """Do a run as rank 0 or its only process, and write its result.

    Raises:
        Stopped: if a stop was requested; training has saved a checkpoint.
    """
    _record_provenance(claim.attempt, run_dir, allow_changed_code)
    scoring_device(load_run(run_dir).protocol.device)  # a missing GPU shows before hours of work
    row, result = load_row(run_dir), read_result(run_dir)
    if result is None:
        result = _trained(run_dir, claim, stop) if row is None else _scored_row(run_dir, row, stop)
        if not claim.is_newest():
            return _superseded(claim)
        write_json(run_dir / "result.json", result)
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)  # the kept students remain
    if result["status"] == "done" and requested_samplings(run_dir):
        with stop.at_once():
            _score_further(run_dir, claim)
        if not claim.is_newest():
            return _superseded(claim)
    claim.close(result["status"])
    return DONE


def _trained(run_dir: Path, claim: Claim, stop: StopRequest) -> dict[str, Any]:
    """Train, sample and score a run; returns its result.

    Raises:
        Stopped: if a stop was requested; training has saved a checkpoint.
    """
    if ended(run_dir) is None:
        with stop.at_once():
            retry_references(load_run(run_dir), run_dir.parent)
    summary = _train(run_dir, lambda: stop() or claim.taken_over)
    if summary["status"] == "stopped":
        raise Stopped
    with stop.at_once():
        return _score(run_dir, summary)


def _follow(run_dir: Path, stop: StopRequest) -> int:
    """Do the work of a rank other than 0: train and sample."""
    row = load_row(run_dir)
    if row is not None:
        with stop.at_once():
            references(load_run(run_dir), run_dir.parent)
            sample_row(run_dir, row)
        return DONE
    summary = _train(run_dir, stop)
    if summary["status"] == "stopped":
        return STOPPED
    if checkpoint.students(run_dir):
        with stop.at_once():
            references(load_run(run_dir), run_dir.parent)
            sample(run_dir)
            if summary["status"] == "done":
                sample_further(run_dir)
    return DONE


def _train(run_dir: Path, stop: Callable[[], bool]) -> dict[str, Any]:
    """Train a run, or read the summary of a finished training, and return the summary.

    Raises:
        ValueError: if the run needs more memory than its device has.
    """
    config = load_run(run_dir)
    if ended(run_dir) is None:
        check_memory(config)
    with compiled_networks(run_dir.parent) if config.compile else nullcontext():
        return train(run_dir, stop)


def _record_provenance(attempt: Path, run_dir: Path, allow_changed_code: bool) -> None:
    """Record the provenance of this attempt: code, packages, machine, job.

    Raises:
        CodeChanged: if the run has a checkpoint made by other code, unless that is allowed.
    """
    trains = load_row(run_dir) is None
    method = load_run(run_dir).method["name"] if trains else ""
    code, file = code_fingerprint(method), method_file(method) if trains else None
    start = read_start(attempt) | provenance() | {"code_fingerprint": code}
    write_json(attempt / "start.json", start)
    if file is not None:  # it may be outside the repository
        write_bytes(attempt / file.name, file.read_bytes())
    diff = dirty_diff()
    if diff:
        write_bytes(attempt / "dirty.diff", diff.encode())
    first = next(code for code in _recorded(run_dir, "code_fingerprint") if code)
    # of a run with a result only clips are left, which record their code themselves
    unfinished = read_result(run_dir) is None
    has_output = checkpoint.folders(run_dir) or (run_dir / "train.json").is_file()
    if first != code and unfinished and has_output and not allow_changed_code:
        raise CodeChanged(
            f"the code has changed since this run began (fingerprint {first}, now {code}): "
            f"resume with --allow-changed-code, or remove {run_dir} to start again"
        )


def _recorded(run_dir: Path, key: str) -> list[str]:
    """Distinct values under a key of the attempts' start.json, oldest first."""
    starts = [read_start(attempt) for attempt in attempts(run_dir)]
    return list(dict.fromkeys(start[key] for start in starts if key in start))


def _score(run_dir: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """Sample and score a trained run; returns its result."""
    config = load_run(run_dir)
    students = checkpoint.students(run_dir)
    # shared by all runs, so not part of this run's seconds
    folders = prepare_references(config, run_dir.parent) if students else {}
    began = time.perf_counter()
    folders_of_clips = sample(run_dir) if students else []
    sampled = time.perf_counter()
    for clips in folders_of_clips:
        at_end = int(clips.name) == summary["student_updates"] and summary["status"] == "done"
        _evaluate(config, clips, folders, run_dir / "metrics.jsonl" if at_end else None)
    return {
        "method": short_name(config.method["name"]),
        "seed": config.seed,
        **summary,
        "cost_key": cost_key(config),
        # other runs may start from this student
        "student_content": file_hash(students[max(students)]) if students else None,
        "sample_seconds": round(sampled - began, 3),  # part of evaluate_seconds
    } | _record(run_dir, config, folders, began)


def _record(
    run_dir: Path, config: RunConfig, folders: Mapping[str, Path], began: float
) -> dict[str, Any]:
    """Entries of every result.

    Args:
        folders: reference rows by kind.
        began: start of sampling and scoring, by `time.perf_counter`.
    """
    return {
        "run_id": run_dir.name,
        "evaluate_seconds": round(time.perf_counter() - began, 3),
        "protocol": protocol_hash(config),
        "references": {
            kind: str(folder.relative_to(run_dir.parent)) for kind, folder in folders.items()
        },
        "version": __version__,
        "code_fingerprint": "+".join(_recorded(run_dir, "code_fingerprint")),
        "hardware": " + ".join(_recorded(run_dir, "hardware")),
    }


def _scored_row(run_dir: Path, row: RowConfig, stop: StopRequest) -> dict[str, Any]:
    """Sample and score a row that trains nothing; returns its result."""
    config = load_run(run_dir)
    with stop.at_once():
        folders = prepare_references(config, run_dir.parent)
        began = time.perf_counter()
        _evaluate(config, sample_row(run_dir, row), folders, run_dir / "metrics.jsonl")
        trained = {"status": "done", "student_updates": 0, "train_seconds": 0.0}
        return trained | {"nfe": row.sampling.nfe} | _record(run_dir, config, folders, began)


def _score_further(run_dir: Path, claim: Claim) -> None:
    """Sample and score the last student in the requested ways that have no result yet."""
    config = load_run(run_dir)
    folders = prepare_references(config, run_dir.parent)
    code = read_start(claim.attempt)["code_fingerprint"]
    sampled = sample_further(run_dir)
    for name in unsampled(run_dir, requested_samplings(run_dir)):
        folder, began = run_dir / "samplings" / name, time.perf_counter()
        _evaluate(config, folder, folders)
        result = {
            "protocol": protocol_hash(config),
            "sampling": sampled[folder].model_dump(mode="json"),
            "evaluate_seconds": round(time.perf_counter() - began, 3),
            "code_fingerprint": code,
        }
        if claim.is_newest():
            write_json(folder / "result.json", result)


def _evaluate(
    config: RunConfig, clips: Path, folders: Mapping[str, Path], out: Path | None = None
) -> None:
    """Score a folder of clips against the reference rows of its protocol."""
    against = {kind: folders[kind] for kind in COMPARED if kind in folders}
    score_clips(config, clips, against, out)


def record_stop(run_dir: Path, claim: Claim, stop: StopRequest) -> int:
    """End an attempt on request; a SLURM job stopped repeatedly without progress fails."""
    updates = [int(folder.name) for folder in checkpoint.folders(run_dir)]
    trained = (run_dir / "train.json").is_file()
    rows = run_dir.parent / "references" / protocol_hash(load_run(run_dir))
    progress = {
        "student_updates": updates[-1] if updates else 0,
        "trained": trained,
        "bytes": bytes_in(run_dir / "samples", run_dir / "samplings", rows),
    }
    before = [read_exit(a) or {} for a in attempts(run_dir)[-STOPS_WITHOUT_PROGRESS:-1]]
    stuck = len(before) == STOPS_WITHOUT_PROGRESS - 1 and all(
        progress.items() <= end.items() for end in before
    )
    if stuck and "SLURM_JOB_ID" in os.environ:
        stage = ", in its evaluation," if trained else ""
        error = (
            f"stopped {STOPS_WITHOUT_PROGRESS} times at student update "
            f"{progress['student_updates']}{stage} without progress: {MORE_TIME}"
        )
        claim.close("error", error=error, kind="timeout")
        return FAILED
    claim.close("stopped", signal=stop.signal and stop.signal.name, **progress)
    return STOPPED


def _superseded(claim: Claim) -> int:
    """End without a result: another process took the run over while this one was silent."""
    print(f"{claim.attempt.parent.parent.name} was taken over by another process", flush=True)
    claim.close("superseded")
    return CLAIMED_ELSEWHERE


def main(argv: list[str] | None = None) -> int:
    """Run a worker; returns its exit code."""
    keep_freed_memory()
    stop = StopRequest().listen()
    parser = argparse.ArgumentParser(prog="distill-bench job", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder with a run.yaml")
    parser.add_argument(
        "--prepare", action="store_true", help="make only the artefacts shared with other runs"
    )
    parser.add_argument(
        "--allow-changed-code",
        action="store_true",
        help="resume a run that began under other code",
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
