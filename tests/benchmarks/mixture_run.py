"""Seconds of whole runs on the mixture teacher: `make bench`.

The first run of each method in `sweeps/ground_mixture.yaml` (1,000 updates of batch 128, one
fake-score update per student update, one thread), with its checkpoints and logs, without sampling
and scoring. Prints both times beside the limit of 20 s. Measure on an idle machine: other work
shares cores and caches, so that processor seconds rise too.
"""

import sys
import tempfile
import time
from pathlib import Path

from distill_bench.config.sweep_file import load_sweep
from distill_bench.config.yaml_files import dump_yaml
from distill_bench.store.machine import keep_freed_memory
from distill_bench.train.loop import train

SWEEP = Path(__file__).parents[2] / "sweeps" / "ground_mixture.yaml"
MOST_SECONDS = 20


def main() -> int:
    """Train the runs; 1 if a run does not end as it should."""
    keep_freed_memory()  # as in a worker
    runs = {config.method["name"]: config for config in reversed(load_sweep(SWEEP).expand())}
    failed = False
    for name, config in sorted(runs.items()):
        run_dir = Path(tempfile.mkdtemp()) / "run"
        run_dir.mkdir()
        text = dump_yaml(config.model_dump(mode="json"))
        (run_dir / "run.yaml").write_text(text, encoding="utf-8")
        processor, wall = time.process_time(), time.perf_counter()
        status = train(run_dir)["status"]
        processor, wall = time.process_time() - processor, time.perf_counter() - wall
        failed |= status != "done"
        print(
            f"mixture {name:5} {status}: {config.student_updates} updates of batch "
            f"{config.batch_size} in {processor:.1f} processor seconds, {wall:.1f} s; "
            f"limit on an idle core {MOST_SECONDS} s",
            flush=True,
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
