"""Labels of rows: as short as possible, and no shorter."""

import json

from stores import load_results, update_json, write_run, write_store


def test_a_label_has_the_values_that_tell_rows_apart_and_no_others(tmp_path):
    store = tmp_path / "runs"
    plain, other = ({"name": "alpha", "kind": kind} for kind in ("plain", "other"))
    for cadence in (1, 5):
        write_run(store, "alpha", 0, cadence, 1.0, method=plain, reuse=False, lr=1e-4)
        write_run(store, "alpha", 0, cadence, 1.0, method=other, reuse=True, lr=1e-4)
        write_run(store, "beta", 0, cadence, 1.0, reuse=False, lr=1e-4)
    write_run(store, "beta", 0, 1, 1.0, reuse=False, lr=5e-4)
    run_ids = sorted(path.name for path in store.iterdir())
    axes = {"method": [], "fake_score_updates": [1, 5], "method.kind": [], "reuse": [], "lr": []}
    (store / "sweeps").mkdir()
    sweep = {"question": "?", "run_ids": run_ids, "axes": axes}
    (store / "sweeps" / "speed.json").write_text(json.dumps(sweep))
    series = {row.series for row in load_results(store, tmp_path / "data").students}
    assert series == {"alpha plain", "alpha other", "beta", "beta lr=0.0005"}


def test_a_label_shows_a_setting_that_only_differs_between_methods(tmp_path):
    """Beta has one row, so its name would do, but its row also reuses the rollout."""
    store = write_store(tmp_path, [])
    run_ids = [
        write_run(store, method, 0, cadence, 4.0, reuse_rollout=method == "beta")
        for method, cadence in (("alpha", 1), ("alpha", 5), ("beta", 1))
    ]
    axes = {"method": [], "fake_score_updates": [1, 5], "reuse_rollout": [False, True]}
    update_json(store / "sweeps" / "speed.json", run_ids=run_ids, axes=axes)
    assert [row.label for row in load_results(store, tmp_path / "data").students] == [
        "alpha fake_score_updates=1",
        "alpha fake_score_updates=5",
        "beta reuse_rollout fake_score_updates=1",
    ]
