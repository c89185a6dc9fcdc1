"""A method that tests can make pause, wait and raise from outside."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from distill_bench.method import Batch, Loss, Method, Nets, renoise, toward


@dataclass(frozen=True)
class Slow(Method):
    """The score difference as gradient, with a pause of SLOW_SECONDS.

    Raises while the file `broken` names the run's seed. The third update waits while the file
    `held` exists.
    """

    paper: ClassVar[str] = "none"
    broken: str = ""
    held: str = ""

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        time.sleep(float(os.environ.get("SLOW_SECONDS", 0)))
        if (
            self.broken
            and Path(self.broken).exists()
            and batch.draws.seed == int(Path(self.broken).read_text())
        ):
            raise RuntimeError("the method is broken")
        while self.held and batch.draws.student_update > 1 and Path(self.held).exists():
            time.sleep(0.1)
        x0 = nets.rollout(batch)
        scores = renoise(nets, batch, x0.detach(), through_fake_score=False)
        return Loss({"matching": toward(x0, scores.x0_fake - scores.x0_teacher)}, x0)
