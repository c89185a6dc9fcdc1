"""Time and memory of scoring before a sweep: networks that sleep, seen for one batch."""

import json
import re
import time
from pathlib import Path

import numpy as np
from run_folders import write_result
from torch import Tensor, nn

from distill_bench.config.sweep_file import load_sweep
from distill_bench.eval.motion import ClipSpeeds
from distill_bench.evaluate.cache import batched
from distill_bench.evaluate.estimate import estimating
from distill_bench.evaluate.optical_flow import Raft
from distill_bench.sample.references import folder_names
from distill_bench.sweep.__main__ import main
from distill_bench.sweep.manifest import open_sweep

SLOW = '''
import time
from dataclasses import dataclass
from typing import ClassVar
from distill_bench.evaluate.cache import batched, cached
from distill_bench.evaluator import Evaluator, mean_score

def net(frames):
    assert len(frames) <= 32, "clips per pass"
    time.sleep(0.01 * len(frames))
    return frames.float().mean((1, 3, 4))

@dataclass(frozen=True)
class Slow(Evaluator):
    """Takes 10 ms per clip."""
    paper: ClassVar[str] = "none"
    version: ClassVar[int] = 1
    def scores(self, clips, references):
        for one in (clips, references["teacher"]):
            rows = cached("slow", one, lambda: batched(net, one.frames, "slow network"))
            assert rows.std(0).min() > 0, "no constant features"
        return [mean_score("slow", rows.mean(1), "slow")]

@dataclass(frozen=True)
class Fails(Slow):
    """Fails after its network."""
    def scores(self, clips, references):
        super().scores(clips, references)
        raise ValueError("noise is no clip")
'''


class PairFlow(nn.Module):
    """Network with the signature of RAFT, which takes 5 ms per pair."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = 0

    def forward(self, first: Tensor, second: Tensor) -> list[Tensor]:
        self.pairs += len(first)
        time.sleep(0.005 * len(first))
        return [(first - second)[:, :2]]


def test_a_dry_run_that_measures_estimates_the_scoring_of_what_is_left(tmp_path: Path, capsys):
    (tmp_path / "slow.py").write_text(SLOW)
    names = [f"{tmp_path}/slow.py:{name}" for name in ("Slow", "Fails")]
    base = {"method": "dmd2", "teacher": "gaussian", "student_updates": 4, "trackers": []}
    sampling = [{"of": "students", "nfe": [2, 8]}, {"of": "teacher", "nfe": [3]}]
    data = {"question": "How long?", "base": base, "seeds": 2, "sampling": sampling}
    data["base"] |= {"evaluations": 2, "protocol": {"clips": 600, "evaluators": names}}
    path = tmp_path / "s.yaml"
    path.write_text(json.dumps(data | {"include": [{"nfe": 4}]}))
    command = [
        str(path),
        "--cluster=local",
        "--dry-run",
        "--measure",
        f"--store={tmp_path / 'runs'}",
    ]

    def scoring() -> tuple[str, str, str]:
        assert main(command) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "Fails is not or not fully estimated: noise is no clip" in out
        found = re.search(r"scoring 600 clips takes about (\d+) s on cpu .* (\d+) sets of", out)
        assert found is not None, out
        # once, although both sets of clips and both evaluators see the network
        networks = re.findall(r"slow network: (\d+) s, \d\.\d GB", out)
        assert len(networks) == 2
        assert 6 <= int(networks[0]) <= 60
        return found[1], found[2], out

    total, sets, _ = scoring()
    assert main([argument for argument in command if argument != "--measure"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"{sets} sets of 600 clips are left to score; --measure times a batch" in out
    assert "slow network" not in out
    assert main([argument for argument in command if argument != "--dry-run"]) == 2
    assert "--measure belongs to --dry-run" in capsys.readouterr().err
    assert 12 <= int(total) <= 120
    sweep = open_sweep(load_sweep(path), tmp_path / "runs", tmp_path / "results")
    kinds = folder_names(next(iter(sweep.runs.values()))).keys() - {"data", "data_other"}
    assert int(sets) == len(kinds) + 2 * (2 + 2) + 1, "two evaluations, two ways, the teacher's row"
    write_result(sweep.store / next(iter(sweep.runs)))
    _, sets, _ = scoring()
    assert int(sets) == len(kinds) + (2 + 2) + 2 + 1, (
        "of the finished run the further ways are left"
    )


def test_of_a_clip_one_pair_of_frames_is_run_and_of_clips_one_batch(monkeypatch):
    """RAFT takes hours on a processor; its 20 pairs per clip are extrapolated from one."""
    monkeypatch.setattr("distill_bench.evaluate.cache.BATCH", 2)
    flow = PairFlow()
    frames = np.random.default_rng(0).integers(0, 256, (5, 21, 3, 128, 128), dtype=np.uint8)
    with estimating() as estimate:
        rows = batched(ClipSpeeds(Raft(flow, "pairs")), frames, "speeds")
    assert rows.shape == (5, 2 + 20)
    assert flow.pairs == 2
    (only,) = estimate.passes
    assert only.name == "speeds"
    assert 20 * 0.005 < only.seconds < 100 * 20 * 0.005, "per clip"
    batched(ClipSpeeds(Raft(flow, "pairs")), frames, "speeds")
    assert flow.pairs == 2 + 5 * 20, "outside of an estimate every pair is run"
