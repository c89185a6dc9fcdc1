"""A study made up for tests of tables, with the scores that went into it.

It has what makes mistakes visible: seeds in different orders, seeds that one row lacks, a failed
run, two clips per prompt, scores in every direction, and checkpoints at unequal costs.
"""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
from stores import update_json, write_results

from distill_bench.report.read_store import REFERENCE
from distill_bench.report.results import Column, Results, load
from distill_bench.report.rows import COST
from distill_bench.report.tables.files import table_files

SCORES = [
    Column("d", "Distance", "", "lower", True),
    Column("u", "Use", "", "higher", True),  # has one value per clip
    Column("m", "Motion", "", "one", True),
    Column("x", "Extra", "", None, False),
]
PROMPTS = np.repeat(np.arange(8), 2)
# row -> (level of d, seeds in the order of runs.csv, cost of a student update)
ROWS = {
    ("alpha", 1): (10.0, (0, 1, 2, 3, 4), 1.0),
    ("alpha", 5): (14.0, (5, 4, 3, 2, 1), 3.0),
    ("beta", 1): (10.6, (3, 0, 2), 1.5),
    ("gamma", 1): (11.0, (7,), 1.1),
}
UPDATES = (10, 20, 50)  # evaluated student updates
BASELINE = "Alpha, k 5"


class Study:
    """Scores as they were made up, and the tables that the report makes of them."""

    def __init__(self, lost: bool, spread: float):
        """Args: lost: with a failed run. spread: noise of a seed, relative to that of the rows."""
        generator = np.random.default_rng(0)
        shared = generator.normal(size=8)  # effect of a training seed, in every row
        prompts = generator.normal(size=8)
        self.scores: dict[str, dict[int, dict]] = {}  # row -> seed -> scores
        self.points: dict[str, dict[int, pd.DataFrame]] = {}  # row -> seed -> checkpoints
        runs, checkpoints, clips = [], [], []
        for (method, k), (level, seeds, cost) in ROWS.items():
            label = f"{method.capitalize()}, k {k}"
            self.scores[label], self.points[label] = {}, {}
            for seed in seeds:
                run_id = f"{method}{k}-{seed}"
                noise = spread * generator.normal(size=3)
                per_clip = 30 - 2 * level + prompts[PROMPTS] + shared[seed]
                per_clip = per_clip + spread * generator.normal(size=16) + noise[1]
                per_clip = np.array([float(f"{value:.4g}") for value in per_clip])
                scores = {
                    "d": level + shared[seed] + noise[0],
                    "u": per_clip.mean(),
                    "m": 1 + 0.1 * (level - 10.3) + 0.05 * shared[seed] + 0.1 * noise[2],
                    "x": level / 3 + noise[0],
                }
                per_update = cost * (1 + 0.05 * seed) * (3 if run_id == "alpha5-5" else 1)
                points = pd.DataFrame({"student_updates": UPDATES})
                points[COST] = points["student_updates"] * per_update
                for name, value in scores.items():
                    points[name] = value * (1 + (50 - points["student_updates"]) / 40)
                checkpoints += points.assign(run_id=run_id).to_dict("records")
                clips.append((run_id, "u", " ".join(f"{value:.4g}" for value in per_clip)))
                keys = {"run_id": run_id, "method": method, "k": k, "seed": seed}
                costs = {COST: 50 * per_update, "train_seconds": 9.0 + seed}
                runs.append(keys | scores | costs)
                self.scores[label][seed] = scores | costs | {"clips": per_clip}
                self.points[label][seed] = points
        if lost:
            runs.append({"run_id": "f", "method": "beta", "k": 1, "seed": 4, "status": "failed"})
        self.teacher_clips = np.array([float(f"{v:.4g}") for v in generator.normal(5, 1, 16)])
        teacher = {"method": "teacher", "role": "teacher", "status": REFERENCE}
        teacher |= {"d": 2.0, "d_sd": 0.25, "u": self.teacher_clips.mean(), "run_id": "t"}
        clips.append(("t", "u", " ".join(f"{value:.4g}" for value in self.teacher_clips)))
        training = [{"run_id": run["run_id"], "student_updates": 1} for run in runs]
        with TemporaryDirectory() as name:
            folder = Path(name)
            write_results(folder, SCORES, ["k"], "k", [teacher, *runs], checkpoints, training)
            frame = pd.DataFrame(clips, columns=["run_id", "column", "values"])
            frame.to_csv(folder / "clips.csv", index=False)
            baseline = {"method": "alpha", "k": 5}
            update_json(folder / "sweep.json", prompts=PROMPTS.tolist(), baseline=baseline)
            self.results: Results = load(folder)
            self.tables = {}
            for file, text in table_files(self.results).items():
                (folder / file).write_text(text)
                if file.endswith(".csv"):
                    self.tables[file] = pd.read_csv(folder / file)
                else:
                    self.tables[file] = text

    def at_cost(self, label: str, name: str, cost: float) -> dict[int, float]:
        """Linear in the cost between the two checkpoints around it, by seed."""
        values = {}
        for seed, points in self.points[label].items():
            costs, scores = points[COST].tolist(), points[name].tolist()
            for i in range(len(costs) - 1):
                if costs[i] <= cost <= costs[i + 1] * (1 + 1e-9):
                    share = (cost - costs[i]) / (costs[i + 1] - costs[i])
                    values[seed] = (1 - share) * scores[i] + share * scores[i + 1]
        return values


@cache
def study(lost: bool = True, spread: float = 0.3) -> Study:
    return Study(lost, spread)
