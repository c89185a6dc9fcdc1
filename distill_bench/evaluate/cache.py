"""TODO: evaluate.cache."""

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
from distill_bench.store.files import first_line, write_bytes

# clips a forward, and values of frames, which cuts that of large clips; fixed, so that no bit
# depends on them nor on the ranks
BATCH, VALUES = 32, 2**26


CACHE_VERSION = 2  # of the code between frames and features that no id names


def refuse_training_clips(seen: frozenset[int], clips: Clips, name: str, why: str) -> None:
    """ValueError for clips that a network was trained on."""
    known = len(seen.intersection(clips.digests))
    if known:
        raise ValueError(f"{name} was trained on {known} of these clips: {why}")


def batched(net: Callable[[Tensor], Tensor], frames: np.ndarray, name: str) -> Tensor:
    """`net` on every clip, in batches of one size; under torch.distributed the ranks share the batches and all get all.

    Raises:
        ValueError: if the network gives another number of rows than clips.
    """
    here = group_ranks()
    size = max(1, min(BATCH, VALUES // frames[0].size))
    starts = range(0, len(frames), size)
    mine: dict[int, Tensor] = {}
    console = Console(file=sys.stderr, quiet=not sys.stderr.isatty() or not here.first)
    with torch.no_grad():
        for start in track(starts[here.rank :: here.world], name, console=console, transient=True):
            part = torch.from_numpy(frames[start : start + size])
            try:
                found = net(part).float().cpu()
            except (
                ArithmeticError,
                AssertionError,
                AttributeError,
                LookupError,
                TypeError,
            ) as error:  # a stranger's code
                raise ValueError(
                    f"{name} fails on these clips: {type(error).__name__}: {first_line(error)}"
                ) from error
            if len(found) != len(part):
                raise ValueError(f"{name} gave {len(found)} rows for {len(part)} clips")
            mine[start] = found
    features = {start: part for share in gather(mine) for start, part in share.items()}
    return torch.cat([features[start] for start in starts])


def cached(key: str, clips: Clips, make: Callable[[], Tensor]) -> Tensor:
    """What `make` gives for these frames; kept in the clips' cache folder by the key and the digest of the frames.

    What is torn or damaged there is made again.

    Raises:
        ValueError: if a file there says that it was made from something else.
    """
    about = {"key": key, "frames": clips.digest, "cache_version": str(CACHE_VERSION)}
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    path = None if clips.cache is None else clips.cache / f"{name}.safetensors"
    kept = on_first_rank(lambda: None if path is None else _kept(path, about))
    if kept is not None:
        return kept
    made = make().contiguous()
    if path is not None and group_ranks().first:
        try:
            write_bytes(path, save({"features": made}, about | {"sha256": _sum(made)}))
        except OSError as error:  # a read-only folder of someone else's clips
            print(f"features are not kept: {error}", file=sys.stderr)
    return made


def _kept(path: Path, about: dict[str, str]) -> Tensor | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            said, features = file.metadata() or {}, file.get_tensor("features")
            if {**said, "sha256": ""} != {**about, "sha256": ""}:
                raise ValueError(
                    f"the cache {path} was made from other clips or another network: delete it"
                )
            return features if said.get("sha256") == _sum(features) else None
    except SafetensorError:
        return None


def _sum(features: Tensor) -> str:
    return hashlib.sha256(features.contiguous().numpy().tobytes()).hexdigest()
