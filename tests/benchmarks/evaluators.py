"""How fast the evaluators are: `python tests/benchmarks/evaluators.py`; fails where a bound of eval/README.md is not kept.

The Fréchet step against scipy's `sqrtm` at 2048 clips of 400 features, both from features, in one process of as many threads as
it takes by itself (wall time) and of one (processor time); the share of an extraction that is spent in forward passes, and every
evaluator on a protocol's clips, in one thread and processor time: what else runs on the machine is another matter.
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

THREADED = "--threaded"  # the Fréchet step alone, in a process whose threads nobody has bounded
if THREADED not in sys.argv:
    os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402
import scipy.linalg  # noqa: E402
import torch  # noqa: E402
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[2]))

from distill_bench.domain import controls
from distill_bench.evaluate import clip_models, extractors  # noqa: E402
from distill_bench.evaluator import Clips  # noqa: E402
from distill_bench.registry import evaluators, find_evaluator  # noqa: E402
from distill_bench.sample.media import load_clips  # noqa: E402


def seconds(
    call: Callable[[], object], repeats: int = 7, clock: Callable[[], float] = time.process_time
) -> float:
    """The time of the quickest of some calls, by default the processor's."""
    times = []
    for _ in range(repeats):
        began = clock()
        call()
        times.append(clock() - began)
    return min(times)


def by_sqrtm(x: np.ndarray, y: np.ndarray) -> float:
    """The usual route: means, covariances and the square root of their product."""
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(a @ b)
    return float(
        ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * np.trace(root.real)
    )


def frechet_step(threads: str, largest: float, clock: Callable[[], float]) -> bool:
    """Whether the distance takes at most the share `largest` of the usual route's time."""
    distance = vars(sys.modules[find_evaluator("fvd").__module__])["frechet_distance"]
    draw = torch.Generator().manual_seed(0)
    scale = 1 / torch.arange(1, 401).sqrt()
    x, y = (torch.randn(2048, 400, generator=draw) * scale * s for s in (1, 1.2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        usual = seconds(lambda: by_sqrtm(x.double().numpy(), y.double().numpy()), 15, clock)
        error = abs(distance(x, y) / by_sqrtm(x.double().numpy(), y.double().numpy()) - 1)
    mine = seconds(lambda: distance(x, y), 15, clock)
    told = f"{1e3 * mine:.0f} ms; by sqrtm {1e3 * usual:.0f} ms, {mine / usual:.2f} of it; they differ by {error:.0e}"
    print(f"Fréchet step, 2048 clips, 400 features, {threads}: {told}", flush=True)
    return mine <= largest * usual


class Forwards:
    """Processor time in forward passes of whatever network, while this context is open."""

    def __enter__(self) -> "Forwards":
        self.seconds, self.depth, self.began = 0.0, 0, 0.0
        enter, leave = (
            register_module_forward_pre_hook(self.enter),
            register_module_forward_hook(self.leave),
        )
        self.hooks = (enter, leave)
        return self

    def enter(self, *_: object) -> None:
        self.began = self.began if self.depth else time.process_time()
        self.depth += 1

    def leave(self, *_: object) -> None:
        self.depth -= 1
        self.seconds += 0 if self.depth else time.process_time() - self.began

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


# everything that a shipped network does for a score, from clips to features or cosines
EXTRACTIONS: dict[str, Callable[[Clips], object]] = {
    "indomain-r2p1-cls": lambda clips: extractors.load_extractor("indomain-r2p1-cls")(clips),
    "random-r2p1": lambda clips: extractors.load_extractor("random-r2p1")(clips),
    "frame CLIP": lambda clips: clip_models.indomain_clip(False).similarities(clips),
    "video CLIP": lambda clips: clip_models.indomain_clip(True).similarities(clips),
}


def extraction(count: int = 256) -> bool:
    """Whether over 90 % of an extraction is spent in forward passes; reading the folder, hashing and caching are in it."""
    frames, prompts = controls.rendered(count, 0)
    lines = [{"index": i, "prompt": prompt, "seed": i} for i, prompt in enumerate(prompts)]
    kept = True
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "clips.npy", frames)
        (Path(folder) / "manifest.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )
        for name, extract in EXTRACTIONS.items():
            extract(load_clips(Path(folder)))  # loads the network
            shares = []
            for _ in range(3):
                shutil.rmtree(Path(folder) / ".features")
                with Forwards() as forwards:
                    whole = seconds(lambda extract=extract: extract(load_clips(Path(folder))), 1)
                shares.append(forwards.seconds / whole)
            share = sorted(shares)[1]
            print(
                f"{name}: {1e3 * whole / count:.1f} ms a clip, {100 * share:.0f} % in forward passes"
            )
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
    if THREADED in sys.argv:
        return int(not frechet_step(f"{os.cpu_count()} cores", 0.25, time.perf_counter))
    alone = subprocess.run([sys.executable, __file__, THREADED], check=False)
    torch.set_num_threads(1)
    kept = [alone.returncode == 0, frechet_step("one thread", 0.5, time.process_time), extraction()]
    row()
    return int(not all(kept))


if __name__ == "__main__":
    raise SystemExit(main())
