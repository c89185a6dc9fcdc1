"""VideoReward, the reward model of VideoAlign: Qwen2-VL-2B with rewards at three tokens.

KwaiVGI/VideoAlign@3e5ebc6 (MIT; `videoalign_prompt.txt` is its prompt). The published model reads
tokens of video by their order alone: it was trained without Qwen2-VL's positions in space and time.
"""

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill_bench.evaluate.cache import cached, shared_rows
from distill_bench.evaluate.device import placed
from distill_bench.evaluate.video_transformers import load_weights, read_checkpoint, under
from distill_bench.evaluator import Clips
from distill_bench.store.failures import first_line
from distill_bench.store.files import read_json, sha256

REWARDS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")  # tokens: visual, motion, text
PROMPT = Path(__file__).with_name("videoalign_prompt.txt")
FIXED = {  # settings of model_config.json that this module implements
    "data_config": {
        "eval_dim": ["VQ", "MQ", "TA"],
        "prompt_template_type": "detailed_special",
        "sample_type": "uniform",
        "num_frames": None,
    },
    "model_config": {"output_dim": 1, "use_special_tokens": True, "reward_token": "special"},
    "peft_lora_config": {"lora_enable": True, "use_rslora": False},
}
LEAST_PIXELS = 128 * 28 * 28  # of a resized frame
LEAST_FRAMES, MOST_FRAMES = 4, 768


class VideoReward(nn.Module):
    """Rewards for visual quality, motion quality and alignment with the text; no fixed range."""

    def __init__(self, base: Path, settings: Mapping[str, Any], weights: Mapping[str, Tensor]):
        # slow to import, rarely used
        from accelerate import init_empty_weights
        from transformers import Qwen2VLConfig, Qwen2VLModel, Qwen2VLProcessor

        super().__init__()
        self.fps = settings["data_config"]["fps"]
        self.most_pixels = settings["data_config"]["max_frame_pixels"]
        self.processor = Qwen2VLProcessor.from_pretrained(base, local_files_only=True)
        self.processor.video_processor.cap_pixels_per_frame = False  # `frame_size` bounds them
        tokenizer = self.processor.tokenizer
        tokenizer.add_tokens([*REWARDS], special_tokens=True)
        self.tokens = tokenizer.convert_tokens_to_ids([*REWARDS])
        config = Qwen2VLConfig.from_pretrained(base, local_files_only=True)
        config.text_config.vocab_size = len(weights["model.embed_tokens.weight"])
        with init_empty_weights():
            self.net = Qwen2VLModel(config)
            self.head = nn.Linear(config.text_config.hidden_size, 1, bias=False)
        load_weights(self.head, under("rm_head.", weights))
        vision = {f"visual.{key}": value for key, value in under("visual.", weights).items()}
        text = {f"language_model.{key}": value for key, value in under("model.", weights).items()}
        load_weights(self.net, vision | text)
        self.eval().requires_grad_(False)

    def forward(self, frames: Tensor, prompt: str, fps: float) -> Tensor:
        """Rewards (3,) of one clip, uint8 (T, 3, H, W) that plays at `fps` frames per second."""
        inputs = self.inputs(frames, prompt, fps)
        ids = inputs["input_ids"]
        embedded = self.net.get_input_embeddings()(ids)
        video = self.net.get_video_features(
            inputs["pixel_values_videos"], inputs["video_grid_thw"]
        ).pooler_output
        is_video = (ids == self.net.config.video_token_id)[..., None]
        embedded = embedded.masked_scatter(is_video, torch.cat(list(video)).to(embedded))
        order = torch.arange(ids.shape[1], device=ids.device).expand(3, 1, -1)
        hidden = self.net.language_model(inputs_embeds=embedded, position_ids=order)
        at_tokens = torch.isin(ids[0], torch.tensor(self.tokens, device=ids.device))
        return self.head(hidden.last_hidden_state[0, at_tokens])[:, 0]

    def inputs(self, frames: Tensor, prompt: str, fps: float) -> Mapping[str, Tensor]:
        """Tokens and patches of a clip and its prompt, as VideoAlign's `prepare_batch`."""
        # slow to import, rarely used
        from torchvision.transforms.functional import InterpolationMode, resize

        chosen = frames[frame_indices(len(frames), fps, self.fps).to(frames.device)]
        size = frame_size(*frames.shape[-2:], self.most_pixels)
        chosen = resize(chosen, size, InterpolationMode.BICUBIC, antialias=True)
        question = PROMPT.read_text(encoding="utf-8").replace("{text_prompt}", prompt)
        content = [{"type": "video"}, {"type": "text", "text": question}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        videos_kwargs = {"do_sample_frames": False, "do_resize": False}
        return self.processor(
            text=[text], videos=[chosen], return_tensors="pt", videos_kwargs=videos_kwargs
        ).to(frames.device)


def frame_indices(count: int, fps: float, rate: float) -> Tensor:
    """Indices of evenly spaced frames, `rate` per second: an even number, first and last included.

    Qwen's `smart_nframes`.
    """
    most = min(MOST_FRAMES, count) // 2 * 2
    wanted = min(max(count / fps * rate, LEAST_FRAMES), most)
    return torch.linspace(0, count - 1, min(2 * round(wanted / 2), count)).round().long()


def frame_size(height: int, width: int, most: int) -> list[int]:
    """Height and width in multiples of 28 with at most `most` pixels and the aspect kept."""
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import smart_resize  # slow

    return list(smart_resize(height, width, 28, LEAST_PIXELS, most))


@cache
def load_video_reward(folder: str, base: str) -> tuple[VideoReward, str]:
    """The model of a VideoReward folder over Qwen2-VL's configuration, and its id.

    Args:
        folder: has model_config.json and checkpoint-*/model.pth.
        base: folder of Qwen2-VL-2B-Instruct; its weights are not read.

    Raises:
        ValueError: if a file is missing, or the model is not of the published form.
    """
    settings = read_json(Path(folder) / "model_config.json")
    files = sorted(Path(folder).glob("checkpoint-*/model.pth"))
    if settings is None or len(files) != 1:
        raise ValueError(
            f"{folder} is no folder of VideoReward: it needs model_config.json and one "
            f"checkpoint-*/model.pth; found {len(files)}"
        )
    for part, values in FIXED.items():
        for key, value in values.items():
            if settings.get(part, {}).get(key) != value:
                found = settings.get(part, {}).get(key)
                raise ValueError(f"{folder}: {part}.{key} is {found!r}; only {value!r} is known")
    lora = settings["peft_lora_config"]
    try:
        weights = merged(read_checkpoint(files[0]), lora["lora_alpha"] / lora["lora_r"])
        net = VideoReward(Path(base), settings, weights)
    except (KeyError, RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"no VideoReward from {folder} and {base}: {first_line(error)}") from error
    parts = [sha256(files[0]), sha256(Path(folder) / "model_config.json")]
    parts += [sha256(path) for path in sorted(Path(base).glob("*.json"))]
    return net, f"videoreward#{hashlib.sha256(''.join(parts).encode()).hexdigest()[:8]}"


def merged(weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Weights of a LoRA model with the LoRA added, W + scale B A, without peft's prefixes."""
    plain = {}
    for name, value in under("base_model.model.", weights).items():
        if ".lora_" in name:
            continue
        stem = name.replace(".base_layer.", ".")
        if stem != name and name.endswith(".weight"):
            module = f"base_model.model.{name.removesuffix('.base_layer.weight')}"
            down, up = (weights[f"{module}.lora_{ab}.default.weight"].float() for ab in "AB")
            value = value.float() + scale * up @ down
        plain[stem] = value
    plain.pop("lm_head.weight", None)
    return plain


def rewards(net: VideoReward, name: str, clips: Clips) -> Tensor:
    """Rewards (N, 3) of all clips, in the order of `REWARDS`, read from the cache if possible."""
    return cached(
        "\n".join([name, "v1", str(clips.fps), *clips.prompts]),
        clips,
        lambda: _by_clip(net, name, clips),
    )


def _by_clip(net: VideoReward, name: str, clips: Clips) -> Tensor:
    """Rewards clip by clip, because prompts differ in length."""
    with placed(net, name) as device, torch.no_grad():

        def row(index: int) -> Tensor:
            frames = torch.from_numpy(clips.frames[index]).to(device)
            rewards: Tensor = net(frames, clips.prompts[index], clips.fps)
            return rewards.float().cpu()[None]

        return shared_rows(row, clips.frames, 1, name, device)
