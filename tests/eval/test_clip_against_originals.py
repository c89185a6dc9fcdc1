"""CLIP score from uint8 clips to score, against transformers' CLIP and torchmetrics' CLIPScore.

A published CLIP exists as weights of OpenAI's code, which open_clip reads, and of transformers.
Random weights are converted; tokens, resizing, towers and score are each package's own.
"""

import json

import numpy as np
import pytest
import torch
from textures import textured_clips
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.functional import to_pil_image

from distill_bench.eval.clip_score import CLIPScore
from distill_bench.evaluate import clip_models
from distill_bench.evaluate.clip_models import embedded_frames, open_clip_model
from distill_bench.evaluator import Clips

TOLERANCE = 1e-3  # of a score in -100 to 100
CAUGHT = 20 * TOLERANCE  # the least error of a planted mistake
SIZE = 32
MODEL = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": SIZE,
        "layers": 2,
        "width": 32,
        "head_width": 16,
        "patch_size": 8,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 16,
        "heads": 2,
        "layers": 2,
    },
}
PROMPTS = ["A red Circle, moving left!", "two dogs;  don't run", "rain on a window", "naïve café"]


def tower(state: dict[str, Tensor], ours: str, original: str, layers: int) -> dict[str, Tensor]:
    """Weights of a transformer of open_clip under the names of transformers."""
    renamed = {}
    for i in range(layers):
        block, layer = f"{ours}transformer.resblocks.{i}.", f"{original}encoder.layers.{i}."
        for kind in ("weight", "bias"):
            thirds = state[f"{block}attn.in_proj_{kind}"].chunk(3)
            for part, third in zip("qkv", thirds, strict=True):
                renamed[f"{layer}self_attn.{part}_proj.{kind}"] = third
            for a, b in (
                ("attn.out_proj", "self_attn.out_proj"),
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):
                renamed[f"{layer}{b}.{kind}"] = state[f"{block}{a}.{kind}"]
    return renamed


def transformers_clip(model: nn.Module) -> tuple[nn.Module, object]:
    """CLIP of transformers with the weights of open_clip's, and its processor."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    shared = {"num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 16}
    config = CLIPConfig(
        vision_config={
            "image_size": SIZE,
            "patch_size": 8,
            "hidden_size": 32,
            "intermediate_size": 128,
            **shared,
        },
        text_config={"hidden_size": 16, "intermediate_size": 64, **shared},
        projection_dim=16,
    )
    state = {k: v.detach() for k, v in model.state_dict().items()}
    vision, text = "vision_model.", "text_model."
    renamed = {
        f"{vision}embeddings.class_embedding": state["visual.class_embedding"],
        f"{vision}embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        f"{vision}embeddings.position_embedding.weight": state["visual.positional_embedding"],
        f"{text}embeddings.token_embedding.weight": state["token_embedding.weight"],
        f"{text}embeddings.position_embedding.weight": state["positional_embedding"],
        "visual_projection.weight": state["visual.proj"].T.contiguous(),
        "text_projection.weight": state["text_projection"].T.contiguous(),
        "logit_scale": state["logit_scale"],
        **tower(state, "visual.", vision, 2),
        **tower(state, "", text, 2),
    }
    for kind in ("weight", "bias"):
        renamed[f"{vision}pre_layrnorm.{kind}"] = state[f"visual.ln_pre.{kind}"]
        renamed[f"{vision}post_layernorm.{kind}"] = state[f"visual.ln_post.{kind}"]
        renamed[f"{text}final_layer_norm.{kind}"] = state[f"ln_final.{kind}"]
    original = CLIPModel(config).eval()
    rest = original.load_state_dict(renamed, strict=False)
    assert not rest.unexpected_keys and all("position_ids" in key for key in rest.missing_keys)
    words = SimpleTokenizer()
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {special.get(word, word): index for word, index in words.encoder.items()}
    processor = CLIPProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE),
        CLIPTokenizer(vocab=vocabulary, merges=list(words.bpe_ranks)),
    )
    return original, processor


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random CLIP of open_clip. Its cosines are made positive, for torchmetrics."""
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    model = open_clip.CLIP(**MODEL)
    with torch.no_grad():
        model.visual.conv1.weight *= 4  # pixels outweigh positions
        model.token_embedding.weight *= 20
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": MODEL, "preprocess_cfg": {}})
    )
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return f"local-dir:{folder}"


def clips() -> Clips:
    """Clips whose shorter side is resized and whose longer side is cut."""
    return Clips(textured_clips(4, 3, 44, 70, seed=0), PROMPTS, [0, 1, 2, 3])


@pytest.fixture(scope="module")
def expected(spec: str) -> np.ndarray:
    """Scores of the clips by transformers: processor, towers and 100 times the cosine."""
    import open_clip

    original, processor = transformers_clip(open_clip.create_model(spec).eval())
    values = []
    for frames, prompt in zip(clips().frames, PROMPTS, strict=True):
        pictures = [to_pil_image(torch.from_numpy(frame)) for frame in frames]
        inputs = processor(text=[prompt], images=pictures, return_tensors="pt", padding=True)
        with torch.no_grad():
            output = original(**inputs)
        values.append(100 * (output.image_embeds @ output.text_embeds.T).mean().item())
    return np.array(values)


def ours(spec: str) -> np.ndarray:
    scores = CLIPScore(model=spec).scores(clips(), {})
    return np.array(scores[0].per_clip)


def test_the_score_is_that_of_transformers(spec, expected):
    np.testing.assert_allclose(ours(spec), expected, atol=TOLERANCE)
    assert expected.std() > 1, "clips are told apart"


@pytest.mark.parametrize("clip", range(4))
def test_the_score_is_that_of_torchmetrics(spec, expected, clip):
    """torchmetrics averages over pairs of image and text, and clamps the mean at 0."""
    import open_clip
    from torchmetrics.multimodal import CLIPScore as Original

    original, processor = transformers_clip(open_clip.create_model(spec).eval())

    class Embeddings(nn.Module):
        """transformers 5 returns an output object, which torchmetrics 1.9 does not read."""

        config = original.config

        def get_image_features(self, pixel_values: Tensor) -> Tensor:
            return original.get_image_features(pixel_values).pooler_output

        def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return original.get_text_features(input_ids, attention_mask).pooler_output

    metric = Original(model_name_or_path=lambda: (Embeddings(), processor))
    frames = list(torch.from_numpy(clips().frames[clip]))
    metric.update(frames, [PROMPTS[clip]] * len(frames))
    assert max(ours(spec)[clip], 0) == pytest.approx(metric.compute().item(), abs=TOLERANCE)


MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def prepared(
    interpolation: v2.InterpolationMode = v2.InterpolationMode.BICUBIC,
    squash: bool = False,
    crop: v2.Transform | None = None,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
    factor: float = 1.0,
) -> v2.Compose:
    """Preprocessing of CLIP with one mistake."""
    return v2.Compose(
        [
            v2.Resize((SIZE, SIZE) if squash else SIZE, interpolation),
            crop or v2.CenterCrop(SIZE),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Lambda(lambda x: factor * x),
            v2.Normalize(mean, std),
        ]
    )


def channels(order: list[int]) -> v2.Compose:
    right = prepared()
    return v2.Compose([v2.Lambda(lambda p: to_pil_image(np.asarray(p)[..., order])), right])


def without_antialiasing(picture) -> Tensor:
    x = v2.functional.pil_to_tensor(picture)
    x = v2.functional.resize(x, SIZE, v2.InterpolationMode.BICUBIC, antialias=False)
    x = v2.functional.center_crop(x, SIZE) / 255
    return v2.functional.normalize(x, MEAN, STD)


PREPROCESSING = {
    "none": prepared(),
    "bilinear": prepared(v2.InterpolationMode.BILINEAR),
    "nearest": prepared(v2.InterpolationMode.NEAREST),
    "no antialiasing": without_antialiasing,
    "squashed": prepared(squash=True),
    "cut from the left": prepared(crop=v2.Lambda(lambda p: p.crop((0, 0, SIZE, SIZE)))),
    "mean and sd of ImageNet": prepared(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    "range -1 to 1": prepared(mean=(0.5,) * 3, std=(0.5,) * 3),
    "not normalised": prepared(mean=(0.0,) * 3, std=(1.0,) * 3),
    "range 0 to 255": prepared(factor=255.0),
    "blue first": channels([2, 1, 0]),
    "grey": v2.Compose([v2.Grayscale(3), prepared()]),
}


@pytest.mark.parametrize("mistake", PREPROCESSING)
def test_a_mistake_in_the_preprocessing_is_caught(spec, expected, mistake, monkeypatch):
    import open_clip

    create = open_clip.create_model_and_transforms
    wrong = PREPROCESSING[mistake]
    monkeypatch.setattr(
        open_clip, "create_model_and_transforms", lambda *a, **b: (create(*a, **b)[0], wrong, wrong)
    )
    open_clip_model.cache_clear()
    try:
        error = np.abs(ours(spec) - expected).max()
    finally:
        open_clip_model.cache_clear()
    assert error < TOLERANCE if mistake == "none" else error > CAUGHT


FRAMES = {
    "T and C swapped": lambda x: x.transpose(1, 2).reshape(x.shape),
    "H and W swapped": lambda x: x.transpose(-2, -1).reshape(x.shape),
    "rows from the bottom": lambda x: x.flip(-2),
    "first frame only": lambda x: x[:, :1].expand(x.shape),
    "clips in another order": lambda x: x.flip(0),
}


@pytest.mark.parametrize("mistake", FRAMES)
def test_a_mistake_in_the_axes_is_caught(spec, expected, mistake, monkeypatch):
    monkeypatch.setattr(
        clip_models, "embedded_frames", lambda m, x: embedded_frames(m, FRAMES[mistake](x))
    )
    assert np.abs(ours(spec) - expected).max() > CAUGHT
