"""Cost of the field's methods, by rehearsal on stand-in networks and by the ledger of training."""

import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from distill_bench.config.resolve import method_of, resolve
from distill_bench.draws import Draws
from distill_bench.method import Batch, Loss, Method, Nets, renoise
from distill_bench.plan.command import main
from distill_bench.plan.cost import passes, priced
from distill_bench.train.inputs import exits
from distill_bench.train.loop import update
from distill_bench.train.phase import Phase
from distill_bench.train.setup import build

BASE = {
    "teacher": "gaussian",
    "nfe": 4,
    "batch_size": 2,
    "student_updates": 1,
    "guidance_scale": 3.0,
    "trackers": [],
    "signals_every": None,
}
E = 0.5  # share of the blocks before a head's features

# Row: run; (forwards, backwards) of student, fake score and teacher; total at equal sizes; total
# with a teacher of 14 and other networks of 1.3. An input backward counts one, a full backward two.
# Counted by hand, with 2.5 forwards per rollout (four steps, random exit).
TABLE = {
    "dmd2 video K=5": ({"method": "dmd2"}, (15, 2), (6, 10), (2, 0), 35.0, 54.5),
    "the same, sample reused": (
        {"method": "dmd2", "reuse_rollout": True},
        (12.5, 2), (6, 10), (2, 0), 32.5, 52.0,
    ),
    "fastvideo simulate": (
        {"method": "dmd2", "exit_step": "last"},
        (24, 2), (6, 10), (2, 0), 44.0, 63.5,
    ),
    "dmd2 video K=1": (
        {"method": "dmd2", "fake_score_updates": 1},
        (5, 2), (2, 2), (2, 0), 13.0, 32.5,
    ),
    "tsg_fisher K=5": ({"method": "tsg_fisher"}, (15, 2), (6, 11), (2, 0), 36.0, 55.5),
    "tsg_fisher K=1": (
        {"method": "tsg_fisher", "fake_score_updates": 1},
        (5, 2), (2, 3), (2, 0), 14.0, 33.5,
    ),
    "sgmd own rollout": (
        {"method": {"name": "sgmd", "preset": "official"}},
        (5, 2), (2, 3), (2, 0), 14.0, 33.5,
    ),
    "sgmd shared": (
        {"method": {"name": "sgmd", "preset": "shared"}},
        (2.5, 2), (2, 3), (2, 0), 11.5, 31.0,
    ),
    "sgmd shared graph": (
        {"method": {"name": "sgmd", "preset": "paper"}},
        (2.5, 2), (1, 3), (2, 0), 10.5, 30.0,
    ),
    "tsg_sim K=1": (
        {"method": {"name": "tsg_sim", "preset": "paper"}},
        (5, 2), (2, 3), (2, 0), 14.0, 33.5,
    ),
    "sid K=1": ({"method": {"name": "sid", "preset": "paper"}}, (5, 2), (2, 3), (2, 2), 16.0, 55.1),
    "sid K=5": (
        {"method": {"name": "sid", "preset": "video"}},
        (15, 2), (6, 11), (2, 2), 38.0, 77.1,
    ),
    "consistency": ({"method": "consistency"}, (2, 2), (0, 0), (2, 0), 6.0, 25.5),
    # rollouts of the student's phase exit at steps 2 to 4: 3 forwards
    "dp_dmd": (
        {"method": {"name": "dp_dmd", "preset": "lightx2v"}},
        (12.5 + 3 + 1, 4), (6, 10), (2 + 20, 0), 58.5, None,
    ),
    "dmd one step": (
        {
            "method": {"name": "dmd", "preset": "latent"},
            "nfe": 1,
            "reuse_rollout": False,
            "guidance_scale": 1.0,
        },
        (3, 4), (2, 2), (1, 0), 12.0, None,
    ),
    "dmd one step, sample reused": (
        {"method": {"name": "dmd", "preset": "latent"}, "nfe": 1, "guidance_scale": 1.0},
        (2, 4), (2, 2), (1, 0), 11.0, None,
    ),
    "dmd2 paper, one step": (
        {"method": {"name": "dmd2", "preset": "paper"}, "nfe": 1, "teacher": "mini-wan"},
        (5, 2), (6 + 11 * E, 10 + 21 * E), (2, 0), 25 + 32 * E, None,
    ),
    "f_distill": (
        {
            "method": {"name": "f_distill", "preset": "fastgen", "r1_weight": 1.0},
            "teacher": "mini-wan",
        },
        (5, 2), (5, 8), (2 + 13 * E, E), 22 + 14 * E, None,
    ),
}  # fmt: skip


def folded(counts: dict) -> dict[str, tuple[float, float]]:
    """Forwards and backwards by role; the moving average counts as the student."""
    totals = {"student": (0.0, 0.0), "fake_score": (0.0, 0.0), "teacher": (0.0, 0.0)}
    for role, row in counts.items():
        name = "student" if role == "target" else role
        forward, backward = totals[name]
        totals[name] = (
            forward + row["forward"],
            backward + row["input_backward"] + 2 * row["full_backward"],
        )
    return totals


@pytest.mark.parametrize("row", TABLE)
def test_a_rehearsal_gives_the_table(row):
    fields, student, fake_score, teacher, total, large = TABLE[row]
    counts = passes(resolve(BASE | fields))
    assert folded(counts) == {"student": student, "fake_score": fake_score, "teacher": teacher}
    assert priced(counts, {}) == total
    if large is not None:
        assert priced(counts, {"teacher": 14, "student": 1.3}) == pytest.approx(large, abs=0.06)


@pytest.mark.parametrize(
    "row", [row for row in TABLE if row not in ("dmd2 paper, one step", "f_distill")]
)
def test_a_training_gives_the_table(row, tmp_path):
    """One update at each exit step. Conformance checks train the rows with features."""
    fields, student, fake_score, teacher, *_ = TABLE[row]
    counted = folded(counted_by_exit(fields, tmp_path))
    assert counted == {"student": student, "fake_score": fake_score, "teacher": teacher}


def counted_by_exit(fields: dict, store: Path) -> dict:
    """The ledger's counts of one update, as a mean over the exit steps."""
    config = resolve(BASE | fields)
    steps = len(exits(config))
    points = math.lcm(steps, steps - method_of(config).first_exit)
    counts = {}
    for point in range(points):
        run = build(config, store, draws=exiting_at(point))
        update(run)
        for role, row in run.ledger.counts.items():
            total = counts.setdefault(role, dict.fromkeys(row, 0.0))
            for kind, count in row.items():
                total[kind] += count
    return {role: {kind: n / points for kind, n in row.items()} for role, row in counts.items()}


def exiting_at(point: int) -> type[Draws]:
    """Class of draws with which every rollout exits at step `point` modulo the number of exits."""

    class Exiting(Draws):
        def shared_integer(self, purpose: str, high: int) -> int:
            return point % high

    return Exiting


@dataclass(frozen=True)
class SGMDAsReleased(Method):
    """The passes of LightX2V@f8aee98, trainers/sgmd.py, with unused ones; any loss will do."""

    paper: ClassVar[str] = "none"

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        x0 = nets.rollout(batch)
        scores = renoise(nets, batch, x0, through_fake_score=True)
        with torch.no_grad():  # both scores once more, for a value that is logged
            renoise(nets, batch, x0, through_fake_score=False)
        return Loss({"fisher": (scores.x0_fake - scores.x0_teacher).square().mean()}, x0)


def test_the_released_code_of_sgmd_pays_for_passes_that_it_discards(tmp_path, monkeypatch):
    """The passes of the released code cost 18.0 per update; 14.0 suffice."""
    # it freezes nothing: its student's backward computes weight gradients of the fake score, which
    # the next phase drops
    monkeypatch.setattr(
        Phase,
        "only_trainable",
        lambda self: [net.requires_grad_(True) for net in self.networks.values()],
    )
    fields = {"method": f"{__name__}:SGMDAsReleased", "fake_score_updates": 1}
    counted = counted_by_exit(fields, tmp_path)
    assert folded(counted) == {"student": (5, 2), "fake_score": (3, 4), "teacher": (4, 0)}
    assert priced(counted, {}) == 18.0
    assert priced(counted, {"teacher": 14, "student": 1.3}) == pytest.approx(57.1, abs=0.06)


def test_shared_sgmd_costs_a_third_of_dmd2():
    shared, dmd2 = (
        priced(passes(resolve(BASE | TABLE[row][0])), {})
        for row in ("sgmd shared", "dmd2 video K=5")
    )
    assert shared / dmd2 <= 0.33


def test_the_command_prices_a_sweep_for_a_larger_teacher(tmp_path: Path, capsys):
    path = tmp_path / "sweep.yaml"
    path.write_text("question: q\nbase: {method: dmd2}\ngrid: {fake_score_updates: [1, 5]}\n")
    assert main([str(path), "--size", "teacher=14", "--size", "student=1.3"]) == 0
    assert "54.54" in capsys.readouterr().out


@dataclass(frozen=True)
class NeedsItsArchitecture(Method):
    """A method that works only with networks of one architecture."""

    paper: ClassVar[str] = "none"

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        return Loss({"weights": nets.student.net.patch_embedding.weight.square().mean()})


def test_a_method_that_fails_on_stand_ins_has_no_cost_and_says_why():
    config = resolve(BASE | {"method": f"{__name__}:NeedsItsArchitecture"})
    with pytest.raises(ValueError, match="an update on a stand-in network failed .*patch_embed"):
        passes(config)


@pytest.mark.slow
def test_costs_are_known_without_diffusers():
    """A sweep is planned before anything of diffusers is imported, which takes seconds."""
    code = "import sys, distill_bench.plan.cost; assert 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
