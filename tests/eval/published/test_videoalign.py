"""VideoAlign's rewards against its own code, on a tiny Qwen2-VL with random weights.

The rewards come from tests/references/videoalign_reference.py.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from random_networks import VIDEOALIGN, write_videoalign
from textures import textured_clips

from distill_bench.eval.videoalign import VideoAlign
from distill_bench.evaluate import video_reward
from distill_bench.evaluate.video_reward import frame_indices, frame_size, load_video_reward
from distill_bench.evaluator import Clips

REFERENCE = json.loads(
    (Path(__file__).parents[2] / "references" / "videoalign_reference.json").read_text()
)
PROMPTS = ["a red circle moving left", "a {braced} Bird, très vite"]
TOLERANCE, CAUGHT = 2e-5, 4e-4


def clips(**changed) -> Clips:
    return dataclasses.replace(
        Clips(textured_clips(2, 33, 250, 390, seed=0), PROMPTS, [0, 1], fps=12.0), **changed
    )


@pytest.mark.slow
def test_rewards_are_videoaligns_and_mistakes_are_caught(tmp_path, monkeypatch):
    settings = write_videoalign(tmp_path)
    evaluator, sample = VideoAlign(**settings), clips(cache=tmp_path / "cache")
    assert evaluator.reason_to_skip(sample) is None
    scores = {score.column: score for score in evaluator.scores(sample, {})}
    assert tuple(scores) == VideoAlign.columns
    expected = torch.tensor(REFERENCE["rewards"]).double()
    for index, kind in enumerate(("visual", "motion", "text")):
        score = scores[f"videoalign_{kind}"]
        assert score.per_clip == pytest.approx(expected[:, index].tolist(), abs=TOLERANCE)
        assert evaluator.extractors(sample) == {score.extractor}
    total = scores["videoalign_total"].per_clip
    assert total == pytest.approx(expected.sum(1).tolist(), abs=3 * TOLERANCE)

    net, _ = load_video_reward(folder=settings["weights"], base=settings["base"])
    frames = torch.from_numpy(sample.frames[0])

    def error(frames: torch.Tensor = frames, prompt: str = PROMPTS[0], fps: float = 12.0) -> float:
        with torch.no_grad():
            return (net(frames, prompt, fps) - expected[0]).abs().max().item()

    assert error() < TOLERANCE
    assert (
        min(error(x) for x in (frames.flip(1), frames.flip(0), frames[:-1], frames // 2)) > CAUGHT
    )
    assert error(fps=8.0) > CAUGHT
    assert error(prompt=PROMPTS[1]) > CAUGHT
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(video_reward.PROMPT.read_text().replace(":**  \n", ":**\n"))
    for name, wrong in (
        ("PROMPT", prompt),
        ("frame_indices", lambda count, fps, rate: torch.arange(6)),
        ("frame_size", lambda height, width, most: [280, 392]),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(video_reward, name, wrong)
            assert error() > CAUGHT, name
    with monkeypatch.context() as patch:  # Qwen2-VL's own positions in space and time
        text_model, forward = net.net.language_model, type(net.net.language_model).forward
        inputs = net.inputs(frames, PROMPTS[0], 12.0)
        positions = net.net.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"], None, inputs["video_grid_thw"]
        )[0]
        patch.setattr(
            type(text_model),
            "forward",
            lambda self, **given: forward(self, **given | {"position_ids": positions}),
        )
        assert error() > CAUGHT
    unscaled = dict(VIDEOALIGN, peft_lora_config=VIDEOALIGN["peft_lora_config"] | {"lora_alpha": 4})
    other = write_videoalign(tmp_path / "unscaled", unscaled)
    wrong, name = load_video_reward(other["weights"], other["base"])
    with torch.no_grad():
        assert (wrong(frames, PROMPTS[0], 12.0) - expected[0]).abs().max() > CAUGHT
    assert {name} != evaluator.extractors(sample)


def test_frames_are_even_in_number_and_sizes_are_multiples_of_28():
    """Wan's 81 frames at 16 per second: 10; a clip of 3 frames: 2."""
    assert frame_indices(81, 16.0, 2.0).tolist() == [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]
    assert frame_indices(17, 24.0, 2.0).tolist() == [0, 5, 11, 16]
    assert frame_indices(3, 24.0, 2.0).tolist() == [0, 2]
    assert frame_size(480, 832, 448 * 448) == [336, 588]
    assert frame_size(480, 480, 448 * 448) == [448, 448]
    assert frame_size(32, 32, 448 * 448) == [336, 336]


def test_other_models_and_missing_files_end_in_one_line(tmp_path):
    assert "DISTILL_BENCH_VIDEOALIGN" in VideoAlign(weights="", base="").reason_to_skip(clips())
    without = VideoAlign(weights="a", base="b").reason_to_skip(clips(prompts=["", "a bird"]))
    assert without.startswith("1 of 2 clips have no caption")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match=r"needs model_config.json and one checkpoint-\*/model.pth"
    ):
        load_video_reward(f"{tmp_path}/empty", "")
    other = dict(VIDEOALIGN, model_config=VIDEOALIGN["model_config"] | {"reward_token": "last"})
    settings = write_videoalign(tmp_path / "other", other)
    with pytest.raises(ValueError, match="reward_token is 'last'; only 'special' is known"):
        load_video_reward(settings["weights"], settings["base"])
    settings = write_videoalign(tmp_path / "foreign")
    torch.save(
        {"a": torch.zeros(2)}, tmp_path / "foreign" / "reward" / "checkpoint-7" / "model.pth"
    )
    with pytest.raises(ValueError, match="no VideoReward from "):
        load_video_reward(settings["weights"], settings["base"])
