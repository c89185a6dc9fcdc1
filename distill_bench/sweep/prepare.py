"""Make artefacts that runs share: scored reference rows, and the extra data of a method.

Each artefact is made once per store, by the first process that needs it.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill_bench.config.protocol import protocol_hash, student_key
from distill_bench.config.resolve import load_run
from distill_bench.config.rows.row import load_row
from distill_bench.config.schema import RunConfig
from distill_bench.evaluate.score import evaluate
from distill_bench.networks.pipeline import pipeline_of
from distill_bench.networks.ranks import ranks
from distill_bench.registry import find_evaluator, usual_evaluators
from distill_bench.sample.reference_kinds import COMPARED
from distill_bench.sample.references import references
from distill_bench.store.claims import attempts, once, read_exit
from distill_bench.store.files import read_record, write_json
from distill_bench.train.extras import providers
from distill_bench.train.inputs import needs_of


def prepare_run(run_dir: Path) -> None:
    """Make a run's shared artefacts, without waiting for rows that another process is making."""
    config = load_run(run_dir)
    if load_row(run_dir) is None:
        prepare_extras(config, run_dir.parent)
    prepare_references(config, run_dir.parent, wait=False)


def prepare_extras(config: RunConfig, store: Path) -> None:
    """Make the extra data that a run's method declares."""
    needs = needs_of(config)
    if needs:
        providers(needs, config, pipeline_of(config, ranks().device, store), store)


def retry_references(config: RunConfig, store: Path) -> None:
    """Repeat the last attempt at a run's reference rows if it failed, before hours of training.

    Raises:
        ValueError: e.g. if an evaluator cannot score the teacher's clips. With several processes,
            which share no scoring, the error of the last attempt.
    """
    tried = attempts(_root(config, store))
    ended = (read_exit(tried[-1]) if tried else None) or {"status": "lost"}
    if ended["status"] != "error" or _folders(config, store) is not None:
        return
    if ranks().world > 1:
        raise ValueError(f"the reference rows failed: {ended.get('error')}")
    prepare_references(config, store, wait=False)


def prepare_references(config: RunConfig, store: Path, wait: bool = True) -> dict[str, Path]:
    """Make and score the reference rows of a run's protocol; returns kind -> folder.

    A reference is never scored against itself. With `wait=False`, returns {} while another process
    is making the rows.
    """
    root = _root(config, store)

    def make() -> None:
        began = time.perf_counter()
        folders = references(config, store)
        for kind, folder in folders.items():
            against = {key: folders[key] for key in COMPARED if key in folders and key != kind}
            score_clips(config, folder, against)
        record = {
            "evaluators": _versions(config),
            "folders": {kind: folder.name for kind, folder in folders.items()},
            "seconds": round(time.perf_counter() - began, 3),
        }
        write_json(_marker(config, root), record)

    once(root, lambda: _folders(config, store) is not None, make, wait)
    return _folders(config, store) or {}


def score_clips(
    config: RunConfig, clips: Path, against: Mapping[str, Path], out: Path | None = None
) -> None:
    """Score a folder of clips by the protocol of a run, see `evaluate`."""
    drawn = config.protocol
    evaluate(clips, against, drawn.evaluators, protocol_hash(config), out=out, device=drawn.device)


def _root(config: RunConfig, store: Path) -> Path:
    return store / "references" / protocol_hash(config)


def _marker(config: RunConfig, root: Path) -> Path:
    """Record of the reference rows of a run, written when all are scored."""
    return root / f"ready-{student_key(config)}.json"


def _folders(config: RunConfig, store: Path) -> dict[str, Path] | None:
    """Folders of a run's reference rows by kind; None unless today's evaluators scored them."""
    root = _root(config, store)
    record = read_record(_marker(config, root), evaluators=dict, folders=dict)
    if record is None or record["evaluators"] != _versions(config):
        return None
    return {kind: root / name for kind, name in record["folders"].items()}


def _versions(config: RunConfig) -> dict[str, Any]:
    names = config.protocol.evaluators
    return {name: _version(name) for name in (usual_evaluators() if names is None else names)}


def _version(name: str) -> Any:
    """Version and settings of an evaluator, as JSON."""
    evaluator = find_evaluator(name)()
    return json.loads(json.dumps([evaluator.version, asdict(evaluator)], default=str))


def bytes_in(*folders: Path) -> int:
    """Total size of the files in the folders, except attempts; it grows with each artefact."""
    size = 0
    for folder in folders:
        for path in folder.rglob("*"):
            if "attempts" in path.parts:
                continue
            try:
                size += path.stat().st_size if path.is_file() else 0
            except OSError:  # removed by another process
                continue
    return size
