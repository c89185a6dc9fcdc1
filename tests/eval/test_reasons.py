"""Reasons for which evaluators skip clips that they cannot score, and the extractors they state."""

import dataclasses

import numpy as np
import pytest

from distill_bench.domain import controls
from distill_bench.eval.attributes import AttributeAccuracy
from distill_bench.eval.clip_score import CLIPScore
from distill_bench.eval.exact_divergence import FACTS, ExactDivergence
from distill_bench.eval.fvd import FVD
from distill_bench.evaluate.extractors import load_extractor
from distill_bench.evaluator import Clips


def clips(height: int = 32, width: int = 32, frames: int = 8) -> Clips:
    _, prompts = controls.rendered(2, 0)
    return Clips(np.zeros((2, frames, 3, height, width), np.uint8), prompts, [0, 1])


@pytest.mark.parametrize("size", [(32, 64), (64, 32), (64, 64)])
def test_attributes_are_read_off_clips_of_the_shapes_size_alone(size):
    reason = "moving shapes are 32x32; the clips are {}x{}"
    assert AttributeAccuracy().reason_to_skip(clips(*size)) == reason.format(*size)
    assert AttributeAccuracy().reason_to_skip(clips()) is None


def test_attributes_need_captions_of_moving_shapes():
    prompts = [clips().prompts[0], "a panda plays the guitar"]
    reason = AttributeAccuracy().reason_to_skip(dataclasses.replace(clips(), prompts=prompts))
    assert "a panda plays the guitar" in reason


def test_divergences_need_all_moments_or_none():
    """None: the clips are no Gaussian student's, which the harness says by itself."""
    evaluator = ExactDivergence()
    assert evaluator.reason_to_skip(clips()) is None
    facts = {name: np.zeros(2) for name in FACTS}
    assert evaluator.reason_to_skip(dataclasses.replace(clips(), facts=facts)) is None
    del facts["covariance"], facts["target_mean"]
    reason = evaluator.reason_to_skip(dataclasses.replace(clips(), facts=facts))
    assert reason == "facts.npz beside the clips lacks covariance, target_mean"


def test_fvd_says_which_extractor_takes_other_clips():
    assert FVD().reason_to_skip(clips()) is None
    reason = FVD().reason_to_skip(clips(64, 64))
    assert reason == (
        "indomain-r2p1-cls takes frames of 32x32; the clips have 64x64; set "
        "DISTILL_BENCH_EXTRACTOR, e.g. to i3d-k400-logits-400:/path/i3d_torchscript.pt or "
        "random-r2p1"
    )
    assert FVD("random-r2p1").reason_to_skip(clips(64, 64)) is None


def test_fvd_states_both_extractors_with_the_frames_if_they_matter(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "from distill_bench.evaluate.extractors import Extractor\n"
        "def make():\n"
        "    features = lambda x: x.float().mean((1, 3, 4))\n"
        "    return Extractor('own', 1, '1' * 64, 3, features, 'none', frames_matter=True)\n"
    )
    second = load_extractor("random-r2p1").id_for(clips())
    assert FVD(f"{path}:make").extractors(clips(frames=6)) == {"own@T6#11111111", second}
    assert FVD("random-r2p1").extractors(clips()) == {second}


def test_a_clip_model_that_does_not_load_is_an_error_before_any_score():
    with pytest.raises(ValueError, match="no-such-model"):
        CLIPScore(model="no-such-model").reason_to_skip(clips())
