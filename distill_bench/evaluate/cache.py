"""Run networks over clips, in batches shared by all ranks, and cache their outputs."""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from distill_bench.evaluator import Clips
from distill_bench.networks.ranks import gather, group_ranks, on_first_rank
from distill_bench.store.failures import first_line
from distill_bench.store.files import write_bytes

# fixed, so that no bit of a feature depends on the machine or the number of ranks
BATCH = 32  # clips per forward pass
VALUES = 2**26  # pixel values per forward pass, which bounds the batch for large clips

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

    Collective under torch.distributed: each rank runs a share of the batches.

    Raises:
        ValueError: if the network fails, or does not return one row per clip.
    """
    here = group_ranks()
    size = max(1, min(BATCH, VALUES // frames[0].size))
    starts = range(0, len(frames), size)
    share: dict[int, Tensor] = {}
    console = Console(file=sys.stderr, quiet=not sys.stderr.isatty() or not here.first)
    with torch.no_grad():
        for start in track(starts[here.rank :: here.world], name, console=console, transient=True):
            batch = torch.from_numpy(frames[start : start + size])
            share[start] = _rows(net, batch, name)
    rows = {start: part for part_of_rank in gather(share) for start, part in part_of_rank.items()}
    return torch.cat([rows[start] for start in starts])


def _rows(net: Callable[[Tensor], Tensor], batch: Tensor, name: str) -> Tensor:
    # a user's network may fail with any of these
    failures = ArithmeticError, AssertionError, AttributeError, LookupError, TypeError
    try:
        rows = net(batch).float().cpu()
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
    features = on_first_rank(lambda: None if path is None else _read(path, identity))
    if features is not None:
        return features
    features = make().contiguous()
    if path is not None and group_ranks().first:
        metadata = identity | {"sha256": _digest(features)}
        try:
            write_bytes(path, save({"features": features}, metadata))
        except OSError as error:  # the folder may be read-only
            print(f"features are not cached: {error}", file=sys.stderr)
    return features


def _read(path: Path, identity: dict[str, str]) -> Tensor | None:
    """Features of a cache file; None if it is missing or damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            features = file.get_tensor("features")
    except SafetensorError:
        return None
    digest = metadata.pop("sha256", "")
    if metadata != identity:
        raise ValueError(
            f"the cache {path} was made from other clips or another network; delete it"
        )
    return features if digest == _digest(features) else None


def _digest(features: Tensor) -> str:
    return hashlib.sha256(features.contiguous().numpy().tobytes()).hexdigest()
