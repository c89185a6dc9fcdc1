"""CLIP score: strengths and blind spots of the shipped models, cosines of open_clip, refusals."""

import dataclasses
import json
import types

import numpy as np
import pytest
import torch

from distill_bench.domain import controls, shapes
from distill_bench.eval.clip_score import BLIND, CLIPScore, clip_scores
from distill_bench.evaluate.clip_models import indomain_clip, open_clip_model
from distill_bench.evaluator import Clips
from distill_bench.pretrain import fit_encoders


def clips(count: int = 72, first: int = 0) -> Clips:
    frames, prompts = controls.rendered(count, first)
    return Clips(frames, prompts, list(range(first, first + count)))


def scores(sample: Clips, **settings) -> dict[str, object]:
    return {score.column: score for score in CLIPScore(**settings).scores(sample, {})}


def test_every_held_out_clip_retrieves_its_caption():
    held_out = scores(clips(108, fit_encoders.HELD_OUT_KEYS + 20_000))
    assert held_out["clip_r1"].value > 0.99 and held_out["clip_video_r1"].value > 0.99
    assert held_out["clip_score"].value > 90 and held_out["clip_video"].value > 90
    assert held_out["clip_score"].headline and not held_out["clip_video"].headline


def test_the_nearest_caption_is_sought_among_those_of_its_kind():
    """A clip of "a red circle" that moves left also fits "a red circle moving left"."""
    mixed = [shapes.all_attributes(kind)[i] for i in range(18) for kind in shapes.KINDS]
    keys = range(fit_encoders.HELD_OUT_KEYS + 30_000, fit_encoders.HELD_OUT_KEYS + 30_054)
    frames = np.stack([shapes.render(a, key) for a, key in zip(mixed, keys, strict=True)])
    rows = scores(Clips(frames, [shapes.caption(a) for a in mixed], list(keys)))
    assert rows["clip_r1"].value > 0.98 and rows["clip_video_r1"].value > 0.98


def test_the_frame_clip_is_blind_to_time_and_the_video_clip_is_not():
    """A reversed moving clip keeps its frame score and loses its caption for the video CLIP."""
    sample = clips()
    moving = np.array(["still" not in prompt for prompt in sample.prompts])
    reversed_frames = controls.backwards(sample.frames)
    forwards = scores(sample)
    backwards = scores(dataclasses.replace(sample, frames=reversed_frames))
    frame_scores = [row["clip_score"].per_clip for row in (forwards, backwards)]
    assert np.allclose(*frame_scores, atol=1e-3)
    assert np.array_equal(forwards["clip_r1"].per_clip, backwards["clip_r1"].per_clip)
    assert np.array(backwards["clip_video_r1"].per_clip)[moving].mean() < 0.05
    assert backwards["clip_video"].value < forwards["clip_video"].value - 10
    assert forwards["clip_score"].note == BLIND


def test_wrong_captions_score_near_chance_and_are_not_clamped():
    sample = clips()
    prompts = sample.prompts[37:] + sample.prompts[:37]
    wrong = scores(dataclasses.replace(sample, prompts=prompts))
    for column in ("clip_score", "clip_video"):
        assert min(wrong[column].per_clip) < -20 and wrong[column].value < 50
    assert wrong["clip_r1"].value < 0.1 and wrong["clip_video_r1"].value < 0.1


@pytest.mark.slow
def test_known_good_is_above_known_bad():
    sample = clips()
    noise = np.random.default_rng(0).integers(0, 256, sample.frames.shape, dtype=np.uint8)
    worse_and_worse = (sample.frames, controls.blurred(sample.frames), noise)
    rows = [scores(dataclasses.replace(sample, frames=frames)) for frames in worse_and_worse]
    for column in ("clip_score", "clip_r1", "clip_video", "clip_video_r1"):
        values = [row[column].value for row in rows]
        assert values == sorted(values, reverse=True), column


def tiny_open_clip(folder) -> str:
    """Save a random CLIP of open_clip to a folder; returns its spec."""
    import open_clip

    config = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 32,
            "layers": 1,
            "width": 32,
            "head_width": 16,
            "patch_size": 16,
        },
        "text_cfg": {
            "context_length": 8,
            "vocab_size": 49408,
            "width": 16,
            "heads": 2,
            "layers": 1,
        },
    }
    torch.manual_seed(0)
    model = open_clip.CLIP(**config)
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {}})
    )
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return f"local-dir:{folder}"


def test_a_local_open_clip_model_gives_its_own_cosines(tmp_path):
    """Expected: each frame through open_clip's preprocessing and towers."""
    import open_clip
    from PIL import Image

    spec = tiny_open_clip(tmp_path / "tiny")
    sample = clips(6)
    row = scores(sample, model=spec)
    assert set(row) == {"clip_score", "clip_r1"}
    assert row["clip_score"].extractor.startswith("open_clip-tiny#")
    model, _, preprocess = open_clip.create_model_and_transforms(spec)
    model.eval()
    with torch.no_grad():
        text = model.encode_text(open_clip.get_tokenizer(spec)(sample.prompts), normalize=True)
        for i, clip in enumerate(sample.frames):
            pictures = [preprocess(Image.fromarray(frame.transpose(1, 2, 0))) for frame in clip]
            image = model.encode_image(torch.stack(pictures), normalize=True)
            expected = 100 * (image @ text[i]).mean().item()
            assert row["clip_score"].per_clip[i] == pytest.approx(expected, abs=1e-3)


def test_the_cosine_agrees_with_torchmetrics():
    """torchmetrics' CLIPScore, with the shipped frame CLIP behind transformers' interface."""
    from torchmetrics.functional.multimodal import clip_score

    model, sample = indomain_clip(whole=False), clips(12)

    class Adapter(torch.nn.Module):
        config = types.SimpleNamespace()

        def get_image_features(self, pixel_values):
            return model.embed(pixel_values)

        def get_text_features(self, input_ids, attention_mask):
            return model.embed_text(input_ids)

    class Processor:
        def __call__(self, text=None, images=None, return_tensors="pt", padding=True):
            inputs = {}
            if images is not None:
                inputs["pixel_values"] = torch.stack(list(images))
            if text is not None:
                tokens = model.tokenize(text)
                inputs |= {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
            return inputs

    frames = list(torch.from_numpy(sample.frames[:, 0]))
    loaded = Adapter(), Processor()
    expected = clip_score(frames, sample.prompts, model_name_or_path=lambda: loaded).item()
    still = dataclasses.replace(sample, frames=np.repeat(sample.frames[:, :1], 8, 1))
    assert scores(still)["clip_score"].value == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("ViT-B-32", "weights are missing"),
        ("ViT-B-32:no_such_tag", "no CLIP at"),
        ("ViT-B-32:{folder}/none.pt", "no CLIP at"),
        ("local-dir:{folder}", "open_clip_config.json"),
        ("NoSuchModel:openai", "no CLIP at"),
    ],
)
def test_a_model_without_weights_is_refused(tmp_path, spec, reason):
    with pytest.raises(ValueError, match=reason):
        open_clip_model(spec.format(folder=tmp_path))


def test_captions_that_may_be_cut_carry_a_warning(tmp_path):
    spec = tiny_open_clip(tmp_path / "tiny")
    assert "fill the model's context" in scores(clips(4), model=spec)["clip_score"].warnings[0]
    assert scores(clips(4))["clip_score"].warnings == ()


ONE = "there is one caption: every clip's nearest is its own"


def test_a_recall_among_one_caption_says_nothing(tmp_path):
    sample = clips(4)
    two = dataclasses.replace(sample, prompts=["a red circle moving left", "a blue square"] * 2)
    assert scores(two)["clip_r1"].warnings == ()
    alike = dataclasses.replace(sample, prompts=[sample.prompts[0]] * 4)
    row = scores(alike)
    for column in ("clip", "clip_video"):
        assert row[f"{column}_r1"].warnings == (ONE,)
        assert row[f"{column}_r1"].value == 1
    assert row["clip_score"].warnings == ()
    cut, one = scores(alike, model=tiny_open_clip(tmp_path / "tiny"))["clip_r1"].warnings
    assert cut == "4 captions fill the model's context and may be cut" and one == ONE


def test_the_nearest_of_captions_that_are_all_far_counts():
    """Cosines below 0 are cosines, too, and a caption that is no rival is no nearer."""

    class Far(types.SimpleNamespace):
        whole, id = False, "far"

        def similarities(self, sample):
            cosines = [[-0.2, -0.4, -0.1], [-0.5, -0.3, -0.1], [-0.1, -0.2, -0.9]]
            return torch.tensor(cosines), torch.tensor([0, 1, 2])

        def rivals(self, prompts, own):
            return torch.tensor([[True, True, False]] * 2 + [[False, False, True]])

        def tokenize(self, prompts):
            return torch.zeros(len(prompts), 3)

    cosine, recall = clip_scores(Far(), clips(3))
    assert recall.per_clip == (1.0, 1.0, 1.0)
    assert cosine.per_clip == pytest.approx((-0.2, -0.3, -0.9))


def test_only_captions_that_reach_the_end_of_the_context_may_be_cut(tmp_path):
    """Eight tokens: begin, words of one token each, end."""
    spec, sample = tiny_open_clip(tmp_path / "tiny"), clips(4)
    for words, warned in ((5, ()), (6, ("1 captions fill the model's context and may be cut",))):
        prompts = ["a dog", "a cat", "a bird", " ".join(["dog"] * words)]
        row = scores(dataclasses.replace(sample, prompts=prompts), model=spec)
        assert row["clip_score"].warnings == warned
        assert row["clip_r1"].warnings == warned


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"prompts": ["", " ", "a", "b"]}, "2 of 4 clips have no caption"),
        ({"prompts": ["a cat"] * 4}, "moving shapes only"),
        ({"frames": clips(4).frames[:, :4]}, "DISTILL_BENCH_CLIP"),
    ],
)
def test_clips_that_the_shipped_models_do_not_know_are_skipped(changed, reason):
    assert reason in CLIPScore().reason_to_skip(dataclasses.replace(clips(4), **changed))
    assert CLIPScore().reason_to_skip(clips(4)) is None
