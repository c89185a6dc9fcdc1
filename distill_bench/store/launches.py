"""Records of launches: the sweep file's digest and contrasts, kept from before its first run on.

A record is a file of its own that is never changed, one per content of the sweep file. Folders of
several stores can be merged by copying.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_bench.store.files import read_record, write_json


def record_launch(
    store: Path, sweep: str, digest: str, contrasts: Mapping[str, Any], begun: int
) -> bool:
    """Record a launch unless one of the same sweep file is recorded; returns whether it was.

    Args:
        digest: SHA-256 of the sweep file, hexadecimal.
        contrasts: name -> definition.
        begun: runs of the sweep that have been attempted before this launch, by any sweep.
    """
    if any(record["digest"] == digest for record in read_launches(store, sweep)):
        return False
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    path = _folder(store, sweep) / f"{now.replace(':', '')}-{digest[:12]}.json"
    record = {"time": now, "digest": digest, "contrasts": dict(contrasts), "begun": begun}
    write_json(path, record)
    return True


def read_launches(store: Path, sweep: str) -> list[dict[str, Any]]:
    """The records of a sweep, oldest first."""
    records = [
        read_record(path, time=str, digest=str, contrasts=dict, begun=int)
        for path in _folder(store, sweep).glob("*.json")
    ]
    return sorted(filter(None, records), key=lambda record: (record["time"], record["digest"]))


def _folder(store: Path, sweep: str) -> Path:
    return store / "sweeps" / sweep
