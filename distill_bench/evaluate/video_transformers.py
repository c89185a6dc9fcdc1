"""Networks of transformers' classes: from its folders, and from checkpoints of others.

VideoMAE-v2 (for CD-FVD) and V-JEPA (for JEDi) are read from their authors' checkpoints. Both are
the ViT of transformers' VideoMAE; V-JEPA has other fixed position embeddings. Its keys have a bias,
which is left out: it adds the same number to all attention logits of a query.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import interpolate

from distill_bench.evaluate import encoders
from distill_bench.networks.loading import read_pickled
from distill_bench.store.failures import first_line
from distill_bench.store.files import sha256

Weights = Mapping[str, Tensor]

SIZE, FRAMES = 224, 16  # of the clips in training
HEADS = 16  # of ViT-H and ViT-g
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation

# parts of names in the checkpoints and in transformers
RENAMED = {
    "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
    "blocks.": "encoder.layer.",
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
    ".attn.q_bias": ".attention.attention.query.bias",
    ".attn.v_bias": ".attention.attention.value.bias",
    ".attn.proj.": ".attention.output.dense.",
    ".mlp.fc1.": ".intermediate.dense.",
    ".mlp.fc2.": ".output.dense.",
}


class VideoMAEv2(nn.Module):
    """Features of CD-FVD (Ge et al., 2024) by VideoMAE-v2, fine-tuned on Something-Something-v2.

    content-debiased-fvd@14ef7cb: the normalised mean token, from clips scaled to [0, 1].
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.vit = video_vit(weights)
        positions = self.vit.embeddings.position_embeddings  # (1, L, d)
        self.register_buffer("positions", positions)
        self.norm = nn.LayerNorm(positions.shape[-1], eps=1e-6)
        load_weights(self.norm, under("fc_norm.", weights))

    def forward(self, frames: Tensor) -> Tensor:
        """Features (B, d) of uint8 clips (B, T, 3, H, W); an odd last frame is not read."""
        x = resized(frames, antialias=False)
        patches = self.vit.embeddings.patch_embeddings(x)
        tokens = self.vit.encoder(patches + self.positions_for(x.shape[1] // 2)).last_hidden_state
        return self.norm(tokens.mean(1))

    def positions_for(self, tubelets: int) -> Tensor:
        """Position embeddings, interpolated in time to this number of pairs of frames."""
        trained = FRAMES // 2
        if tubelets == trained:
            return self.positions
        side = round((self.positions.shape[1] / trained) ** 0.5)
        grid = self.positions.transpose(1, 2).reshape(1, -1, trained, side, side)
        # the original adds 0.1 against rounding, which moves the interpolated positions a little
        scale = ((tubelets + 0.1) / trained, 1.0, 1.0)
        return interpolate(grid, scale_factor=scale, mode="trilinear").flatten(2).transpose(1, 2)


class VJEPA(nn.Module):
    """Features of JEDi (Luo et al., 2024): V-JEPA's tokens, pooled by its probe of SSv2.

    videojedi 1.1.0 and vjepa 0.1.2. They leave frames and size to the user; here they are those of
    the probe's training, 16 frames (evenly spaced) of 224x224.
    """

    def __init__(self, encoder: Weights, probe: Weights) -> None:
        super().__init__()
        self.vit = video_vit(encoder)
        self.register_buffer("positions", encoder["pos_embed"].float())
        self.register_buffer("mean", torch.tensor(IMAGENET[0]).reshape(3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET[1]).reshape(3, 1, 1))
        self.norm = nn.LayerNorm(self.positions.shape[-1], eps=1e-6)
        load_weights(self.norm, under("norm.", encoder))
        self.pooler = AttentivePooler(probe)

    def forward(self, frames: Tensor) -> Tensor:
        """Features (B, d) of uint8 clips (B, T, 3, H, W) with T >= 16."""
        chosen = torch.linspace(0, frames.shape[1] - 1, FRAMES).round().long()
        x = resized(frames[:, chosen.to(frames.device)], antialias=True)
        patches = self.vit.embeddings.patch_embeddings((x - self.mean) / self.std)
        tokens = self.vit.encoder(patches + self.positions).last_hidden_state
        return self.pooler(self.norm(tokens))


class AttentivePooler(nn.Module):
    """V-JEPA's probe without its classifier: a learned query attends to the tokens."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        block = under("cross_attention_block.", weights)
        dim = weights["query_tokens"].shape[-1]
        self.query = nn.Parameter(weights["query_tokens"].float())
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, HEADS, batch_first=True)
        hidden = len(block["mlp.fc1.weight"])
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        load_weights(self.norm1, under("norm1.", block))
        load_weights(self.norm2, under("norm2.", block))
        load_weights(self.mlp[0], under("mlp.fc1.", block))
        load_weights(self.mlp[2], under("mlp.fc2.", block))
        projections = {
            f"in_proj_{kind}": torch.cat([block[f"xattn.q.{kind}"], block[f"xattn.kv.{kind}"]])
            for kind in ("weight", "bias")
        }
        output = {f"out_proj.{kind}": block[f"xattn.proj.{kind}"] for kind in ("weight", "bias")}
        load_weights(self.attention, projections | output)

    def forward(self, tokens: Tensor) -> Tensor:
        """Pool tokens (B, L, d) to (B, d)."""
        query, tokens = self.query.expand(len(tokens), -1, -1), self.norm1(tokens)
        pooled = query + self.attention(query, tokens, tokens, need_weights=False)[0]
        return (pooled + self.mlp(self.norm2(pooled)))[:, 0]


def resized(frames: Tensor, antialias: bool) -> Tensor:
    """Scale uint8 clips (B, T, 3, H, W) to [0, 1] and squash them to 224x224, bilinear."""
    x = (encoders.scaled(frames).flatten(0, 1) + 1) / 2
    x = interpolate(x, (SIZE, SIZE), mode="bilinear", align_corners=False, antialias=antialias)
    return x.reshape(*frames.shape[:3], SIZE, SIZE)


def video_vit(weights: Weights) -> nn.Module:
    """`VideoMAEModel` with the patches and blocks of a checkpoint, which give its sizes."""
    from transformers import VideoMAEConfig, VideoMAEModel  # slow to import, rarely used

    patches = weights["patch_embed.proj.weight"]  # (d, 3, 2, p, p)
    config = VideoMAEConfig(
        image_size=SIZE,
        num_frames=FRAMES,
        patch_size=patches.shape[-1],
        hidden_size=len(patches),
        num_hidden_layers=1 + max(int(key.split(".")[1]) for key in weights if "blocks" in key),
        num_attention_heads=HEADS,
        intermediate_size=len(weights["blocks.0.mlp.fc1.weight"]),
        layer_norm_eps=1e-6,
        use_mean_pooling=True,  # has no norm of its own after the blocks
    )
    with torch.device("meta"):  # the weights replace the parameters
        vit = VideoMAEModel(config)
    load_weights(vit, renamed(weights))
    return vit.eval()


def renamed(weights: Weights) -> dict[str, Tensor]:
    """Patches and blocks of a checkpoint under transformers' names."""
    parts = {}
    for key, value in weights.items():
        stem, _, kind = key.partition(".attn.qkv.")
        if kind:
            for name, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                if (name, kind) != ("key", "bias"):
                    parts[f"{stem}.attention.attention.{name}.{kind}"] = part
        elif key.startswith(("patch_embed.", "blocks.")):
            parts[key] = value
    for old, new in RENAMED.items():
        parts = {key.replace(old, new): value for key, value in parts.items()}
    return parts


def under(prefix: str, weights: Weights) -> dict[str, Tensor]:
    """Entries whose names begin with the prefix, without it."""
    return {key.removeprefix(prefix): v for key, v in weights.items() if key.startswith(prefix)}


def load_weights(net: nn.Module, weights: Weights) -> None:
    """Replace all parameters of the network by these, as float32.

    Raises:
        ValueError: if the names are others than the network's.
    """
    names = net.state_dict().keys()
    if missing := sorted(names - weights.keys()):
        raise ValueError(f"it lacks {len(missing)} weights, e.g. {missing[0]}")
    if unknown := sorted(weights.keys() - names):
        raise ValueError(f"it has {len(unknown)} unknown weights, e.g. {unknown[0]}")
    net.load_state_dict({key: v.float() for key, v in weights.items()}, assign=True)


def read_checkpoint(path: Path, *keys: str) -> dict[str, Tensor]:
    """Weights under the first of the keys that a .pth file has, or the file's own.

    Prefixes of data parallelism ("module.") and of V-JEPA's wrapper ("backbone.") are removed.

    Raises:
        ValueError: if the file is missing or holds no tensors.
    """
    try:
        checkpoint = read_pickled(path)
    except OSError as error:
        raise ValueError(f"no weights at {path}: {error.strerror}") from error
    for key in keys:
        if isinstance(checkpoint, dict) and key in checkpoint:
            checkpoint = checkpoint[key]
            break
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds no weights")
    return {
        key.removeprefix("module.").removeprefix("backbone."): value
        for key, value in checkpoint.items()
        if isinstance(value, Tensor)
    }


def transformers_model(name: str, path: str, kind: str, title: str) -> tuple[nn.Module, str]:
    """A frozen model of transformers' class `kind` from a folder, and the digest of its files.

    Raises:
        ValueError: if the folder holds no such model, or lacks some of its weights.
    """
    import transformers  # slow to import, rarely used

    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{name} needs a transformers folder with config.json, as {name}:/path; "
            f"found {path or 'no path'!r}"
        )
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])
    if not files:
        raise ValueError(f"{folder} holds no weights; it needs model.safetensors")
    try:
        net, loading = getattr(transformers, kind).from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no {title}: {first_line(error)}") from error
    if missing := loading["missing_keys"]:  # transformers fills them at random and only logs it
        raise ValueError(f"{folder} lacks weights of a {title}, e.g. {min(missing)}")
    # with other means, sizes or activations, the same weights give other features
    files += sorted(folder.glob("*config.json"))
    digest = hashlib.sha256("".join(f.name + sha256(f) for f in files).encode()).hexdigest()
    return net.eval().requires_grad_(False), digest
