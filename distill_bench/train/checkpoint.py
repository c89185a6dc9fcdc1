"""Checkpoints in files, renamed into place, and the students that a run leaves to be sampled.

checkpoints/<student_updates>/{weights,optimisers}.safetensors, state.json     to resume from; only the newest are kept
students/<student_updates>.safetensors                                         to sample from; all are kept
"""

import contextlib
import itertools
import json
import os
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from distill_bench.config.schema import AdapterConfig
from distill_bench.networks.sharding import shard_as, whole
from distill_bench.store.files import atomic_file, read_json, write_json

KEPT = 2
_DTYPES = {  # as safetensors calls them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save(
    run_dir: Path,
    student_updates: int,
    roles: Mapping[str, nn.Module],
    ema: Mapping[str, Tensor],
    optimisers: Mapping[str, torch.optim.Optimizer],
    state: dict,
    writes: bool = True,
) -> None:
    """Write one checkpoint whole or not at all, then prune all but the newest two.

    Every rank must call it where weights are sharded; one of them `writes`.
    """
    weights = {f"{role}.{k}": v for role, net in roles.items() for k, v in net.state_dict().items()}
    weights |= {f"ema.{k}": v for k, v in ema.items()}
    moments = {
        f"{group}.{index}.{key}": value
        for group, optimiser in optimisers.items()
        for index, entry in optimiser.state_dict()["state"].items()
        for key, value in entry.items()
    }
    files = {"weights.safetensors": weights, "optimisers.safetensors": moments}
    if not writes:
        for tensors in files.values():
            write_tensors(None, tensors)
        return
    root = run_dir / "checkpoints"
    root.mkdir(exist_ok=True)
    for torn in root.glob(".writing-*"):  # a run has one writer: this is what a killed one left
        shutil.rmtree(torn, ignore_errors=True)
    temporary = root / f".writing-{os.getpid()}"
    temporary.mkdir()
    try:
        for name, tensors in files.items():
            with atomic_file(temporary / name) as file:
                write_tensors(file, tensors)
        checksums = {path.name: _checksum(path) for path in temporary.iterdir()}
        write_json(temporary / "state.json", state | {"checksums": checksums})
        final = root / str(student_updates)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in found(run_dir)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def write_tensors(file: BinaryIO | None, tensors: Mapping[str, Tensor]) -> None:
    """Tensors by name into a safetensors file, one by one: safetensors' own writer wants them all in host memory at once.

    Shards are gathered, for which every rank must call it; who has no `file` only takes part.
    """
    tensors = dict(
        sorted(tensors.items(), key=lambda named: (-named[1].element_size(), named[0]))
    )  # each is aligned
    if file is not None:
        ends = list(
            itertools.accumulate(
                (t.numel() * t.element_size() for t in tensors.values()), initial=0
            )
        )
        header = {
            name: {
                "dtype": _DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": offsets,
            }
            for (name, tensor), offsets in zip(
                tensors.items(), itertools.pairwise(ends), strict=True
            )
        }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        one = whole(tensor.detach())
        if file is not None:
            file.write(one.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def found(run_dir: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    root = run_dir / "checkpoints"
    folders = [p for p in root.iterdir() if p.name.isdigit()] if root.is_dir() else []
    return sorted(folders, key=lambda p: int(p.name))


def load(
    run_dir: Path,
    roles: Mapping[str, nn.Module],
    ema: dict[str, Tensor],
    optimisers: Mapping[str, torch.optim.Optimizer],
) -> dict | None:
    """Restore the newest sound checkpoint and return its state; an unsound one is set aside with a message."""
    for folder in reversed(found(run_dir)):
        try:
            state = read_json(folder / "state.json")
            if state is None:
                raise ValueError("no state.json")
            for name, checksum in state.pop("checksums").items():
                if _checksum(folder / name) != checksum:
                    raise ValueError(f"{name} is not what was written")
            weights, moments = (
                safe_open(folder / f"{name}.safetensors", "pt")
                for name in ("weights", "optimisers")
            )
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            aside = folder.with_name(f"{folder.name}.corrupt")
            with contextlib.suppress(OSError):
                folder.rename(aside)
            print(
                f"checkpoint {folder} cannot be read ({error}); set aside as {aside.name}",
                file=sys.stderr,
            )
            continue
        for role, net in roles.items():
            current = net.state_dict()
            net.load_state_dict(
                {k: shard_as(v, current.get(k, v)) for k, v in _under(weights, role)}
            )
        for name, value in _under(weights, "ema"):
            if name in ema:
                ema[name].copy_(shard_as(value, ema[name]))
        for group, optimiser in optimisers.items():
            parameters = [p for each in optimiser.param_groups for p in each["params"]]
            entries: dict[int, dict[str, Tensor]] = {}
            for key, value in _under(moments, group):
                index, _, name = key.partition(".")
                moment = shard_as(value, parameters[int(index)]) if value.ndim else value
                entries.setdefault(int(index), {})[name] = moment
            optimiser.load_state_dict(
                {"state": entries, "param_groups": optimiser.state_dict()["param_groups"]}
            )
        return state
    return None


def _checksum(path: Path) -> int:
    """CRC-32 of a file: against disks, not against people."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


def save_student(
    run_dir: Path, student_updates: int, weights: Mapping[str, Tensor], writes: bool = True
) -> None:
    """Keep the student that is sampled (its moving average, where the run has one); `writes` as in `save`."""
    if not writes:
        write_tensors(None, weights)
        return
    with atomic_file(run_dir / "students" / f"{student_updates}.safetensors") as file:
        write_tensors(file, weights)


def students(run_dir: Path) -> dict[int, Path]:
    """The kept students by student update, in order."""
    paths = (run_dir / "students").glob("*.safetensors")
    return dict(sorted((int(p.stem), p) for p in paths if p.stem.isdigit()))


def load_student(path: Path, student: nn.Module, adapter: AdapterConfig | None = None) -> None:
    """Put a kept student's weights into `student`; of a run with an `adapter` as an adapter, which is then the active one."""
    if adapter is None:
        student.load_state_dict(load_file(path), strict=False)
        return
    from distill_bench.networks.adapters import Adapted, activate, add_adapter

    known = "student" in getattr(student, "peft_config", {})
    view = (
        Adapted(student, "student") if known else add_adapter(student, "student", adapter, seed=0)
    )
    view.load_state_dict(load_file(path))
    activate(student, ["student"])


def _under(file: safe_open, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file with a prefix, and their names without: read one by one, for a rank needs but its part of each."""
    for name in file.keys():
        if name.startswith(f"{prefix}."):
            yield name.removeprefix(f"{prefix}."), file.get_tensor(name)
