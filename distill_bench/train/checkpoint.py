"""Checkpoints to resume from, and the students that a run keeps to be sampled.

checkpoints/<student_updates>/{weights,optimisers}.safetensors, state.json    the two newest
students/<student_updates>.safetensors                                        all of them

Both are written under a temporary name and then renamed, so they appear complete or not at all.
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
from distill_bench.networks.adapters import Adapted, activate, add_adapter
from distill_bench.networks.sharding import is_sharded, shard_as, whole
from distill_bench.store.files import atomic_file, read_json, write_json

KEPT = 2  # newest checkpoints that are not pruned
DTYPES = {  # names in a safetensors header
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
    """Write one checkpoint, complete or not at all, and prune all but the newest KEPT.

    Collective if weights are sharded. Ranks with `writes=False` only take part in the gathers.
    """
    weights = {
        f"{role}.{name}": tensor
        for role, net in roles.items()
        for name, tensor in net.state_dict().items()
    }
    weights |= {f"ema.{name}": tensor for name, tensor in ema.items()}
    moments = {
        f"{group}.{index}.{name}": tensor
        for group, optimiser in optimisers.items()
        for index, entry in optimiser.state_dict()["state"].items()
        for name, tensor in entry.items()
    }
    files = {"weights.safetensors": weights, "optimisers.safetensors": moments}
    if not writes:
        for tensors in files.values():
            write_tensors(None, tensors)
        return
    root = run_dir / "checkpoints"
    root.mkdir(exist_ok=True)
    for torn in root.glob(".writing-*"):  # left by a killed writer; a run has one writer
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
    for old in folders(run_dir)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def write_tensors(file: BinaryIO | None, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name as a safetensors file, one after the other.

    safetensors' own writer would need all tensors in host memory at once. Collective: every rank
    must call it. Ranks with `file=None` only take part in the gathers of shards.
    """
    # the widest dtypes first, so that every tensor is aligned
    tensors = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    if file is not None:
        _write_header(file, tensors)
    for tensor in tensors.values():
        gathered = whole(tensor.detach())
        if file is not None:
            file.write(gathered.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _write_header(file: BinaryIO, tensors: Mapping[str, Tensor]) -> None:
    sizes = (tensor.numel() * tensor.element_size() for tensor in tensors.values())
    ends = itertools.accumulate(sizes, initial=0)
    header = {
        name: {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        for (name, tensor), offsets in zip(tensors.items(), itertools.pairwise(ends), strict=True)
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def folders(run_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first."""
    root = run_dir / "checkpoints"
    if not root.is_dir():
        return []
    return sorted((p for p in root.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))


def load(
    run_dir: Path,
    roles: Mapping[str, nn.Module],
    ema: dict[str, Tensor],
    optimisers: Mapping[str, torch.optim.Optimizer],
) -> dict | None:
    """Restore the newest sound checkpoint; returns its state, or None if there is none.

    An unsound checkpoint is renamed to *.corrupt, with a message.
    """
    for folder in reversed(folders(run_dir)):
        try:
            state = _checked_state(folder)
            weights = safe_open(folder / "weights.safetensors", "pt")
            moments = safe_open(folder / "optimisers.safetensors", "pt")
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
            loaded = {
                name: shard_as(tensor, current.get(name, tensor))
                for name, tensor in _with_prefix(weights, role)
            }
            net.load_state_dict(loaded)
        for name, tensor in _with_prefix(weights, "ema"):
            if name in ema:
                ema[name].copy_(shard_as(tensor, ema[name]))
        for group, optimiser in optimisers.items():
            _load_moments(optimiser, _with_prefix(moments, group))
        return state
    return None


def _checked_state(folder: Path) -> dict:
    """The state of a checkpoint, once its files match their recorded checksums.

    Raises:
        ValueError, KeyError, OSError: if a file is missing or differs from its checksum.
    """
    state = read_json(folder / "state.json")
    if state is None:
        raise ValueError("state.json is missing or damaged")
    for name, checksum in state.pop("checksums").items():
        if _checksum(folder / name) != checksum:
            raise ValueError(f"{name} does not match its checksum")
    return state


def _load_moments(optimiser: torch.optim.Optimizer, moments: Iterator[tuple[str, Tensor]]) -> None:
    """Restore an optimiser from tensors named INDEX.NAME."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    entries: dict[int, dict[str, Tensor]] = {}
    for key, tensor in moments:
        index, _, name = key.partition(".")
        entries.setdefault(int(index), {})[name] = _laid_out_as(parameters[int(index)], tensor)
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": entries, "param_groups": groups})


def _laid_out_as(parameter: Tensor, moment: Tensor) -> Tensor:
    """A moment in the memory layout of its parameter; scalars, such as `step`, are unchanged.

    The fused AdamW steps through the memory of both at once, and a file holds rows.
    """
    if not moment.ndim:
        return moment
    if is_sharded(parameter):
        return shard_as(moment, parameter)
    return torch.empty_like(parameter, dtype=moment.dtype, device="cpu").copy_(moment)


def _checksum(path: Path) -> int:
    """CRC-32 of a file: it detects faulty disks, not tampering."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


def save_student(
    run_dir: Path, student_updates: int, weights: Mapping[str, Tensor], writes: bool = True
) -> None:
    """Write the weights to sample from, the student's or its average's; `writes` as in `save`."""
    if not writes:
        write_tensors(None, weights)
        return
    with atomic_file(run_dir / "students" / f"{student_updates}.safetensors") as file:
        write_tensors(file, weights)


def students(run_dir: Path) -> dict[int, Path]:
    """Files of the kept students by student update, in ascending order."""
    paths = (run_dir / "students").glob("*.safetensors")
    return dict(sorted((int(path.stem), path) for path in paths if path.stem.isdigit()))


def load_student(path: Path, student: nn.Module, adapter: AdapterConfig | None = None) -> None:
    """Load a kept student into a network; with `adapter`, as the network's active adapter."""
    if adapter is None:
        student.load_state_dict(load_file(path), strict=False)
        return
    if "student" in getattr(student, "peft_config", {}):
        view = Adapted(student, "student")
    else:
        view = add_adapter(student, "student", adapter, seed=0)
    view.load_state_dict(load_file(path))
    activate(student, ["student"])


def _with_prefix(file: safe_open, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors by name without the prefix, read one by one, because a rank keeps only its shards."""
    names = file.keys()  # a safe_open file is not iterable
    for name in names:
        if name.startswith(f"{prefix}."):
            yield name.removeprefix(f"{prefix}."), file.get_tensor(name)
