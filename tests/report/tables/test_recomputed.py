"""Every number of the tables, recomputed from made-up scores with scipy and statsmodels."""

import csv
import io
import itertools

import numpy as np
import pandas as pd
import pytest
from known_study import BASELINE, SCORES, study
from scipy import stats
from statsmodels.stats.multitest import multipletests

from distill_bench.report.results import Results
from distill_bench.report.rows import COST
from distill_bench.report.stats import power
from distill_bench.report.tables.files import table_files
from distill_bench.report.tables.scores import budget


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
        assert line["expected"] == len(by_seed) + (label == "Beta, k 1")
        assert line["failed"] == (label == "Beta, k 1") and line["reference"] == 0
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
    planned["Beta, k 1"] = planned["Beta, k 1"] | {4}  # the failed run
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
        name: line["label"]
        for line in csv.DictReader(io.StringIO(bold))
        for name in line["clear_best"].split()
    }
    for name, better in (("d", "lower"), ("m", "one")):
        rows = {
            label: {
                seed: abs(scores[name] - 1) if better == "one" else scores[name]
                for seed, scores in row.items()
            }
            for label, row in made.scores.items()
            if not label.startswith("Gamma")
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


def sections(text: str) -> dict[str, list[list[str]]]:
    """Cells of the table under each heading of a Markdown file."""
    tables = {}
    for section in text.split("## ")[1:]:
        lines = [line for line in section.splitlines() if line.startswith("|")]
        tables[section.splitlines()[0]] = [line.strip("| ").split(" | ") for line in lines]
    return tables


def number(text: str) -> float:
    return float(text.strip("*").replace(",", "").split(" ± ")[0])


def test_markdown_has_the_differences_of_the_csv_files():
    """With the p-values, the verdicts and the bold of the pairs with the baseline."""
    tables = sections(study().tables["table.md"])
    final = study().tables["differences.csv"]
    at_cost = study().tables["equal_cost_differences.csv"]
    costs = study().tables["table.csv"].set_index("label")[f"{COST}_mean"]
    rows = [label for label in study().scores if label != BASELINE]
    headings = {"d": "Distance ↓", "u": "Use ↑", "m": "Motion → 1"}
    for name, heading in headings.items():
        lines = final[(final["column"] == name) & (final["b"] == BASELINE)].set_index("a")
        head, _, *body = tables[f"{heading}: difference to {BASELINE}"]
        assert head[:5] == ["row", "seeds", "difference", "p (Holm over 2)", "favours"]
        assert [cells[0] for cells in body] == rows
        for label, seeds, difference, p, favours, ratio in body:
            line = lines.loc[label]
            assert int(seeds) == line["seeds"]
            assert number(ratio.removesuffix(" x")) == pytest.approx(
                costs[label] / costs[BASELINE], abs=0.006
            )
            if not line["seeds"]:
                assert (difference, p, favours) == ("—", "—", "neither")
                continue
            assert number(difference) == pytest.approx(line["difference"], rel=0.01)
            assert difference[0] == ("+" if line["difference"] > 0 else "-")
            adjusted = line["p_holm_baseline"]
            assert (
                p == "<0.001" if adjusted < 0.001 else float(p) == pytest.approx(adjusted, abs=6e-3)
            )
            assert (favours == "neither") == (adjusted >= 0.05)
            assert favours in ("neither", label, BASELINE)
        equal = at_cost[(at_cost["column"] == name) & (at_cost["b"] == BASELINE)].set_index("a")
        head, _, *body = tables[f"At equal cost: difference to {BASELINE}"]
        for label, cells in zip(rows, body, strict=True):
            cell = cells[head.index(heading)]
            if not equal.loc[label, "seeds"]:
                assert cell == "—"
                continue
            assert number(cell) == pytest.approx(equal.loc[label, "difference"], rel=0.01)
            assert cell.startswith("**") == (equal.loc[label, "p_holm_baseline"] < 0.05)


def vars_of(results: Results) -> dict:
    names = ("folder", "manifest", "runs", "checkpoints", "training", "rows", "clip_scores")
    return {name: getattr(results, name) for name in names}
