"""Write videoalign_reference.json: rewards of tiny networks by VideoAlign.

VideoAlign (KwaiVGI/VideoAlign@3e5ebc6) is run with its own versions, installed elsewhere:

    pip install --no-deps --target /tmp/va transformers==4.45.2 tokenizers==0.20.3 \
        huggingface-hub==0.25.2 peft==0.12.0 accelerate==0.34.0
    PYTHONPATH=/tmp/va:/path/VideoAlign:tests/helpers \
        python tests/references/videoalign_reference.py

Frames are given to it in place of a video file.
"""

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import LoraConfig, get_peft_model
from prompt_template import build_prompt
from random_weights import random_weights
from textures import textured_clips
from tiny_qwen2_vl import write_tiny_qwen2_vl
from train_reward import find_target_linear_names
from trainer import Qwen2VLRewardModelBT
from transformers import AutoConfig, AutoProcessor
from vision_process import process_vision_info

TOKENS = ["<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"]
LORA = {"lora_r": 4, "lora_alpha": 8}  # scaled by 2, as the published one (64 and 128)
EXCLUDED = ["lm_head", "rm_head", "embed_tokens", "visual"]
SCALE = 0.15
PROMPTS = ["a red circle moving left", "a {braced} Bird, très vite"]
FRAMES, FPS, SIZE = 33, 12.0, (250, 390)  # 5.5 frames at 2 per second


def main() -> None:
    frames = textured_clips(len(PROMPTS), FRAMES, *SIZE, seed=0)
    videos = {f"file://{i}": clip.transpose(0, 2, 3, 1) for i, clip in enumerate(frames)}

    class VideoReader:
        def __init__(self, path: str) -> None:
            self.video = videos[path]

        def __len__(self) -> int:
            return len(self.video)

        def get_avg_fps(self) -> float:
            return FPS

        def get_batch(self, indices: list[int]) -> SimpleNamespace:
            return SimpleNamespace(asnumpy=lambda: self.video[indices])

    sys.modules["decord"] = SimpleNamespace(VideoReader=VideoReader)
    with tempfile.TemporaryDirectory() as folder:
        base = write_tiny_qwen2_vl(Path(folder))
        processor = AutoProcessor.from_pretrained(base, padding_side="right")
        processor.tokenizer.add_special_tokens({"additional_special_tokens": TOKENS})
        ids = processor.tokenizer.convert_tokens_to_ids(TOKENS)
        config = AutoConfig.from_pretrained(base)
    net = Qwen2VLRewardModelBT(config, 1, "special", ids)
    net.resize_token_embeddings(len(processor.tokenizer))
    targets = find_target_linear_names(net, lora_namespan_exclude=EXCLUDED)
    lora = LoraConfig(
        target_modules=targets, r=LORA["lora_r"], lora_alpha=LORA["lora_alpha"], bias="none"
    )
    net = get_peft_model(net, lora).eval()
    shapes = {name: list(value.shape) for name, value in net.state_dict().items()}
    weights = random_weights(shapes, SCALE)
    embedding = weights["base_model.model.model.embed_tokens.weight"]
    net.load_state_dict(weights | {"base_model.model.lm_head.weight": embedding})  # tied
    net.config.pad_token_id = processor.tokenizer.pad_token_id
    chats = [
        [
            {
                "role": "user",
                "content": [
                    {
                        "type": "video",
                        "video": f"file://{i}",
                        "max_pixels": 448 * 448,
                        "fps": 2.0,
                        "sample_type": "uniform",
                    },
                    {
                        "type": "text",
                        "text": build_prompt(prompt, ["VQ", "MQ", "TA"], "detailed_special"),
                    },
                ],
            }
        ]
        for i, prompt in enumerate(PROMPTS)
    ]
    images, clips = process_vision_info(chats)
    batch = processor(
        text=processor.apply_chat_template(chats, tokenize=False, add_generation_prompt=True),
        images=images,
        videos=clips,
        padding=True,
        return_tensors="pt",
        videos_kwargs={"do_rescale": True},
    )
    print({name: tuple(value.shape) for name, value in batch.items()})
    with torch.no_grad():
        rewards = net(return_dict=True, **batch)["logits"]
    out = {"shapes": shapes, "rewards": rewards.tolist(), "token_ids": ids}
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(out).replace('], "', '],\n "') + "\n")


if __name__ == "__main__":
    main()
