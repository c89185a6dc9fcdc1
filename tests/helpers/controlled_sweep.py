"""A sweep with controls, written by hand, for the tests of figures."""

from pathlib import Path
from tempfile import TemporaryDirectory

from stores import write_results

from distill_bench.report.read_store import REFERENCE
from distill_bench.report.results import Column, Results, load
from distill_bench.report.rows import COST
from distill_bench.sample.reference_kinds import role_of

SCORES = [
    Column("d", "Distance to the clips of the teacher, in a long title", "", "lower", True),
    Column("m", "Motion", "", "one", True),
]
SWEPT = ["lr", "k", "method.preset"]
REFERENCES = ["teacher_other", *(f"a_reference_with_a_long_name-nfe{n}" for n in (1, 2, 4, 8))]


def controlled_sweep(spread: float = 0.1) -> Results:
    """Two presets of one method, and another method, at three values of `k` with three seeds.

    Each has a control, with another learning rate, only at k = 1.

    Args:
        spread: relative difference in distance of two seeds.
    """
    lines = [("alpha", "official", 0.5, 1.0), ("alpha", "paper", 0.1, 20.0), ("beta", "", 0.5, 0.6)]
    rows = [(*line, k) for line in lines for k in (1, 2, 5)]
    rows.append(("alpha", "official", 2.5, 1.3, 1))
    rows.append(("alpha", "paper", 0.5, 25.0, 1))
    rows.append(("beta", "", 2.5, 0.7, 1))
    runs, checkpoints, training = [], [], []
    for method, preset, rate, level, k in rows:
        for seed in range(3):
            run_id = f"r{len(runs)}"
            distance = level * (1 + spread * (seed - 1))
            motion = 1.2 + 0.3 * (seed - 1)
            keys = {"method": method, "method.preset": preset, "lr": rate, "k": k, "seed": seed}
            scores = {"d": distance, "m": motion, COST: 100 * k + level}
            runs.append({"run_id": run_id} | keys | scores)
            for updates in (5, 10, 50):
                point = {"run_id": run_id, "student_updates": updates, COST: updates * k}
                checkpoints.append(point | {"d": 50 / updates * distance, "m": motion})
            for updates in (5, 50):
                line = {"run_id": run_id, "student_updates": updates}
                gaps = {"gap/sigma_0.02-0.26": distance, "gap/sigma_0.26-0.50": updates * distance}
                training.append(line | gaps)
    for kind in REFERENCES:
        line = {"run_id": f"reference-{kind}", "method": kind, "role": role_of(kind)}
        runs.append(line | {"status": REFERENCE, "d": 0.2, "m": 1.0})
    with TemporaryDirectory() as folder:
        write_results(Path(folder), SCORES, SWEPT, "k", runs, checkpoints, training)
        return load(folder)
