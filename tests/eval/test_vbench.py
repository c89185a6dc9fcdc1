"""VBench's scores from its result files, against the arithmetic of its published script."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from distill_bench.cli import main
from distill_bench.eval.vbench import QUALITY, SEMANTIC, VBench, aggregate, read_results
from distill_bench.evaluator import Clips
from distill_bench.registry import evaluators, usual_evaluators

PROMPTS = ["a person swimming in ocean", "a bird"]

# raw scores made up, and the totals worked out from VBench@7975661, scripts/constant.py:
# (raw - min) / (max - min), weight 0.5 for the dynamic degree, quality 4 : semantic 1
RAW = {
    "subject_consistency": 0.9,
    "background_consistency": 0.95,
    "temporal_flickering": 0.99,
    "motion_smoothness": 0.98,
    "aesthetic_quality": 0.6,
    "imaging_quality": 0.65,
    "dynamic_degree": 0.7,
    "object_class": 0.8,
    "multiple_objects": 0.5,
    "human_action": 0.9,
    "color": 0.85,
    "spatial_relationship": 0.6,
    "scene": 0.4,
    "appearance_style": 0.2,
    "temporal_style": 0.25,
    "overall_consistency": 0.27,
}
QUALITY_PARTS = [
    (0.9 - 0.1462) / 0.8538,
    (0.95 - 0.2615) / 0.7385,
    (0.99 - 0.6293) / 0.3707,
    (0.98 - 0.706) / 0.2915,
    0.6,
    0.65,
    0.5 * 0.7,
]
SEMANTIC_PARTS = [
    *(0.8, 0.5, 0.9, 0.85, 0.6),
    0.4 / 0.8222,
    (0.2 - 0.0009) / 0.2846,
    0.25 / 0.364,
    0.27 / 0.364,
]


def write(folder: Path, raw=None, prompts=PROMPTS) -> Path:
    """Write one result file per dimension, as `vbench evaluate --dimension` does."""
    folder.mkdir(exist_ok=True)
    clips = [
        {"video_path": f"videos/{prompt}-{i}.mp4", "video_results": 0.5}
        for prompt in prompts
        for i in range(5)
    ]
    for name, value in (RAW if raw is None else raw).items():
        text = json.dumps({name: [value, clips]})
        (folder / f"results_{name}_eval_results.json").write_text(text)
    return folder


def clips(prompts=PROMPTS) -> Clips:
    names = [prompt for prompt in prompts for _ in range(5)]
    return Clips(np.full((len(names), 2, 3, 4, 4), 99, np.uint8), names, list(range(len(names))))


def scores(folder: Path, **settings) -> dict[str, float]:
    return {s.column: s.value for s in VBench(str(folder), **settings).scores(clips(), {})}


def test_quality_semantic_and_total_are_those_of_the_published_constants(tmp_path):
    found = scores(write(tmp_path / "results"))
    quality, semantic = sum(QUALITY_PARTS) / 6.5, sum(SEMANTIC_PARTS) / 9
    assert found["vbench_quality"] == pytest.approx(100 * quality, rel=1e-12)
    assert found["vbench_semantic"] == pytest.approx(100 * semantic, rel=1e-12)
    assert found["vbench_total"] == pytest.approx(100 * (4 * quality + semantic) / 5, rel=1e-12)
    assert found["vbench_dynamic_degree"] == pytest.approx(70)
    assert len(found) == 19


def test_the_best_raw_scores_are_one_and_the_lowest_zero():
    for ranges in (QUALITY, SEMANTIC):
        assert aggregate({k: v[1] for k, v in ranges.items()}, ranges) == pytest.approx(1)
        assert aggregate({k: v[0] for k, v in ranges.items()}, ranges) == 0


def test_every_column_has_its_title_in_per_cent_and_only_the_total_is_a_headline(tmp_path):
    found = {s.column: s for s in VBench(str(write(tmp_path / "results"))).scores(clips(), {})}
    titles = {"vbench_total": "VBench total", "vbench_quality": "VBench quality"}
    titles |= {"vbench_semantic": "VBench semantic"}
    titles |= {f"vbench_{name}": " ".join(["VBench", *name.split("_")]) for name in RAW}
    assert {column: score.title for column, score in found.items()} == titles
    assert {(score.unit, score.better) for score in found.values()} == {("%", "higher")}
    assert [column for column, score in found.items() if score.headline is True] == ["vbench_total"]
    assert {score.headline for score in found.values()} == {True, False}
    assert {score.warnings for score in found.values()} == {()}


def test_an_absent_dimension_leaves_out_what_needs_it(tmp_path):
    left = {k: v for k, v in RAW.items() if k not in ("scene", "human_action")}
    found = {
        s.column: s for s in VBench(str(write(tmp_path / "results", left))).scores(clips(), {})
    }
    assert "vbench_quality" in found
    assert not {"vbench_semantic", "vbench_total", "vbench_scene"} & found.keys()
    for name in left:
        assert found[f"vbench_{name}"].warnings == ("no results of human_action, scene",)


def suite(folder: Path, prompts=PROMPTS) -> str:
    """The package and prompt list that all scores of some results name."""
    evaluator = VBench(str(write(folder, prompts=prompts)), "0.1.5")
    (name,) = {str(score.extractor) for score in evaluator.scores(clips([""]), {})}
    return name


def test_scores_name_the_package_and_the_prompt_list(tmp_path):
    first = suite(tmp_path / "a")
    assert re.fullmatch("vbench 0.1.5, 2 prompts [0-9a-f]{8}", first)
    assert suite(tmp_path / "b", PROMPTS[::-1]) == first
    assert suite(tmp_path / "c", [PROMPTS[0], "a bird flying"]) != first
    assert suite(tmp_path / "d", PROMPTS[:1]).startswith("vbench 0.1.5, 1 prompts ")
    assert suite(tmp_path / "e", ["a b", "c"]) != suite(tmp_path / "f", ["a", "b c"])


def test_prompts_are_those_of_all_files(tmp_path):
    """Each dimension of VBench has prompts of its own."""
    folder = write(tmp_path / "results", {"color": 1.0}, PROMPTS[:1])
    write(folder, {"scene": 0.0}, PROMPTS[1:])
    raw, prompts = read_results(folder)
    assert raw == {"color": 1.0, "scene": 0.0}
    assert prompts == set(PROMPTS)
    file = folder / "results_color_eval_results.json"
    assert read_results(file) == ({"color": 1.0}, {PROMPTS[0]})


def test_clips_without_captions_are_not_held_against_the_prompts(tmp_path):
    """Results of other prompts are refused only where every clip has a caption."""
    evaluator = VBench(str(write(tmp_path / "results")))
    for captions in ([""], ["", "another prompt"]):
        assert len(evaluator.scores(clips(captions), {})) == 19


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is no result file of VBench"),
        ("{", "is no result file of VBench"),
        ('{"scene": 0.4}', "is no result file of VBench"),
        ('{"scene": [0.4, [{"video_path": "clip.mp4"}]]}', "not named {prompt}-{number}"),
        ('{"beauty": [0.4, []]}', "no dimension 'beauty'; known: subject_consistency, "),
        ('{"scene": [NaN, []]}', "scene is nan; raw scores are in [0, 1]"),
        ('{"imaging_quality": [65.0, []]}', "imaging_quality is 65.0; raw scores are in [0, 1]"),
        ('{"scene": [1.01, []]}', "scene is 1.01; raw scores are in [0, 1]"),
        ('{"scene": [0.5, []]}', "a second, other result of scene"),
    ],
)
def test_other_files_are_an_error_of_one_line(text, message, tmp_path):
    folder = write(tmp_path / "results", {"scene": 0.4} if "second" in message else {})
    (folder / "zz_eval_results.json").write_text(text)
    with pytest.raises(ValueError) as error:
        VBench(str(folder)).reason_to_skip(clips())
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_results_of_other_prompts_and_absent_results_are_refused(tmp_path):
    with pytest.raises(ValueError, match="scores clips of 1 prompts that these clips lack"):
        VBench(str(write(tmp_path / "results"))).scores(clips(PROMPTS[:1]), {})
    with pytest.raises(ValueError, match="no file \\*_eval_results.json"):
        VBench(str(tmp_path / "nowhere")).reason_to_skip(clips())


def test_without_results_one_line_says_how_to_get_them(tmp_path, capsys):
    np.save(tmp_path / "clips.npy", clips().frames)
    lines = [{"index": i, "prompt": p, "seed": i} for i, p in enumerate(clips().prompts)]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(SystemExit):
        main(["evaluate", str(tmp_path), "--evaluators", "vbench"])
    error = capsys.readouterr().err
    for words in (
        "it reads result files of VBench, which belong to one folder of clips: write it by ",
        "by `distill-bench sample RUN --vbench FOLDER`, score it in an environment of its own ",
        "own (`pip install vbench`, `vbench evaluate --videos_path FOLDER --dimension NAME`), and ",
        "and read the results by `distill-bench evaluate FOLDER --set vbench.results=RESULTS`\n",
    ):
        assert words in error
    assert error.count("\n") == 1
    results = f"vbench.results={write(tmp_path / 'results')}"
    assert main(["evaluate", str(tmp_path), "--evaluators", "vbench", "--set", results]) == 0
    total = r"vbench_total\s+([\d.]+)"
    first = re.search(total, capsys.readouterr().out)
    write(tmp_path / "results", RAW | {"scene": 0.8222})
    assert main(["evaluate", str(tmp_path), "--evaluators", "vbench", "--set", results]) == 0
    again = re.search(total, capsys.readouterr().out)
    assert float(again[1]) > float(first[1]), "changed results are read again"
    assert re.fullmatch("[0-9a-f]{12}", VBench(str(tmp_path / "results")).results_digest)


def test_it_scores_only_where_it_is_named():
    named = {"cd_fvd", "dino_similarity", "jedi", "vbench", "videoalign"}
    assert set(evaluators()) - set(usual_evaluators()) == named
