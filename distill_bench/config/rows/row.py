"""Rows that train nothing: a network, and a way to sample it for a protocol."""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from distill_bench.config.errors import ConfigError
from distill_bench.config.protocol import protocol_hash, student_start
from distill_bench.config.rows.sampling import (
    Sampling,
    SamplingConfig,
    check_levels,
    own_sampling,
    teacher_sampling,
    ways,
)
from distill_bench.config.schema import GuidanceKey, RunConfig, SteppingKey
from distill_bench.config.validation import Count, StrictModel, validate
from distill_bench.config.yaml_files import load_yaml
from distill_bench.teachers.contents import content_hash, file_hash, read_config
from distill_bench.teachers.diffusers_folder import transformer_folders
from distill_bench.teachers.kinds import find_teacher

ROW_FILE = "row.yaml"  # beside the run.yaml that states teacher, sizes and protocol
TEACHER, UNTRAINED = "teacher", "untrained"


class ReleasedRow(StrictModel):
    """Entry of `rows`: a network that was trained elsewhere, sampled and scored as the students.

    Keys that are left out are those of the sweep's first run.
    """

    name: str = Field(min_length=1)
    """Name in tables."""
    network: str
    """Pipeline folder, file of a transformer's weights (.safetensors, .pt), or LoRA file."""
    stepping: SteppingKey | None = None
    """As `stepping` of a run."""
    nfe: Count | None = None
    """Number of steps."""
    shift: float | None = Field(None, gt=0)
    """Shift of the noise levels."""
    sigmas: tuple[float, ...] = ()
    """Noise levels from 1 down, one per step, instead of `nfe` and `shift`."""
    guidance_scale: GuidanceKey = 1.0
    """Guidance scale, as `guidance_scale` of a run; 1: none."""

    @model_validator(mode="after")
    def _check_levels(self) -> "ReleasedRow":
        check_levels(self.sigmas, self.nfe, self.shift)
        return self


class RowConfig(StrictModel):
    """Contents of row.yaml."""

    label: str
    """Name in tables."""
    network: str
    """`teacher`; `untrained`: the student before training; or folder or file of a network."""
    network_hash: str = ""
    """Hash of that folder or file."""
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
        content["student"] = student_start(config)
    if row.network_hash:
        content["network"] = row.network_hash
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
    name = row.label if row.network_hash else row.network
    slug = re.sub(r"[^A-Za-z0-9.]+", "_", name).strip("_.")
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
    known = {(student_start(config), own_sampling(config).name) for config in runs}
    rows: dict[str, tuple[RowConfig, RunConfig]] = {}
    for config in runs:
        usual = {UNTRAINED: own_sampling(config), TEACHER: teacher_sampling(config, config.nfe)}
        for network, own in usual.items():
            for way in ways(entries, network, own):
                if network == UNTRAINED and (student_start(config), way.name) in known:
                    continue
                label = f"{network}, {way.words(own)}"
                row = RowConfig(label=label, network=network, sampling=way)
                rows.setdefault(row_id(row, config), (row, config))
    return rows


def released_rows(
    entries: Iterable[ReleasedRow], config: RunConfig
) -> dict[str, tuple[RowConfig, RunConfig]]:
    """Rows of networks that were trained elsewhere, by id, each with the given run.

    Raises:
        ConfigError: if the teacher cannot take other weights, or a folder or file is missing.
    """
    rows: dict[str, tuple[RowConfig, RunConfig]] = {}
    for entry in entries:
        where = f"rows: {entry.name}"
        teacher = find_teacher(config.teacher)
        if not teacher.has_networks:
            raise ConfigError(f"{where}: a {teacher.kind} teacher has no networks; leave it out")
        path = Path(entry.network).expanduser().absolute()
        if not path.exists():
            raise ConfigError(
                f"{where}: network {entry.network!r} is neither a folder nor a file; "
                "name a pipeline folder, or a file of weights"
            )
        folder = path.is_dir()
        if folder and not (path / "transformer").is_dir():
            raise ConfigError(f"{where}: {path} is no pipeline folder: it lacks transformer")
        row = RowConfig(
            label=entry.name,
            network=str(path),
            network_hash=_pipeline_hash(path) if folder else file_hash(path),
            sampling=_sampling(entry, own_sampling(config)),
        )
        if any(row.label == other.label for other, _ in rows.values()):
            raise ConfigError(f"{where}: two rows have this name; give each its own")
        rows[row_id(row, config)] = (row, config)
    return rows


def _pipeline_hash(folder: Path) -> str:
    """Hash of a pipeline's transformer, or of its experts and their boundary."""
    hashes = [content_hash(part) for part in transformer_folders(folder)]
    if len(hashes) > 1:
        hashes.append(str(read_config(folder, "model_index.json").get("boundary_ratio")))
    return "-".join(hashes)


def _sampling(entry: ReleasedRow, own: Sampling) -> Sampling:
    keys = ("stepping", "nfe", "shift", "guidance_scale")
    stated = {key: value for key in keys if (value := getattr(entry, key)) is not None}
    if entry.sigmas:
        stated |= {"nfe": len(entry.sigmas), "shift": None, "sigmas": entry.sigmas}
    return own.model_copy(update=stated)
