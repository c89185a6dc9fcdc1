"""Evaluators that need weights score where they are named, and put good clips before bad ones."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_folders import rendered_pairs, write_sampled
from random_networks import write_dinov3, write_video_transformers

from distill_bench.cli import main
from distill_bench.eval.cd_fvd import CDFVD
from distill_bench.eval.dino_similarity import DINOSimilarity, same_prompt_similarity
from distill_bench.eval.jedi import JEDi, distances
from distill_bench.evaluate.comparison import compare
from distill_bench.evaluate.distances import (
    biased_kernel_distance,
    kernel_distance,
    kernel_sd,
    quadratic_kernel,
)
from distill_bench.evaluate.extractors import load_extractor
from distill_bench.evaluator import Clips
from distill_bench.registry import usual_evaluators

REFERENCE = json.loads(
    (Path(__file__).parents[2] / "references" / "jedi_reference.json").read_text()
)
NAMES = {
    "cd_fvd": "DISTILL_BENCH_CD_FVD",
    "jedi": "DISTILL_BENCH_VJEPA",
    "dino_similarity": "DISTILL_BENCH_DINOV3",
    "videoalign": "DISTILL_BENCH_VIDEOALIGN",
}


@pytest.mark.parametrize("name", NAMES)
def test_without_weights_a_named_evaluator_says_where_to_get_them(name, tmp_path, capsys):
    assert name not in usual_evaluators()
    folder = write_sampled(tmp_path / "clips")
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", str(folder), "--evaluators", name])
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1
    assert f" {NAMES[name]} " in error and "http" in error.replace("huggingface.co", "http")


def corrupted(clips: Clips) -> Clips:
    """Half of every pixel is noise."""
    noise = np.random.default_rng(0).integers(0, 256, clips.frames.shape)
    return dataclasses.replace(clips, frames=((clips.frames + noise) // 2).astype(np.uint8))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cd_fvd", "jedi"])
def test_held_out_clips_are_nearer_to_the_teachers_than_noisy_ones(name, tmp_path):
    file, folder = write_video_transformers(tmp_path)
    evaluator = {
        "cd_fvd": CDFVD(weights=file, resamples=2),
        "jedi": JEDi(weights=folder, resamples=2),
    }[name]
    references = {"teacher": rendered_pairs(100, 4), "teacher_other": rendered_pairs(200, 4)}
    clips = rendered_pairs(0, 4)
    good = {s.column: s for s in evaluator.scores(clips, references)}
    bad = {s.column: s for s in evaluator.scores(corrupted(clips), references)}
    assert set(good) == {column for column in evaluator.columns if not column.endswith("_data")}
    for column in good:
        assert good[column].value < bad[column].value, column
    assert good[name].headline
    assert {s.extractor for s in good.values()} == evaluator.extractors(clips)
    if name == "cd_fvd":
        assert good["cd_fvd"].title == "CD-FVD, to the teacher's clips"
        assert good["cd_kvd"].title == "CD-KVD, to the teacher's clips"
        assert any("rank-deficient" in w for w in good["cd_fvd"].warnings)
    else:
        assert good["jedi"].warnings == ()
        short = dataclasses.replace(clips, frames=clips.frames[:, :8])
        reason = "vjepa-ssv2 takes 16 or more frames; the clips have 8"
        assert evaluator.reason_to_skip(short) == reason


def test_the_biased_distance_is_videojedis_and_the_other_is_0_on_average():
    draw = np.random.default_rng(1)
    x, y = draw.normal(size=(7, 5)), draw.normal(0.5, 1.2, size=(9, 5))
    biased = biased_kernel_distance(x, y, quadratic_kernel)
    assert 100 * biased == pytest.approx(REFERENCE["distance"], rel=1e-12)
    pairs = [draw.normal(1, 1, size=(2, 10, 5)) for _ in range(500)]
    estimates = [
        [kernel_distance(a, b, kernel=quadratic_kernel) for a, b in pairs],
        [biased_kernel_distance(a, b, quadratic_kernel) for a, b in pairs],
    ]
    means, errors = np.mean(estimates, 1), np.std(estimates, 1) / 500**0.5
    assert abs(means[0]) < 4 * errors[0]
    assert means[1] > 10 * errors[1]


def test_jedi_is_100_times_the_distance_of_pairs_by_its_kernel_in_both_estimates():
    """In the features of another network: weights of V-JEPA are not shipped."""
    extractor, clips, teacher = (
        load_extractor("random-r2p1"),
        rendered_pairs(0, 8),
        rendered_pairs(100, 8),
    )
    (pair,) = compare(extractor, clips, {"teacher": teacher})
    jedi, biased = distances(pair, 5)
    x, y = extractor(clips), extractor(teacher)
    assert jedi.value == pytest.approx(100 * kernel_distance(x, y, True, quadratic_kernel))
    assert jedi.sd == pytest.approx(100 * kernel_sd(x, y, True, 5, quadratic_kernel))
    assert biased.value == pytest.approx(100 * biased_kernel_distance(x, y, quadratic_kernel))
    assert jedi.headline and not biased.headline
    assert jedi.warnings == biased.warnings == ()
    nameless = dataclasses.replace(clips, prompts=[""] * len(clips.prompts))
    (pair,) = compare(extractor, nameless, {"data": teacher})
    jedi, biased = distances(pair, 5)
    assert (jedi.column, biased.column) == ("jedi_data", "jedi_biased_data")
    assert not jedi.headline
    assert jedi.value == pytest.approx(100 * kernel_distance(x, y, False, quadratic_kernel))
    assert jedi.sd == pytest.approx(100 * kernel_sd(x, y, False, 5, quadratic_kernel))
    assert [text.endswith("jedi and sd are unpaired") for text in jedi.warnings] == [True]


def test_similarity_is_the_mean_cosine_of_a_prompts_clips():
    """Clips at 0, 60 and 120 degrees, one prompt with one clip, and one of unknown prompt."""
    degrees = torch.tensor([0.0, 60.0, 120.0, 0.0, 0.0, 45.0]) * torch.pi / 180
    features = torch.stack([degrees.cos(), degrees.sin()], 1) * torch.arange(1, 7)[:, None]
    values = same_prompt_similarity(features, ["a", "a", "a", "b", "", ""])
    assert values == pytest.approx([(0.5 + 0.5 - 0.5) / 3], abs=1e-6)


@pytest.mark.slow
def test_clips_that_repeat_across_seeds_are_more_similar(tmp_path, monkeypatch):
    evaluator = DINOSimilarity(weights=str(write_dinov3(tmp_path)))
    clips = rendered_pairs(0, 8)
    (varied,) = evaluator.scores(clips, {})
    repeated = Clips(np.repeat(clips.frames[::2], 2, axis=0), clips.prompts, clips.seeds)
    (same,) = evaluator.scores(repeated, {})
    assert same.value == pytest.approx(1, abs=1e-6)
    assert varied.value < 0.99
    assert varied.warnings == ("only 4 prompts have more than one clip",)
    assert evaluator.extractors(clips) == {varied.extractor}
    one_each = Clips(clips.frames, [f"{i}" for i in range(8)], clips.seeds)
    assert evaluator.reason_to_skip(one_each).startswith("no prompt has two clips")
