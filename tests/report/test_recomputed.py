"""Every number of the tables, recomputed here from the data files with scipy and statsmodels.

The study has what makes mistakes visible: seeds in different orders, seeds that one row lacks, a
failed run, two clips per prompt, scores in every direction, and checkpoints at unequal costs.
"""

import itertools
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from stores import update_json, write_results

from distill_bench.report.read_store import REFERENCE
from distill_bench.report.results import Column, Results, load
from distill_bench.report.rows import COST
from distill_bench.report.stats import power
from distill_bench.report.tables.files import table_files
from distill_bench.report.tables.scores import budget

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
BASELINE = "alpha k=5"


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
            label = f"{method} k={k}"
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


def t_interval(values) -> tuple[float, float, float]:
    """Mean, low and high of Student's t interval."""
    if len(values) < 2:
        return float(np.mean(values)), np.nan, np.nan
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    return float(np.mean(values)), low, high


def crossed(values: np.ndarray) -> tuple[float, float, float]:
    """Mean, low and high from the variances over seeds and over prompts (two clips each)."""
    parts, dofs = [], []
    for means in (values.mean(1), values.reshape(len(values), -1, 2).mean((0, 2))):
        if len(means) > 1:
            parts.append(means.var(ddof=1) / len(means))
            dofs.append(len(means) - 1)
    dof = sum(parts) ** 2 / sum(np.square(parts) / dofs)
    half = stats.t.ppf(0.975, dof) * sum(parts) ** 0.5
    return values.mean(), values.mean() - half, values.mean() + half


def close(actual, expected, rel=1e-5):
    """Equal mean, and bounds equal within `rel` of the half width; nan equals nan."""
    scale = expected[2] - expected[0]
    assert actual[0] == pytest.approx(expected[0], rel=1e-5)
    np.testing.assert_allclose(actual[1:], expected[1:], atol=rel * scale + 1e-5 * abs(actual[0]))


def parts(line, name):
    return [line[f"{name}_{part}"] for part in ("mean", "low", "high")]


def test_table_csv_has_the_mean_and_interval_over_the_seeds_of_each_row():
    table = study().tables["table.csv"].set_index("label")
    assert table.index.tolist() == ["teacher", *study().scores]
    for label, by_seed in study().scores.items():
        line = table.loc[label]
        for name in ("d", "m", "x", COST, "train_seconds"):
            close(parts(line, name), t_interval([scores[name] for scores in by_seed.values()]))
            assert line[f"{name}_n"] == len(by_seed)
        clips = np.stack([scores["clips"] for scores in by_seed.values()])
        if len(clips) > 1:
            close(parts(line, "u"), crossed(clips), rel=0.06)
        assert line["u_n"] == line["done"] == len(by_seed)
        assert line["expected"] == len(by_seed) + (label == "beta k=1")
        assert line["failed"] == (label == "beta k=1") and line["reference"] == 0
    teacher = table.loc["teacher"]
    close(parts(teacher, "d"), (2.0, 2.0 - 1.96 * 0.25, 2.0 + 1.96 * 0.25))
    close(parts(teacher, "u"), crossed(study().teacher_clips[None]), rel=0.06)
    assert teacher["reference"] == 1


def test_markdown_has_the_numbers_of_the_csv_file():
    text = study().tables["table.md"].split("## ")[1].replace("**", "")
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    heads, body = lines[0], lines[2:]
    table = study().tables["table.csv"]
    names = {
        "Distance ↓": "d",
        "Use ↑": "u",
        "Motion → 1": "m",
        "Training time (s)": "train_seconds",
    }
    for cells, (_, line) in zip(body, table.iterrows(), strict=True):
        for head, name in names.items():
            mean, low, high = parts(line, name)
            shown = cells[heads.index(head)].replace(",", "").split(" (")[0].split(" ± ")
            if np.isnan(mean):
                assert shown == ["—"]
                continue
            half = (high - low) / 2
            assert float(shown[0]) == pytest.approx(
                mean, abs=max(0.05 * np.nan_to_num(half), 0.051)
            )
            assert len(shown) == (1 if np.isnan(half) else 2)
            if len(shown) == 2:
                assert float(shown[1]) == pytest.approx(half, rel=0.06)


def expected_difference(a: dict[int, float], b: dict[int, float]):
    """Mean, low, high and p of a - b over the common seeds, by scipy."""
    common = sorted(a.keys() & b.keys())
    result = stats.ttest_rel([a[seed] for seed in common], [b[seed] for seed in common])
    low, high = result.confidence_interval(0.95)
    return (np.mean([a[s] - b[s] for s in common]), low, high), result.pvalue, len(common)


def check_differences(table: pd.DataFrame, scores, names):
    """Compare a file of differences with `scores(label, name)`, a dict by seed."""
    labels = list(study().scores)
    pairs = {frozenset(pair) for pair in itertools.combinations(labels, 2)}
    for name in names:
        lines = table[table["column"] == name]
        assert {frozenset(pair) for pair in zip(lines["a"], lines["b"], strict=True)} == pairs
        better = {column.name: column.better for column in SCORES}[name]
        for _, line in lines.iterrows():
            a, b = scores(line["a"], name), scores(line["b"], name)
            assert line["a"] != BASELINE, "the baseline is subtracted"
            common = a.keys() & b.keys()
            assert line["seeds"] == len(common)
            if not common:
                assert np.isnan(line["difference"]) and np.isnan(line["p"])
                continue
            interval, p, _ = expected_difference(a, b)
            close([line["difference"], line["low"], line["high"]], interval)
            loss = {"lower": 1, "higher": -1}.get(better, 0) * interval[0]
            if better == "one":
                distances = [{s: abs(v - 1) for s, v in row.items()} for row in (a, b)]
                (loss, *_), p, _ = expected_difference(*distances)
            assert line["p"] == pytest.approx(p, rel=1e-4)
            favoured = line["a"] if loss < 0 else line["b"]
            assert line["favours"] == (favoured if line["p_holm"] < 0.05 else "")
            sd = np.std([a[s] - b[s] for s in common], ddof=1)
            if "seeds_needed" in line and line["seeds_needed"] > 2:
                needed = int(line["seeds_needed"])
                assert power(needed, sd, interval[0]) >= 0.8 > power(needed - 1, sd, interval[0])


def check_holm(table: pd.DataFrame):
    """Compare p_holm (all pairs) and p_holm_baseline (pairs with the baseline) with statsmodels."""
    for _, lines in table.groupby("column"):
        for column, family in (("", lines), ("_baseline", lines[lines["b"] == BASELINE])):
            tested = family[family["p"].notna()]
            corrected = multipletests(tested["p"], method="holm")[1]
            np.testing.assert_allclose(tested[f"p_holm{column}"], corrected, rtol=1e-4)
            assert set(tested[f"comparisons{column}"]) == {len(tested)}
        assert lines.loc[lines["b"] != BASELINE, "p_holm_baseline"].isna().all()


def test_differences_are_paired_by_seed_and_corrected_by_holm():
    table = study().tables["differences.csv"].fillna({"favours": ""})
    final = study().scores

    def by_seed(label, name):
        return {seed: scores[name] for seed, scores in final[label].items()}

    check_differences(table, by_seed, ("d", "m"))
    check_holm(table)
    planned = {label: set(row) for label, row in final.items()}
    planned["beta k=1"] = planned["beta k=1"] | {4}  # the failed run
    for _, line in table.iterrows():
        assert line["expected"] == len(planned[line["a"]] & planned[line["b"]])
    for _, line in table[table["column"] == "u"].iterrows():
        rows = final[line["a"]], final[line["b"]]
        common = rows[0].keys() & rows[1].keys()
        if common:
            clips = np.stack([rows[0][seed]["clips"] - rows[1][seed]["clips"] for seed in common])
            close([line["difference"], line["low"], line["high"]], crossed(clips), rel=0.06)
            favoured = line["a"] if line["difference"] > 0 else line["b"]
            assert line["favours"] == (favoured if line["p_holm"] < 0.05 else "")


def test_scores_at_equal_cost_are_interpolated_per_run_and_averaged_over_seeds():
    finals = [scores[COST] for row in study().scores.values() for scores in row.values()]
    cost = min(finals)
    assert budget(study().results) == pytest.approx(cost)
    table = study().tables["equal_cost.csv"].set_index("label")
    for label in study().scores:
        for name in ("student_updates", "d", "u", "m"):
            values = study().at_cost(label, name, cost)
            assert table.loc[label, f"{name}_n"] == len(values)
            close(parts(table.loc[label], name), t_interval(list(values.values())))
    assert table.loc[BASELINE, "d_n"] == 4, "one run is first evaluated at a higher cost"
    assert (table["student_updates_mean"] < 50.1).all()


def test_differences_at_equal_cost_are_paired_by_seed_and_corrected_by_holm():
    cost = budget(study().results)
    table = study().tables["equal_cost_differences.csv"].fillna({"favours": ""})
    check_differences(table, lambda label, name: study().at_cost(label, name, cost), "dum")
    check_holm(table)
    assert table[COST].tolist() == pytest.approx([cost] * len(table), rel=1e-5)


def test_seeds_needed_follow_from_the_spread_of_the_differences_to_the_baseline():
    table = study().tables["seeds_needed.csv"].set_index("column")
    for name in ("d", "m"):
        rows = {
            label: {seed: scores[name] for seed, scores in row.items()}
            for label, row in study().scores.items()
        }
        base = rows.pop(BASELINE)
        squares = dof = 0.0
        for row in rows.values():
            both = [row[seed] - base[seed] for seed in row.keys() & base.keys()]
            if len(both) > 1:
                squares += np.var(both, ddof=1) * (len(both) - 1)
                dof += len(both) - 1
        line = table.loc[name]
        sd, mean = (squares / dof) ** 0.5, np.mean(list(base.values()))
        assert line["baseline"] == BASELINE
        assert line["mean"] == pytest.approx(mean, rel=1e-5)
        assert line["sd_of_differences"] == pytest.approx(sd, rel=1e-5)
        for percent in (5, 10, 25, 50):
            needed = int(line[f"gap_{percent}"])
            gap = percent / 100 * mean
            assert power(needed, sd, gap) >= 0.8
            assert needed == 2 or power(needed - 1, sd, gap) < 0.8


@pytest.mark.parametrize("spread", [0.02, 0.3, 3.0])
def test_a_row_is_best_if_all_paired_intervals_exclude_0_jointly(spread):
    """Bonferroni over the rivals; gamma has no seed in common with them, so it must be dropped."""
    made = study(lost=False, spread=spread)
    lines = made.tables["table.csv"].set_index("label")
    assert lines["clear_best"].isna().all(), "a row without a common seed is no proven rival"
    kept = [row for row in made.results.rows if row.method != "gamma"]
    results = Results(**{**vars_of(made.results), "rows": tuple(kept)})
    bold = table_files(results)["table.csv"]
    winners = {
        name: line.split(",")[0]
        for line in bold.splitlines()[1:]
        for name in line.rpartition(",")[2].split()
    }
    for name, better in (("d", "lower"), ("m", "one")):
        rows = {
            label: {
                seed: abs(scores[name] - 1) if better == "one" else scores[name]
                for seed, scores in row.items()
            }
            for label, row in made.scores.items()
            if not label.startswith("gamma")
        }
        best = min(rows, key=lambda label: np.mean(list(rows[label].values())))
        proven = True
        for label, row in rows.items():
            if label != best:
                common = sorted(row.keys() & rows[best].keys())
                values = [rows[best][seed] - row[seed] for seed in common]
                test = stats.ttest_1samp(values, 0)
                proven &= bool(test.confidence_interval(1 - 0.05 / (len(rows) - 1)).high < 0)
        assert winners.get(name) == (best if proven else None)


def vars_of(results: Results) -> dict:
    names = ("folder", "manifest", "runs", "checkpoints", "training", "rows", "clip_scores")
    return {name: getattr(results, name) for name in names}
