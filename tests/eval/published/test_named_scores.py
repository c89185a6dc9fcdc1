"""Scores of evaluators that need weights, from a small network in place of the published one.

The published networks are held against the originals by test_published_networks.py.
"""

import dataclasses

import numpy as np
import pytest
import torch
from clip_folders import rendered_pairs
from torch import Tensor, tensor

from distill_bench.eval.cd_fvd import CDFVD
from distill_bench.eval.dino_similarity import DINOSimilarity
from distill_bench.eval.fvd import FVD
from distill_bench.eval.jedi import BIASED, JEDi, distances
from distill_bench.eval.videoalign import SOURCE, VideoAlign
from distill_bench.evaluate.comparison import compare, frechet_scores
from distill_bench.evaluate.extractors import Extractor


def colours(frames: Tensor) -> Tensor:
    """Mean of each colour, and the brightness of the upper left corner, (N, 4)."""
    values = frames.float()
    corner = values[..., :8, :8].mean((1, 2, 3, 4))
    return torch.cat([values.mean((1, 3, 4)), corner[:, None]], dim=1)


SMALL = Extractor(
    "small", 1, "1" * 64, 4, colours, "none", min_frames=16, size=(32, 32), frames_matter=True
)


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """Names of the extractors that were asked for; each is the small one."""
    names: list[str] = []

    def load(name: str) -> Extractor:
        names.append(name)
        return SMALL

    for module in ("cd_fvd", "dino_similarity", "jedi"):
        monkeypatch.setattr(f"distill_bench.eval.{module}.load_extractor", load)
    return names


CLIPS = rendered_pairs(0, 12)
REFERENCES = {"teacher": rendered_pairs(100, 12), "teacher_other": rendered_pairs(200, 12)}
REFERENCES |= {"data": rendered_pairs(300, 12), "data_other": rendered_pairs(400, 12)}


@pytest.mark.parametrize(
    ("evaluator", "name"),
    [
        (CDFVD("W"), "videomae-v2-ssv2:W"),
        (JEDi("W"), "vjepa-ssv2:W"),
        (DINOSimilarity("W"), "dinov3:W"),
    ],
)
def test_clips_that_the_network_cannot_take_are_refused_and_its_name_is_known(
    evaluator, name, asked
):
    assert evaluator.reason_to_skip(CLIPS) is None
    short = dataclasses.replace(CLIPS, frames=CLIPS.frames[:, :8])
    assert evaluator.reason_to_skip(short) == "small takes 16 or more frames; the clips have 8"
    assert evaluator.extractors(CLIPS) == {"small@T16#11111111"}
    assert set(asked) == {name}


def test_frechet_distances_and_jedi_are_resampled_alike_by_default():
    """Their intervals are then of one precision."""
    assert CDFVD.resamples == FVD.resamples == JEDi.resamples


def test_cd_fvd_is_the_frechet_scores_of_its_network(asked):
    scores = CDFVD("W", resamples=7).scores(CLIPS, REFERENCES)
    assert scores == frechet_scores(SMALL, CLIPS, REFERENCES, 7, "cd_fvd", "cd_kvd")
    assert {score.column for score in scores} == set(CDFVD.columns)
    assert asked == ["videomae-v2-ssv2:W"]


def test_jedi_is_its_distances_to_both_references(asked):
    scores = JEDi("W", resamples=7).scores(CLIPS, REFERENCES)
    pairs = compare(SMALL, CLIPS, REFERENCES)
    assert scores == [score for pair in pairs for score in distances(pair, 7)]
    ends = {"": "to the teacher's clips", "_data": "to data"}
    assert {score.column: (score.title, score.note) for score in scores} == {
        f"{column}{kind}": (f"{title}, {end}", note)
        for kind, end in ends.items()
        for column, title, note in (("jedi", "JEDi", None), ("jedi_biased", "JEDi, biased", BIASED))
    }


def test_dino_similarity_is_the_mean_over_prompts_of_the_cosine_of_their_clips(asked):
    (score,) = DINOSimilarity("W").scores(CLIPS, {})
    features = colours(tensor(CLIPS.frames)).double().numpy()
    cosines = []
    for a, b in features.reshape(6, 2, 4):
        cosines.append(a @ b / (a @ a * (b @ b)) ** 0.5)
    assert score.value == pytest.approx(np.mean(cosines), rel=1e-6)
    # the standard error of the mean over prompts
    assert score.sd == pytest.approx(np.std(cosines) / 6**0.5, rel=1e-4)
    assert DINOSimilarity.columns == ("dino_similarity",)
    assert score.column == "dino_similarity" and score.extractor == "small@T16#11111111"
    assert score.title == "cosine of a prompt's clips, DINOv3"
    assert score.note == "noise lowers it too"
    assert (score.better, score.headline) == ("lower", True)
    assert score.warnings == ("only 6 prompts have more than one clip",)
    one_each = dataclasses.replace(CLIPS, prompts=[str(i) for i in range(12)])
    assert DINOSimilarity("W").reason_to_skip(one_each) == (
        "no prompt has two clips to compare; see protocol.clips_per_prompt"
    )


def rewards(frames: Tensor, prompt: str, fps: float) -> Tensor:
    """Three numbers of one clip that tell frames, prompt and rate apart."""
    return tensor([frames.float().mean(), len(prompt) / 7, fps + frames[0].float().std()])


def test_videoalign_has_a_column_per_reward_and_their_sum(monkeypatch):
    def load(folder: str, base: str):
        if (folder, base) != ("W", "B"):
            raise ValueError(f"no VideoReward from {folder} and {base}")
        return rewards, "videoreward#1"

    monkeypatch.setattr("distill_bench.eval.videoalign.load_video_reward", load)
    evaluator = VideoAlign("W", "B")
    scores = {score.column: score for score in evaluator.scores(CLIPS, {})}
    columns = ("videoalign_visual", "videoalign_motion", "videoalign_text", "videoalign_total")
    assert tuple(scores) == VideoAlign.columns == columns
    pairs = zip(CLIPS.frames, CLIPS.prompts, strict=True)
    values = np.array([rewards(tensor(frames), prompt, 8.0) for frames, prompt in pairs])
    values = np.column_stack([values, values.astype(np.float64).sum(1)])
    for score, expected in zip(scores.values(), values.T, strict=True):
        assert score.per_clip == pytest.approx(expected.tolist(), rel=1e-6)
        assert score.value == pytest.approx(expected.mean(), rel=1e-6)
        assert (score.better, score.extractor) == ("higher", "videoreward#1")
    assert [score.title for score in scores.values()] == [
        "VideoAlign visual quality",
        "VideoAlign motion quality",
        "VideoAlign text alignment",
        "VideoAlign, sum",
    ]
    headlines = [column for column, score in scores.items() if score.headline is True]
    assert headlines == ["videoalign_visual", "videoalign_motion"]
    assert evaluator.extractors(CLIPS) == {"videoreward#1"}


def test_videoalign_needs_both_folders_captions_and_weights_that_load(monkeypatch):
    for one_lacks in (VideoAlign("W", ""), VideoAlign("", "B")):
        assert one_lacks.reason_to_skip(CLIPS) == SOURCE
    nameless = dataclasses.replace(CLIPS, prompts=[""] * 12)
    assert "12 of 12 clips have no caption" in VideoAlign("W", "B").reason_to_skip(nameless)
    with pytest.raises(ValueError, match="W is no folder of VideoReward"):
        VideoAlign("W", "B").reason_to_skip(CLIPS)
    loaded = []
    monkeypatch.setattr(
        "distill_bench.eval.videoalign.load_video_reward", lambda *folders: loaded.append(folders)
    )
    assert VideoAlign("W", "B").reason_to_skip(CLIPS) is None
    assert loaded == [("W", "B")]
