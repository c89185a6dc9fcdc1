"""The command line: commands that only read, profiles, sweeps/README.md."""

import re
import shlex
from pathlib import Path

import pytest

from distill_bench.config.cluster import ClusterConfig
from distill_bench.config.errors import ConfigError
from distill_bench.config.reference import reference
from distill_bench.config.sweep_file import load_sweep
from distill_bench.store.failures import FAILURE_KINDS
from distill_bench.sweep.__main__ import main, make_parser
from distill_bench.sweep.slurm.queue import Queue
from distill_bench.sweep.status import ENDED, TO_LAUNCH, WAITING
from distill_bench.sweep.watch import reread_queue

ROOT = Path(__file__).parents[2]
README = (ROOT / "sweeps" / "README.md").read_text()


@pytest.fixture
def argv(sweep_file: Path, tmp_path: Path) -> list[str]:
    """Arguments of a local sweep of two runs."""
    store, out = tmp_path / "runs", tmp_path / "results"
    return [str(sweep_file), "--cluster=local", f"--store={store}", f"--out={out}"]


@pytest.mark.parametrize(
    ("more", "code"),
    [
        (["--dry-run"], 0),
        (["--status"], 3),
        (["--status", "--only", "seed == 0"], 3),
        (["--json"], 3),
        (["--explain", "s0"], 0),
        ([], 2),
    ],
)
def test_only_a_launch_needs_a_writable_store(more, code, sweep_file, capsys):
    argv = [str(sweep_file), "--cluster=local", "--store=/proc/nowhere", "--out=/proc/nowhere"]
    assert main([*argv, *more]) == code
    assert ("cannot write into /proc/nowhere" in capsys.readouterr().err) == (code == 2)


@pytest.mark.parametrize("option", ["--store=caf\udce9", "--only=prompts == '\udce9'"])
def test_arguments_that_no_file_could_record_are_refused(option, argv, tmp_path, capsys):
    """Bytes that an ASCII locale, or the encoding of another terminal, leaves undecoded."""
    assert main([*argv, option]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is not valid Unicode; if it has letters beyond the locale's, set PYTHONUTF8=1" in line
    assert not (tmp_path / "runs").exists()


def test_texts_are_utf_8_even_in_a_locale_without_their_letters(argv, capsys):
    """In the C locale without coercion, Python passes undecoded bytes."""
    texts = [
        "--set=negative_prompt=fl\udcc3\udcbcchtig",
        "--only=negative_prompt == 'fl\u00fcchtig'",
    ]
    assert main([*argv, "--status", *texts]) == 3
    options = make_parser().parse_args(["s.yaml", "--only=\udcc3\udca9", "--profile=\udcce\udcb1"])
    assert (options.only, options.profile) == ("\u00e9", "\u03b1")


def test_a_tilde_that_the_shell_left_in_an_option_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    options = make_parser().parse_args(["s.yaml", "--store=~/runs", "--out=~/results"])
    assert (str(options.store), str(options.out)) == ("/home/me/runs", "/home/me/results")


def test_watch_ends_when_nobody_works_on_a_local_sweep(argv, monkeypatch):
    monkeypatch.setattr("distill_bench.sweep.watch.QUIET_SECONDS", 0.1)
    assert main([*argv, "--watch=0.1"]) == 3


def test_the_queue_stays_the_last_known_while_slurm_does_not_answer(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    before = Queue({"7_0": "RUNNING"})
    assert reread_queue(before, tmp_path, on_slurm=True) is before
    assert "squeue does not answer" in capsys.readouterr().err


# --- profiles ---


@pytest.fixture
def write_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write clusters.yaml."""
    path = tmp_path / "clusters.yaml"
    monkeypatch.setenv("DISTILL_BENCH_CLUSTERS", str(path))
    return path.write_text


def test_profiles_move_a_sweep_between_clusters(sweep_file, write_profiles):
    write_profiles("default: {hours: 2}\nlab: {partition: low, gpus: 1, sbatch: {exclude: n1}}\n")
    assert load_sweep(sweep_file).cluster.hours == 2
    lab = load_sweep(sweep_file, {"cluster.profile": "lab", "cluster.cpus": 7}).cluster
    expected = ClusterConfig(partition="low", gpus=1, cpus=7, hours=1, sbatch={"exclude": "n1"})
    assert lab == expected
    with pytest.raises(ConfigError, match="'moon' is not in .*; known: default, lab"):
        load_sweep(sweep_file, {"cluster.profile": "moon"})
    with pytest.raises(ConfigError, match="runs_per_job 2 needs nodes 1"):
        load_sweep(sweep_file, {"cluster.runs_per_job": 2, "cluster.nodes": 2})


@pytest.mark.parametrize(
    ("profiles", "message"),
    [
        ("lab: main", "clusters.yaml: profile lab = 'main': a profile is a mapping of settings"),
        ("lab:", "clusters.yaml: profile lab = None: a profile is a mapping"),
        ("", "'lab' is not in .*clusters.yaml; known: none"),
        ("lab", "clusters.yaml: profiles are a mapping of names to settings; found str"),
        ("lab: {partitoin: low}", "clusters.yaml: profile lab: unknown key 'partitoin'"),
        ("lab: {gpus: many}", "clusters.yaml: profile lab: gpus = 'many'"),
    ],
)
def test_a_bad_profile_is_named_with_its_file(profiles, message, sweep_file, write_profiles):
    write_profiles(profiles)
    with pytest.raises(ConfigError, match=message):
        load_sweep(sweep_file, {"cluster.profile": "lab"})


def test_a_bad_default_profile_concerns_every_sweep(sweep_file, write_profiles):
    write_profiles("default: 3\nlab: {}")
    with pytest.raises(ConfigError, match="profile default = 3: a profile is a mapping"):
        load_sweep(sweep_file)


# --- sweeps/README.md ---


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def first_column(markdown: str) -> list[str]:
    """The code in the first column of a table."""
    return re.findall(r"^\| `([^`]+)`", markdown, re.MULTILINE)


def test_the_reference_has_every_option_state_and_kind():
    options = {name for action in make_parser()._actions for name in action.option_strings}
    documented = {option.split()[0] for option in first_column(section("Options"))}
    assert documented == options - {"-h", "--help"}
    assert set(first_column(section("States of a run"))) == {*ENDED, *TO_LAUNCH, *WAITING, "failed"}
    assert set(first_column(section("Kinds of failure"))) == set(FAILURE_KINDS)


def test_the_reference_has_every_sweep():
    sweeps = {path.name for path in (ROOT / "sweeps").glob("*.yaml")}
    assert set(first_column(README.split("\n## ")[0])) == sweeps


def test_the_table_of_cluster_settings_is_that_of_distill_bench_keys():
    after = README.split("<!-- distill-bench keys -->\n")[1]
    table = after.split("<!-- /distill-bench keys -->")[0]
    assert table.strip() in reference()
    assert first_column(table) == list(ClusterConfig.model_fields)


def test_every_command_of_the_reference_parses():
    commands = re.findall(
        r"^python -m distill_bench\.sweep (.*?)(?:\s+#.*)?$", README, re.MULTILINE
    )
    assert len(commands) > 5
    for command in commands:
        assert (ROOT / make_parser().parse_args(shlex.split(command)).file).is_file()
