"""Wrong arguments of `distill-bench evaluate`: one line that names the fault, and no score."""

import pytest
from clip_folders import rendered, write_sampled

from distill_bench.evaluate.__main__ import main
from distill_bench.store.files import read_jsonl

FAILING_EXTRACTOR = """
from distill_bench.evaluate.extractors import Extractor

def make():
    return Extractor("failing", 1, "0" * 64, 2, lambda frames: 1 / 0, "none")
"""

# arguments after the folder; {b} is a folder of reference clips with some files -> error
FAULTS = {
    "--evaluators fvdd": "no evaluator called 'fvdd' (did you mean 'fvd'?)",
    # all names are checked before anything is scored
    "--evaluators motion,clip_scoree": "no evaluator called 'clip_scoree'",
    "--evaluators ,": "--evaluators ',' names no evaluator; known: attributes,",
    "--evaluators fvd": "fvd needs a reference (--reference FOLDER)",
    "--reference teachers={b}": "no kind 'teachers'; known: teacher, teacher_other, data,",
    "--reference {b} --reference teacher={b}": "--reference gives teacher twice",
    "--reference {b}/none --evaluators fvd": "no folder",
    "--reference {b}/no=ne": "b/no=ne",
    "--reference {b}/large --evaluators clip_score,motion": (
        "the teacher reference has 8 frames of 64x64"
    ),
    "--evaluators motion --out {b}/clips.npy/m.jsonl": "cannot write",
    "--set resamples=4": "--set takes EVALUATOR.FIELD=VALUE",
    "--set fvd.paper=3": "fvd has no setting 'paper'",
    "--set motion.rafts=1 --evaluators motion": "motion has no setting 'rafts'; it has: raft",
    "--set fvd.resamples=2 --evaluators motion": "'fvd' is not among the evaluators: motion",
    "--set fvd.resamples=many --evaluators fvd": "fvd.resamples = 'many'",
    "--set fvd.resamples={{ --evaluators fvd": "'{' is not a YAML value",
    "--set fvd.resamples=1 --evaluators fvd": (
        "fvd.resamples = 1: Input should be greater than or equal to 2"
    ),
    "--set fvd.extractor=random-r2p1:/none --reference {b} --evaluators fvd": (
        "has no weights to read"
    ),
    "--set fvd.extractor=i3d-k400-logits-400:/none.pt --evaluators fvd": ("no weights at /none.pt"),
    "--set fvd.extractor={b}/own.py:make --evaluators fvd --reference {b}": (
        "failing fails on these clips: ZeroDivisionError"
    ),
    "--set motion.raft=/none.pth --evaluators motion": "no weights at /none.pth",
    "--set motion.raft={b}/clips.npy --evaluators motion": "clips.npy holds no weights",
    "--set clip_score.model=ViT-B-32 --evaluators clip_score": "weights are missing",
    "--set clip_score.model=ViT-B-32:none --evaluators clip_score": (
        "'none' is not a known tag or valid file path"
    ),
    "--set clip_score.model=ViT-B-32:{b}/clips.npy --evaluators clip_score": "no CLIP at",
    "--set clip_score.model=ViT-B-32:{b}/empty.pt --evaluators clip_score": "no CLIP at",
}


@pytest.mark.parametrize("arguments", FAULTS)
def test_a_bad_command_ends_in_one_line_and_no_score(tmp_path, capsys, arguments):
    folder = write_sampled(tmp_path / "a")
    reference = write_sampled(tmp_path / "b", first=100)
    large = rendered(12, 100)[0].repeat(2, 3).repeat(2, 4)
    write_sampled(reference / "large", frames=large)
    (reference / "empty.pt").touch()
    (reference / "own.py").write_text(FAILING_EXTRACTOR)
    with pytest.raises(SystemExit) as stopped:
        main([str(folder), *arguments.format(b=reference).split()])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1, error
    assert FAULTS[arguments] in error
    assert read_jsonl(folder / "metrics.jsonl") == []
