"""How fast the evaluators are: `python tests/benchmarks/evaluators.py`; fails where a bound of eval/README.md is not kept.

The Fréchet step against scipy's `sqrtm` at 2048 clips of 400 features, both from features, in one process with default threads;
the share of an extraction that is spent in forward passes; and every evaluator on a protocol's clips.
"""

import sys
import time
import warnings
from pathlib import Path

import numpy as np
import scipy.linalg
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from distill_bench import controls, features  # noqa: E402
from distill_bench.evaluator import Clips  # noqa: E402
from distill_bench.registry import evaluators, find_evaluator  # noqa: E402


def seconds(call, repeats: int = 3) -> float:
    """The quickest of some calls."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def by_sqrtm(x: np.ndarray, y: np.ndarray) -> float:
    """The usual route: means, covariances and the square root of their product."""
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(a @ b)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * np.trace(root.real))


def frechet_step() -> bool:
    """Whether the distance takes at most a quarter of the usual route's time."""
    distance = vars(sys.modules[find_evaluator("fvd").__module__])["frechet_distance"]
    draw = torch.Generator().manual_seed(0)
    scale = 1 / torch.arange(1, 401).sqrt()
    x, y = (torch.randn(2048, 400, generator=draw) * scale * s for s in (1, 1.2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        usual = seconds(lambda: by_sqrtm(x.double().numpy(), y.double().numpy()))
        error = abs(distance(x, y) / by_sqrtm(x.double().numpy(), y.double().numpy()) - 1)
    mine = seconds(lambda: distance(x, y))
    print(f"Fréchet step, 2048 clips, 400 features: {1e3 * mine:.0f} ms; by sqrtm {1e3 * usual:.0f} ms; differ by {error:.0e}")
    return mine <= usual / 4


def extraction(count: int = 256) -> bool:
    """Whether over 90 % of an extraction is spent in forward passes."""
    frames, prompts = controls.rendered(count, 0)
    kept = True
    for spec in ("indomain-r2p1-cls", "random-r2p1"):
        extractor, inside = features.load_extractor(spec), []

        def timed(x: torch.Tensor, net=extractor.net, inside=inside) -> torch.Tensor:
            began = time.perf_counter()
            found = net(x)
            inside.append(time.perf_counter() - began)
            return found

        features.batched(extractor.net, frames[:32], spec)
        whole = seconds(lambda spec=spec, timed=timed: features.batched(timed, frames, spec), 1)
        share = sum(inside) / whole
        print(f"{spec}: {1e3 * whole / count:.1f} ms a clip, {100 * share:.0f} % in forward passes")
        kept &= share > 0.9
    return kept


def row(count: int = 256) -> None:
    """Each evaluator on the clips of a protocol, its references known."""
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
        took = seconds(lambda evaluator=evaluator: evaluator().scores(clips, references), 1)
        print(f"{name}: {took:.2f} s for {count} clips and references that are not cached")
        total += took
    print(f"a row: {total:.1f} s")


def main() -> int:
    """Print all of it."""
    kept = [frechet_step()]
    torch.set_num_threads(1)
    kept.append(extraction())
    row()
    return int(not all(kept))


if __name__ == "__main__":
    raise SystemExit(main())
