"""Run networks over clips, in batches shared by all ranks, and cache their outputs.

Clips stay where they are, in memory or on disk; only a batch of them is on the device.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from distill_bench.evaluate.device import (
    ON_PROCESSOR,
    FittingBatches,
    devices_used,
    note_devices,
    peak_bytes,
    placed,
)
from distill_bench.evaluate.estimate import current_estimate
from distill_bench.evaluator import Clips
from distill_bench.networks.ranks import gather, group_ranks, on_first_rank
from distill_bench.store.durations import duration
from distill_bench.store.failures import first_line
from distill_bench.store.files import write_bytes
from distill_bench.store.progress import tracked

# fixed, so that no bit of a feature depends on the machine or the number of ranks
BATCH = 32  # clips per forward pass
VALUES = 2**26  # pixel values per forward pass, which bounds the batch for large clips

LONG = 10.0  # seconds from which the duration of a pass over clips is announced

CACHE_VERSION = 2  # raise it when features change for a reason that is not part of the cache key


def refuse_training_clips(seen: frozenset[int], clips: Clips, name: str, consequence: str) -> None:
    """Raise ValueError if the network `name` was trained on any of the clips.

    Args:
        seen: digests of the network's training clips.
        consequence: end of the message.
    """
    known = len(seen.intersection(clips.digests))
    if known:
        raise ValueError(f"{name} was trained on {known} of these clips: {consequence}")


def batched(net: Callable[[Tensor], Tensor], frames: np.ndarray, name: str) -> Tensor:
    """Apply `net` to clips (N, T, 3, H, W) in fixed batches; every rank gets all N rows.

    An `nn.Module` runs on the device of `evaluate.device`, any other function on the processor.
    Collective under torch.distributed, see `shared_rows`.

    Raises:
        ValueError: if the network fails, or does not return one row per clip, or if one clip does
            not fit into the memory of the device.
    """
    size = clips_per_pass(frames[0].size)
    with placed(net, name) as device, torch.no_grad():
        fitting = FittingBatches(name, size)

        def rows(start: int) -> Tensor:
            batch = torch.from_numpy(np.ascontiguousarray(frames[start : start + size]))
            return fitting(lambda clips: _rows(net, clips.to(device), name), batch)

        return shared_rows(rows, frames, size, name, device)


def clips_per_pass(values: int) -> int:
    """Number of clips of so many pixel values in one forward pass."""
    return max(1, min(BATCH, VALUES // values))


def shared_rows(
    rows_from: Callable[[int], Tensor],
    frames: np.ndarray,
    size: int,
    name: str,
    device: torch.device,
) -> Tensor:
    """Rows of clips (N, T, 3, H, W), in batches of `size` that ranks share; all ranks get all rows.

    If the batches take long, their time and memory are printed after the first one. Collective.

    Args:
        rows_from: gives the rows (B, ...), on the processor, of the batch that starts at a clip.
        name: of the network.
        device: of the network.
    """
    if (estimate := current_estimate()) is not None:
        return estimate.rows(
            name,
            frames.shape[1:],
            len(frames),
            size,
            lambda: rows_from(0),
            device,
            lambda: peak_bytes(device),
        )
    here = group_ranks()
    starts = range(0, len(frames), size)
    own = starts[here.rank :: here.world]
    rows: Tensor | None = None  # one array: small ones between large ones would fragment memory
    filled = 0
    timed = 0 if device.type == "cpu" else 1  # the first pass on a GPU loads its kernels
    for index, start in enumerate(tracked(own, name, here.first)):
        began = time.perf_counter()
        part = rows_from(start)
        if rows is None:
            rows = part.new_empty(sum(min(size, len(frames) - s) for s in own), *part.shape[1:])
        rows[filled : filled + len(part)] = part
        filled += len(part)
        seconds = (time.perf_counter() - began) * len(own)
        if here.first and index == timed and seconds > LONG:
            memory = f"{peak_bytes(device) / 1e9:.1f} GB"
            print(
                f"{name}: {len(frames)} clips, about {duration(seconds)} on {device}, {memory}",
                file=sys.stderr,
            )
    shares = [iter(share.split(size)) for share in gather(rows) if share is not None]
    return torch.cat([next(shares[i % len(shares)]) for i in range(len(starts))])


def _rows(net: Callable[[Tensor], Tensor], batch: Tensor, name: str) -> Tensor:
    # a user's network may fail with any of these
    failures = ArithmeticError, AssertionError, AttributeError, LookupError, TypeError
    try:
        rows = net(batch).float().cpu()
    except RuntimeError as error:
        if "same device" not in str(error):
            raise
        raise ValueError(
            f"{name} mixes tensors of {batch.device} and the processor: register its constants as "
            f"buffers, or {ON_PROCESSOR} ({first_line(error)})"
        ) from error
    except failures as error:
        raise ValueError(
            f"{name} fails on these clips: {type(error).__name__}: {first_line(error)}"
        ) from error
    if len(rows) != len(batch):
        raise ValueError(
            f"{name} gave {len(rows)} rows for {len(batch)} clips; it must give one per clip"
        )
    return rows


def cached(key: str, clips: Clips, make: Callable[[], Tensor]) -> Tensor:
    """Return `make()`, or its cached result for this key and these frames.

    Collective: rank 0 reads and writes `clips.cache`. Torn or damaged files are replaced.

    Raises:
        ValueError: if the cache file was made from other clips or under another key.
    """
    identity = {"key": key, "frames": clips.digest, "cache_version": str(CACHE_VERSION)}
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    path = None if clips.cache is None else clips.cache / f"{name}.safetensors"
    stored = on_first_rank(lambda: None if path is None else _read(path, identity))
    if stored is not None:
        features, device = stored
        note_devices({device})
        return features
    with devices_used() as used:
        features = make().contiguous()
    if path is not None and group_ranks().first:
        metadata = identity | {"sha256": _digest(features), "device": " + ".join(sorted(used))}
        try:
            write_bytes(path, save({"features": features}, metadata))
        except OSError as error:  # the folder may be read-only
            print(f"features are not cached: {error}", file=sys.stderr)
    return features


def _read(path: Path, identity: dict[str, str]) -> tuple[Tensor, str] | None:
    """Features of a cache file and the device that made them; None if it is missing or damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            features = file.get_tensor("features")
    except SafetensorError:
        return None
    digest, device = metadata.pop("sha256", ""), metadata.pop("device", "cpu")
    if metadata != identity:
        raise ValueError(
            f"the cache {path} was made from other clips or another network; delete it"
        )
    return (features, device) if digest == _digest(features) else None


def _digest(features: Tensor) -> str:
    return hashlib.sha256(features.contiguous().numpy().tobytes()).hexdigest()
