"""`distill-bench check`: a line per check, and an exit code; planted faults are found."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from clip_folders import write_sampled

from distill_bench.cli import main
from distill_bench.evaluator import Clips, Evaluator, Score, mean_score
from distill_bench.registry import evaluators
from distill_bench.testing.evaluator_checks import EVALUATOR_CHECKS, EvaluatorCase

# fault -> check that finds it, with a part of its reason
FAULTS = {
    "no version": ("check_declaration", "version is 0; it must be an integer from 1"),
    "not json": ("check_declaration", "TypeError: Object of type set is not JSON serializable"),
    "not finite": ("check_scores", "brightness is nan"),
    "wrong mean": ("check_scores", "the mean of its values per clip is"),
    "too few values": ("check_scores", "has 23 values per clip for 24 clips"),
    "same column": ("check_scores", "column 'brightness' is given twice"),
    "two words": ("check_scores", "column 'mean brightness' must be one word"),
    "random": ("check_repeatable", "when computed again; seed its draws"),
    "writes": ("check_input", "scoring changes the frames of the clips"),
    "order": ("check_order", "changes by"),
    "reference": ("check_references", "KeyError: 'teacher'; return no score"),
    "none": (None, ""),
}


@dataclass(frozen=True)
class Faulty(Evaluator):
    """Mean brightness, with one fault."""

    paper: ClassVar[str] = "none"
    version: ClassVar[int] = 1
    fault: str = "none"
    values: tuple[int, ...] = ()

    def scores(self, clips: Clips, references) -> list[Score]:
        values = clips.frames.mean((1, 2, 3, 4))
        if self.fault == "not finite":
            return [Score("brightness", float("nan"), "brightness")]
        if self.fault == "wrong mean":
            return [Score("brightness", 1.0, "brightness", per_clip=tuple(values))]
        if self.fault == "too few values":
            values = values[1:]
        if self.fault == "random":
            values = values + np.random.default_rng(np.random.randint(99)).normal()
        if self.fault == "writes":
            clips.frames[0, 0, 0, 0, 0] += 1
        if self.fault == "order":
            values = values * (1 + 0.01 * np.arange(len(values)))
        if self.fault == "reference":
            values = values / references["teacher"].frames.mean()
        column = "mean brightness" if self.fault == "two words" else "brightness"
        return [mean_score(column, values, "brightness")] * (1 + (self.fault == "same column"))


class NoVersion(Faulty):
    """Declares version 0."""

    version: ClassVar[int] = 0


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> dict:
    """Rendered clips and references, as `EvaluatorCase.make` renders them for each evaluator."""
    folder = tmp_path_factory.mktemp("evaluator")
    case = EvaluatorCase.make(f"{__file__}:Faulty", folder)
    return {"clips": case.folder, "references": case.references}


def failures(case: EvaluatorCase) -> dict[str, str]:
    """Reason by failed check."""
    reasons = {}
    for check in EVALUATOR_CHECKS:
        try:
            check(case)
        except AssertionError as error:
            reasons[check.__name__] = str(error)
    return reasons


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_by_its_check(fault, rendered):
    name = f"{__file__}:{'NoVersion' if fault == 'no version' else 'Faulty'}"
    case = EvaluatorCase.make(name, Path(), {"fault": fault}, **rendered)
    if fault == "not json":
        object.__setattr__(case.evaluator, "values", {1})
    reasons = failures(case)
    check, reason = FAULTS[fault]
    if check is None:
        assert reasons == {}
    else:
        assert reason in reasons[check]


@pytest.mark.slow
def test_the_built_in_evaluators_conform(rendered):
    for name, evaluator in evaluators().items():
        # those that score where they are named need weights or results that are not shipped
        if not evaluator.needs_facts and not evaluator.only_if_named:
            settings = {"resamples": 2} if name == "fvd" else {}  # of a bootstrap
            assert failures(EvaluatorCase.make(name, Path(), settings, **rendered)) == {}


def test_the_report_names_each_check_and_the_reason_of_a_failure(capsys):
    plugin = f"{__file__}:Faulty"
    assert main(["check", plugin, "--set", "fault=order"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"evaluator {plugin}: 7 checks"
    results = {line.split()[1]: line.split()[0] for line in lines[1:-1] if " s  " in line}
    assert len(results) == 7
    assert [name for name, result in results.items() if result == "FAILED"] == ["check_order"]
    (reason,) = [after for line, after in pairwise(lines) if "FAILED" in line]
    assert reason.strip().startswith("brightness of a clip changes by")
    assert lines[-1] == "1 of 7 checks failed"


def test_clips_of_the_author_are_scored_instead(tmp_path, capsys):
    write_sampled(tmp_path / "clips")
    own = ["--clips", str(tmp_path / "clips")]
    assert main(["check", f"{__file__}:Faulty", *own, "--set", "fault=too few values"]) == 1
    assert "has 11 values per clip for 12 clips" in capsys.readouterr().out
    write_sampled(tmp_path / "teacher", first=100)
    reference = ["--reference", str(tmp_path / "teacher")]
    assert main(["check", f"{__file__}:Faulty", *own, *reference]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sgdm"], "no method or evaluator called 'sgdm' (did you mean 'sgmd'?); known: "),
        (["nowhere.py:Mine"], "no plugin file nowhere.py"),
        (["pathlib:Path"], "'pathlib:Path' is a subclass of neither Method nor Evaluator"),
        (["sgmd", "--set", "weight=3"], "SGMD has no such field"),
        (["sgmd", "--clips", "clips"], "--clips and --reference are for evaluators"),
        (["fvd", "--set", "weight=3"], "fvd has no setting 'weight'"),
        (["fvd", "--reference", "clips"], "--reference needs --clips"),
        (["fvd", "--clips", "nowhere"], "no folder nowhere"),
        (["mixture_truth"], "they come without basis, "),
    ],
)
def test_checks_that_cannot_start_end_in_one_line(arguments, message, capsys):
    assert main(["check", *arguments]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    assert message in error


def test_the_module_has_a_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["check", "--help"])
    assert stopped.value.code == 0
    assert "distill-bench check my_method.py:MyMethod" in capsys.readouterr().out


@pytest.mark.slow
def test_a_method_is_trained_and_a_fault_of_its_loss_is_found(capsys):
    place = f"{Path(__file__).with_name('test_conformance.py')}:Broken"
    assert main(["check", place, "--set", "fault=cut", "--no-ranks"]) == 1
    out = capsys.readouterr().out
    assert "FAILED  check_losses" in out
    assert "no term has a gradient at Loss.x0" in out
