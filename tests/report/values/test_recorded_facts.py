"""Facts that runs record beside their configs: a comparison names them; costs are never tested."""

import pytest
from stores import update_json, write_run

from distill_bench.report.compare import config_differences, find_run
from distill_bench.report.results import COSTS


@pytest.mark.parametrize("fact", ["code_fingerprint", "commit", "version", "hardware", "protocol"])
def test_a_comparison_names_the_one_fact_in_which_two_runs_differ(tmp_path, fact):
    """Differences of scores between two codes or machines are no differences of methods."""
    runs = []
    for seed, place in enumerate(("here", "elsewhere")):
        name = write_run(tmp_path, "alpha", seed, 1, 10.0)
        update_json(tmp_path / name / "result.json", **{fact: place})
        runs.append(find_run(name, tmp_path))
    found = config_differences(*runs)
    assert found == [("seed", 0, 1), (fact, "here", "elsewhere")]


def test_costs_are_no_headline_scores():
    """Holm's correction is over the headline scores alone."""
    assert not any(column.headline for column in COSTS)
