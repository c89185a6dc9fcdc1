"""CLIP score: what the shipped models know and are blind to, open_clip's own cosines, and models that must not score."""

import dataclasses
import json
import types

import numpy as np
import pytest
import torch

from distill_bench.domain import controls
from distill_bench.eval.clip_score import BLIND, CLIPScore
from distill_bench.evaluate.clip_models import indomain_clip, open_clip_model
from distill_bench.evaluator import Clips
from distill_bench.pretrain import fit_encoders


def clips(count: int = 72, first: int = 0) -> Clips:
    frames, prompts = controls.rendered(count, first)
    return Clips(frames, prompts, list(range(first, first + count)))


def scores(some: Clips, **settings) -> dict[str, object]:
    return {score.column: score for score in CLIPScore(**settings).scores(some, {})}


def test_every_caption_is_retrieved_on_held_out_clips():
    found = scores(clips(108, fit_encoders.HELD_OUT_KEYS + 20_000))
    assert found["clip_r1"].value > 0.99 and found["clip_video_r1"].value > 0.99
    assert found["clip_score"].value > 90 and found["clip_video"].value > 90
    assert found["clip_score"].headline and not found["clip_video"].headline


def test_frames_are_blind_to_time_and_whole_clips_are_not():
    """Backwards a moving clip keeps its frame score to the last digits and loses its caption to the video CLIP."""
    some = clips()
    moving = np.array(["still" not in prompt for prompt in some.prompts])
    back = dataclasses.replace(some, frames=controls.backwards(some.frames))
    forth, back = scores(some), scores(back)
    assert np.allclose(forth["clip_score"].per_clip, back["clip_score"].per_clip, atol=1e-3)
    assert np.array_equal(forth["clip_r1"].per_clip, back["clip_r1"].per_clip)
    assert np.array(back["clip_video_r1"].per_clip)[moving].mean() < 0.05
    assert back["clip_video"].value < forth["clip_video"].value - 10
    assert forth["clip_score"].note == BLIND


def test_wrong_captions_score_near_chance_and_are_not_clamped():
    some = clips()
    found = scores(dataclasses.replace(some, prompts=some.prompts[37:] + some.prompts[:37]))
    for column in ("clip_score", "clip_video"):
        assert min(found[column].per_clip) < -20 and found[column].value < 50
    assert found["clip_r1"].value < 0.1 and found["clip_video_r1"].value < 0.1


@pytest.mark.slow
def test_known_good_is_above_known_bad():
    some = clips()
    noise = np.random.default_rng(0).integers(0, 256, some.frames.shape, dtype=np.uint8)
    rows = [
        scores(dataclasses.replace(some, frames=f))
        for f in (some.frames, controls.blurred(some.frames), noise)
    ]
    for column in ("clip_score", "clip_r1", "clip_video", "clip_video_r1"):
        values = [row[column].value for row in rows]
        assert values == sorted(values, reverse=True), column


def tiny_open_clip(folder) -> str:
    """A random CLIP of open_clip in a local folder."""
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


def test_a_local_open_clip_gives_its_own_cosines(tmp_path):
    """Frame by frame through open_clip's preprocessing and towers, by hand."""
    import open_clip
    from PIL import Image

    spec = tiny_open_clip(tmp_path / "tiny")
    some = clips(6)
    found = scores(some, model=spec)
    assert set(found) == {"clip_score", "clip_r1"} and found["clip_score"].extractor.startswith(
        "open_clip-tiny#"
    )
    model, _, preprocess = open_clip.create_model_and_transforms(spec)
    model.eval()
    with torch.no_grad():
        text = model.encode_text(open_clip.get_tokenizer(spec)(some.prompts), normalize=True)
        for i in range(6):
            images = torch.stack(
                [preprocess(Image.fromarray(f.transpose(1, 2, 0))) for f in some.frames[i]]
            )
            expected = 100 * (model.encode_image(images, normalize=True) @ text[i]).mean().item()
            assert found["clip_score"].per_clip[i] == pytest.approx(expected, abs=1e-3)


def test_the_cosine_is_that_of_torchmetrics():
    """torchmetrics' CLIPScore with the shipped frame CLIP behind transformers' interface, on frames of their own captions."""
    from torchmetrics.functional.multimodal import clip_score as reference

    model, some = indomain_clip(False), clips(12)

    class Adapter(torch.nn.Module):
        config = types.SimpleNamespace()

        def get_image_features(self, pixel_values):
            return model.embed(pixel_values)

        def get_text_features(self, input_ids, attention_mask):
            return model.embed_text(input_ids)

    class Processor:
        def __call__(self, text=None, images=None, return_tensors="pt", padding=True):
            found = {}
            if images is not None:
                found["pixel_values"] = torch.stack(list(images))
            if text is not None:
                tokens = model.tokenize(text)
                found |= {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
            return found

    frames = torch.from_numpy(some.frames[:, 0])
    theirs = reference(
        list(frames), some.prompts, model_name_or_path=lambda: (Adapter(), Processor())
    ).item()
    still = dataclasses.replace(some, frames=np.repeat(some.frames[:, :1], 8, 1))
    assert scores(still)["clip_score"].value == pytest.approx(theirs, abs=1e-3)


def test_a_random_model_never_scores(tmp_path):
    for spec, reason in (
        ("ViT-B-32", "weights are missing"),
        ("ViT-B-32:no_such_tag", "no CLIP at"),
        (f"ViT-B-32:{tmp_path}/none.pt", "no CLIP at"),
        (f"local-dir:{tmp_path}", "open_clip_config.json"),
        ("NoSuchModel:openai", "no CLIP at"),
    ):
        with pytest.raises(ValueError, match=reason):
            open_clip_model(spec)


def test_captions_that_may_be_cut_are_recorded(tmp_path):
    spec = tiny_open_clip(tmp_path / "tiny")
    found = scores(clips(4), model=spec)
    assert "fill the model's context" in found["clip_score"].warnings[0]
    assert scores(clips(4))["clip_score"].warnings == ()


def test_clips_without_captions_or_of_another_domain_are_skipped_with_a_reason():
    some = clips(4)
    assert "2 of 4 clips have no caption" in CLIPScore().reason_to_skip(
        dataclasses.replace(some, prompts=["", " ", "a", "b"])
    )
    assert "moving shapes only" in CLIPScore().reason_to_skip(
        dataclasses.replace(some, prompts=["a cat"] * 4)
    )
    short = dataclasses.replace(some, frames=some.frames[:, :4])
    assert "DISTILL_BENCH_CLIP" in CLIPScore().reason_to_skip(short)
    assert CLIPScore().reason_to_skip(some) is None
