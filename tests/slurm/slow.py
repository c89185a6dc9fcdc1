"""A method that tests can make pause, wait and raise from outside."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from distill_bench.method import Batch, Loss, Nets
from distill_bench.methods.sgmd import SGMD


@dataclass(frozen=True)
class Slow(SGMD):
    """SGMD with a pause of SLOW_SECONDS per update that obeys the files in the folder `orders`.

    `raise-SEED`: a run of this seed raises. `hold-SEED`: its third update waits until the file is
    gone.
    """

    orders: str = ""

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        time.sleep(float(os.environ.get("SLOW_SECONDS", 0)))
        orders, seed = Path(self.orders), batch.draws.seed
        if (orders / f"raise-{seed}").exists():
            raise RuntimeError("the method is broken")
        while batch.draws.student_update > 1 and (orders / f"hold-{seed}").exists():
            time.sleep(0.1)
        return super().student_loss(nets, batch)
