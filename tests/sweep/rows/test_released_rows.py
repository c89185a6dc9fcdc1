"""Networks that were trained elsewhere as rows of a sweep, and by `distill-bench score`."""

from pathlib import Path

import numpy as np
import pytest
from runs import TINY_RUN
from safetensors.torch import load_file, save_file

from distill_bench.cli import main as cli
from distill_bench.config.errors import ConfigError
from distill_bench.config.sweep_file import load_sweep
from distill_bench.config.yaml_files import dump_yaml
from distill_bench.export import export
from distill_bench.report.data_files import data_files
from distill_bench.report.read_store import read_sweep
from distill_bench.report.results import COSTS, load
from distill_bench.report.tables.scores import score_table
from distill_bench.sweep.launch import LaunchOptions, run_debug
from distill_bench.sweep.manifest import open_sweep
from distill_bench.sweep.prechecks import check_sweep

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tiny_wan, tmp_path_factory):
    """Folder with a finished sweep of one run, and its student as an exported pipeline."""
    folder = tmp_path_factory.mktemp("released")
    write(folder)
    run_debug(opened(folder), LaunchOptions())
    (run,) = opened(folder).runs
    export(folder / "runs" / run, folder / "student")
    return folder


@pytest.fixture(autouse=True)
def teacher(tiny_wan, monkeypatch):
    monkeypatch.setitem(TINY_RUN, "teacher", str(tiny_wan))


@pytest.fixture(scope="module", autouse=True)
def teacher_of_module(tiny_wan):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TINY_RUN, "teacher", str(tiny_wan))
        yield


def write(folder: Path, **keys) -> Path:
    path = folder / "s.yaml"
    path.write_text(dump_yaml({"question": "?", "base": TINY_RUN, **keys}))
    return path


def opened(folder: Path):
    return open_sweep(load_sweep(folder / "s.yaml"), folder / "runs", folder / "results")


def clips(folder: Path) -> np.ndarray:
    return np.load(folder / "clips.npy")


def test_an_exported_student_has_the_clips_of_its_run(trained, tmp_path):
    """As a pipeline, and by its weights alone; by the other stepping its clips differ."""
    weights = trained / "student" / "transformer" / "diffusion_pytorch_model.safetensors"
    rows = [
        {"name": "ours", "network": str(trained / "student")},
        {"name": "ours, weights", "network": str(weights)},
        {"name": "ours, ODE", "network": str(weights), "stepping": "ode", "sigmas": [1, 0.5]},
    ]
    write(trained, rows=rows)
    sweep = opened(trained)
    assert check_sweep(sweep, 1) is not None
    run_debug(sweep, LaunchOptions())
    sweep.write()
    (run,) = sweep.runs
    own = clips(trained / "runs" / run / "samples" / "2")
    made = {
        row.label: clips(trained / "runs" / name / "samples/0")
        for name, (row, _) in sweep.rows.items()
    }
    np.testing.assert_array_equal(made["ours"], own)
    np.testing.assert_array_equal(made["ours, weights"], own)
    assert not np.array_equal(made["ours, ODE"], own)

    for name, text in data_files(read_sweep("s", trained / "runs")).items():
        (tmp_path / name).write_text(text)
    results = load(tmp_path)
    table = score_table(results, results.headline + COSTS[:1])
    costs = {row.label: cells[-1].text for row, cells in table.lines}
    assert costs["ours"] == costs["ours, ODE"] == "trained elsewhere"
    assert costs["DMD2"] not in ("trained elsewhere", "—")
    motion = {row.label: cells[-2].text for row, cells in table.lines}
    assert motion["ours"] == motion["ours, weights"] != "—"


def test_the_command_scores_one_network_and_the_sweep_takes_it_over(trained, capsys):
    path = write(trained)
    command = [
        "score",
        str(trained / "student"),
        "--protocol",
        str(path),
        "--name",
        "theirs",
        "--nfe",
        "1",
        "--store",
        str(trained / "runs"),
    ]
    assert cli(command) == 0
    printed = capsys.readouterr().out
    folder = Path(printed.splitlines()[-1])
    assert "motion" in printed
    assert folder.name.startswith("row-theirs-")
    rows = [{"name": "theirs", "network": str(trained / "student"), "nfe": 1}]
    write(trained, rows=rows)
    assert opened(trained).states()[folder.name] == "done"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"network": "nowhere"}, "rows: x: network 'nowhere' is neither a folder nor a file"),
        ({"network": "runs"}, "is no pipeline folder: it lacks transformer"),
        ({"network": "student", "sigmas": [0.5]}, "noise levels start at 1"),
        ({"network": "student", "steps": 4}, "unknown key 'rows.0.steps'"),
    ],
)
def test_a_row_that_cannot_be_made_is_one_line(row, message, trained, monkeypatch):
    monkeypatch.chdir(trained)
    write(trained, rows=[{"name": "x"} | row])
    with pytest.raises(ConfigError) as error:
        opened(trained)
    assert message in str(error.value)


def test_weights_that_do_not_fit_stop_the_launch_before_any_job(trained, capsys):
    weights = load_file(trained / "student/transformer/diffusion_pytorch_model.safetensors")
    weights.pop("proj_out.bias")
    save_file(weights, trained / "broken.safetensors")
    write(trained, rows=[{"name": "x", "network": str(trained / "broken.safetensors")}])
    sweep = opened(trained)
    with pytest.raises(ConfigError) as error:
        check_sweep(sweep, 1)
    assert "rows: x: " in str(error.value)
    assert "e.g. proj_out.bias" in str(error.value)
    arguments = ["--protocol", str(write(trained)), "--store", str(trained / "runs")]
    assert cli(["score", str(trained / "broken.safetensors"), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "e.g. proj_out.bias" in line
