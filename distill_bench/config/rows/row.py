"""Rows that train nothing: a network, and a way to sample it for a protocol."""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from distill_bench.config.protocol import protocol_hash
from distill_bench.config.rows.sampling import (
    Sampling,
    SamplingConfig,
    own_sampling,
    teacher_sampling,
    ways,
)
from distill_bench.config.schema import RunConfig
from distill_bench.config.validation import StrictModel, validate
from distill_bench.config.yaml_files import load_yaml

ROW_FILE = "row.yaml"  # beside the run.yaml that states teacher, sizes and protocol
TEACHER, UNTRAINED = "teacher", "untrained"


class RowConfig(StrictModel):
    """Contents of row.yaml."""

    label: str
    """Name in tables."""
    network: str
    """`teacher`, or `untrained`: the student before training."""
    sampling: Sampling


def row_id(row: RowConfig, config: RunConfig) -> str:
    """`row-<network>-<hash>`; the hash covers the protocol, the network and its sampling.

    Args:
        config: a run of the sweep, which states teacher, start of the student and protocol.
    """
    content: dict[str, Any] = {
        "protocol": protocol_hash(config),
        "network": row.network,
        "sampling": row.sampling.model_dump(mode="json"),
    }
    if row.network == UNTRAINED:
        content["student"] = config.student_hash
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
    slug = re.sub(r"[^A-Za-z0-9.]+", "_", row.network).strip("_.")
    return f"row-{slug}-{digest}"


def load_row(folder: Path) -> RowConfig | None:
    """The row of a folder in the store; None for the folder of a run.

    Raises:
        ConfigError: if its row.yaml is invalid.
    """
    path = folder / ROW_FILE
    return validate(RowConfig, load_yaml(path), str(path)) if path.is_file() else None


def sampled_rows(
    entries: Iterable[SamplingConfig], runs: Iterable[RunConfig]
) -> dict[str, tuple[RowConfig, RunConfig]]:
    """Rows of the untrained student and of the teacher that `sampling` asks for, by id.

    The untrained student's rows leave out the ways of the runs, which are reference rows already.

    Returns:
        Per row: its config, and the first run with its protocol and its student's start.
    """
    entries, runs = list(entries), list(runs)
    known = {(config.student_hash, own_sampling(config).name) for config in runs}
    rows: dict[str, tuple[RowConfig, RunConfig]] = {}
    for config in runs:
        usual = {UNTRAINED: own_sampling(config), TEACHER: teacher_sampling(config)}
        for network, own in usual.items():
            for way in ways(entries, network, own):
                if network == UNTRAINED and (config.student_hash, way.name) in known:
                    continue
                label = f"{network}, {way.words(own)}"
                row = RowConfig(label=label, network=network, sampling=way)
                rows.setdefault(row_id(row, config), (row, config))
    return rows
