"""One phase of an update: degenerate samples stop it before any weight moves."""

from dataclasses import dataclass

import pytest
import torch

from distill_bench.method import Batch, Loss, Method, Nets
from distill_bench.testing.runs import Runs
from distill_bench.train.phase import Collapsed


@dataclass(frozen=True)
class Scaled(Method):
    """A method whose samples are the student's, times a factor."""

    paper = "none"
    factor: float = 1.0

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        x0 = self.factor * nets.rollout(batch)
        return Loss({"size": x0.square().mean()}, x0)


@pytest.mark.parametrize(("factor", "collapses"), [(1.0, False), (1e-4, True), (1e4, True)])
def test_samples_far_from_unit_variance_stop_the_run(factor, collapses, tmp_path):
    method = {"name": f"{__file__}:Scaled", "factor": factor}
    run = Runs(method, tmp_path).build(teacher="gaussian", data=None)
    before = [p.detach().clone() for p in run.networks["student"].parameters()]
    if collapses:
        with pytest.raises(Collapsed, match="samples have standard deviation"):
            run.update_student()
    else:
        run.update_student()
    moved = [
        not torch.equal(p, first)
        for p, first in zip(run.networks["student"].parameters(), before, strict=True)
    ]
    assert any(moved) != collapses
