"""A tiny pipeline of Wan's own classes, and clips in place of real data."""

from pathlib import Path

import numpy as np
import torch


def tiny_pipeline(folder: Path) -> None:
    """Write a pipeline folder of Wan's own classes with random weights, for 5 frames of 16x16."""
    # these take seconds, and `distill_bench.testing` is imported for its checks as well
    from diffusers import (
        AutoencoderKLWan,
        FlowMatchEulerDiscreteScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    words = ["<pad>", "<unk>", "a", "red", "blue", "circle", "square", "moving", "left", "right"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", model_max_length=8
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text_encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(words), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2
            )
        )
        vae = AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.1, -0.1, 0.2, 0.0],
            latents_std=[1.0, 2.0, 0.5, 1.5],
        )
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        )
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipeline.save_pretrained(folder)
    (folder / "prompts.txt").write_text(
        "a red circle moving left\na blue square moving right\n", encoding="utf-8"
    )


def tiny_clips(folder: Path) -> None:
    """Write a folder of eight clips of noise, in place of real data for `tiny_pipeline`."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(
        folder / "clips.npy",
        np.random.default_rng(0).integers(0, 256, (8, 5, 3, 16, 16), dtype=np.uint8),
    )
    (folder / "manifest.jsonl").write_text(
        "".join(f'{{"index": {i}, "prompt": "a red circle"}}\n' for i in range(8)),
        encoding="utf-8",
    )
