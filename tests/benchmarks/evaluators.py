"""Speed of the evaluators; fails if a bound of eval/README.md is broken.

    python tests/benchmarks/evaluators.py

- The Fréchet step against scipy's `sqrtm`, both from 2048 clips of 400 features: wall time with the
  default number of threads, processor time with one thread.
- The share of a feature extraction that is spent in forward passes.
- Every evaluator on as many clips as a protocol draws.

The last two run in one thread and measure processor time, which other load changes little.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

THREADED = "--threaded"  # only the Fréchet step, with the default number of threads
if THREADED not in sys.argv:
    os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import scipy.linalg
import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

sys.path.insert(0, str(Path(__file__).parents[2]))

from distill_bench.domain import controls
from distill_bench.evaluate import clip_models, extractors
from distill_bench.evaluate.distances import frechet_distance
from distill_bench.evaluator import Clips
from distill_bench.registry import evaluators
from distill_bench.sample.load_folder import load_clips


def seconds(
    call: Callable[[], object], repeats: int = 7, clock: Callable[[], float] = time.process_time
) -> float:
    """Shortest time of `repeats` calls, by default processor time."""
    times = []
    for _ in range(repeats):
        start = clock()
        call()
        times.append(clock() - start)
    return min(times)


def frechet_by_sqrtm(x: np.ndarray, y: np.ndarray) -> float:
    """Fréchet distance by the matrix square root of the product of the covariances."""
    covariance_x = np.cov(x, rowvar=False)
    covariance_y = np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(covariance_x @ covariance_y)
    means = ((x.mean(0) - y.mean(0)) ** 2).sum()
    return float(means + np.trace(covariance_x + covariance_y - 2 * root.real))


def frechet_step(threads: str, largest: float, clock: Callable[[], float]) -> bool:
    """Time our distance; returns True if it takes at most `largest` times as long as `sqrtm`."""
    draw = torch.Generator().manual_seed(0)
    scale = 1 / torch.arange(1, 401).sqrt()
    x, y = (torch.randn(2048, 400, generator=draw) * scale * s for s in (1, 1.2))
    arrays = x.double().numpy(), y.double().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        sqrtm_seconds = seconds(lambda: frechet_by_sqrtm(*arrays), 15, clock)
        error = abs(frechet_distance(x, y) / frechet_by_sqrtm(*arrays) - 1)
    our_seconds = seconds(lambda: frechet_distance(x, y), 15, clock)
    ratio = our_seconds / sqrtm_seconds
    print(
        f"Fréchet step, 2048 clips, 400 features, {threads}: {1e3 * our_seconds:.0f} ms; "
        f"by sqrtm {1e3 * sqrtm_seconds:.0f} ms (ratio {ratio:.2f}, relative error {error:.0e})",
        flush=True,
    )
    return ratio <= largest


class Forwards:
    """Context that counts the processor time of every network's forward passes in `seconds`."""

    def __enter__(self) -> "Forwards":
        self.seconds = 0.0
        self.depth = 0  # of nested modules
        self.start = 0.0
        self.hooks = [
            register_module_forward_pre_hook(self.enter),
            register_module_forward_hook(self.leave),
        ]
        return self

    def enter(self, *_: object) -> None:
        if self.depth == 0:
            self.start = time.process_time()
        self.depth += 1

    def leave(self, *_: object) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.seconds += time.process_time() - self.start

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


# From clips to features or cosines, for each network that ships.
EXTRACTIONS: dict[str, Callable[[Clips], object]] = {
    "indomain-r2p1-cls": lambda clips: extractors.load_extractor("indomain-r2p1-cls")(clips),
    "random-r2p1": lambda clips: extractors.load_extractor("random-r2p1")(clips),
    "frame CLIP": lambda clips: clip_models.indomain_clip(False).similarities(clips),
    "video CLIP": lambda clips: clip_models.indomain_clip(True).similarities(clips),
}


def extraction(count: int = 256) -> bool:
    """Time extractions; returns True if each spends over 90 % of its time in forward passes.

    The rest is reading the folder, hashing and caching.
    """
    frames, prompts = controls.rendered(count, 0)
    lines = [{"index": i, "prompt": prompt, "seed": i} for i, prompt in enumerate(prompts)]
    within_bound = True
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "clips.npy", frames)
        (Path(folder) / "manifest.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )
        for name, extract in EXTRACTIONS.items():
            extract(load_clips(Path(folder)))  # load the network before the clock starts
            shares = []
            for _ in range(3):
                shutil.rmtree(Path(folder) / ".features")
                with Forwards() as forwards:
                    whole = seconds(lambda extract=extract: extract(load_clips(Path(folder))), 1)
                shares.append(forwards.seconds / whole)
            share = sorted(shares)[1]
            print(
                f"{name}: {1e3 * whole / count:.1f} ms per clip, "
                f"{100 * share:.0f} % in forward passes"
            )
            within_bound &= share > 0.9
    return within_bound


def all_evaluators(count: int = 256) -> None:
    """Time each evaluator on `count` clips against references of as many."""
    sets = []
    for first in (0, count, 2 * count):
        frames, prompts = controls.rendered(count, first)
        sets.append(Clips(frames, prompts, list(range(count))))
    clips, teacher, other = sets
    references = {"teacher": teacher, "teacher_other": other}
    total = 0.0
    for name, evaluator in evaluators().items():
        if evaluator().reason_to_skip(clips) is not None:
            continue
        duration = seconds(lambda evaluator=evaluator: evaluator().scores(clips, references), 1)
        print(f"{name}: {duration:.2f} s for {count} clips, with nothing cached")
        total += duration
    print(f"all evaluators: {total:.1f} s")


def main() -> int:
    """Print every measurement; returns 1 if a bound is broken."""
    if THREADED in sys.argv:
        return int(not frechet_step(f"{os.cpu_count()} cores", 0.25, time.perf_counter))
    threaded = subprocess.run([sys.executable, __file__, THREADED], check=False)
    torch.set_num_threads(1)
    within_bounds = [
        threaded.returncode == 0,
        frechet_step("one thread", 0.5, time.process_time),
        extraction(),
    ]
    all_evaluators()
    return int(not all(within_bounds))


if __name__ == "__main__":
    raise SystemExit(main())
