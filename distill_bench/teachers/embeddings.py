"""Cached embeddings of prompts, encoded once per store, so that training loads no text encoder.

    <store>/embeddings/<tokenizer>-<text encoder>/<shard>.safetensors

Both parts of the folder's name are content hashes. A shard maps `text_key(prompt)` to an embedding
without its trailing zero rows. torch is imported late, because resolving a run does not need it.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_bench.store.files import write_bytes
from distill_bench.teachers.contents import content_hash
from distill_bench.teachers.folder import TeacherError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def text_key(prompt: str) -> str:
    """Name of a prompt's embedding in a shard."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:32]


def embeddings_folder(store: Path, teacher: Path, settings: Sequence[Any]) -> Path | None:
    """Cache folder of a teacher's embeddings; it may not exist yet.

    Args:
        store: root of the runs.
        teacher: its pipeline folder.
        settings: other values that affect an embedding: the pipeline's class and the number of
            tokens.

    Returns:
        None if the teacher has no text encoder and nothing is cached for its tokenizer.

    Raises:
        TeacherError: if the teacher has no text encoder and several caches fit its tokenizer.
    """
    hashed = json.dumps([content_hash(teacher / "tokenizer"), *settings])
    tokenizer = hashlib.sha256(hashed.encode()).hexdigest()[:12]
    root = store / "embeddings"
    if has_text_encoder(teacher):
        return root / f"{tokenizer}-{content_hash(teacher / 'text_encoder')}"
    cached = sorted(root.glob(f"{tokenizer}-*"))
    if len(cached) > 1:
        raise TeacherError(
            f"teacher {teacher} has no text encoder, and {len(cached)} folders in {root} fit its "
            "tokenizer; remove the folders of other text encoders"
        )
    return cached[0] if cached else None


def has_text_encoder(teacher: Path) -> bool:
    """True if a teacher's folder holds the weights of a text encoder."""
    return any((teacher / "text_encoder").glob("*.safetensors"))


def write_shard(folder: Path, embeddings: Mapping[str, "Tensor"], teacher: str) -> None:
    """Write embeddings as one file, atomically; its name is a hash of its keys.

    Args:
        folder: from `embeddings_folder`.
        embeddings: prompt -> (L, D), with one L for all.
        teacher: name of the teacher, recorded in the file's metadata.
    """
    from safetensors.torch import save  # needs torch, which takes seconds

    rows = {}
    for prompt, embedding in embeddings.items():
        filled = (embedding != 0).any(-1).nonzero()
        length = int(filled.max()) + 1 if len(filled) else 0
        rows[text_key(prompt)] = embedding[:length].contiguous()
    metadata = {
        "teacher": teacher,
        "length": str(len(next(iter(embeddings.values())))),
        "prompts": json.dumps({text_key(prompt): prompt for prompt in embeddings}),
    }
    name = hashlib.sha256("".join(sorted(rows)).encode()).hexdigest()[:16]
    write_bytes(folder / f"{name}.safetensors", save(rows, metadata))


@dataclass(frozen=True)
class Embeddings:
    """Cached embeddings of a folder by prompt, read on demand."""

    folder: Path

    @cached_property
    def shards(self) -> dict[str, Any]:
        """`text_key` of each cached prompt -> its open shard.

        Raises:
            TeacherError: for a shard that cannot be read.
        """
        from safetensors import SafetensorError, safe_open  # not needed to resolve a run

        shards = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                shard = safe_open(path, "pt")
            except (OSError, SafetensorError) as error:
                raise TeacherError(
                    f"embeddings {path} cannot be read ({error}); remove the file, and its prompts "
                    "will be encoded again"
                ) from error
            shards |= dict.fromkeys(shard.keys(), shard)
        return shards

    def __contains__(self, prompt: str) -> bool:
        return text_key(prompt) in self.shards

    def __getitem__(self, prompt: str) -> "Tensor":
        """The embedding (L, D) of a prompt, float32."""
        import torch  # takes seconds

        shard = self.shards[text_key(prompt)]
        rows = shard.get_tensor(text_key(prompt)).float()
        padding = int(shard.metadata()["length"]) - len(rows)
        return torch.cat([rows, rows.new_zeros(padding, rows.shape[1])])


class Texts(Sequence):
    """Embeddings (1, L, D) of a list of prompts and of a negative prompt, on one device.

    Args:
        prompts: item i of the sequence is the embedding of prompts[i].
        embedded: prompt -> (L, D), for the prompts and the negative prompt.
        device: of the embeddings that are returned.
        dtype: of the embeddings that are returned.
        negative: text of the unconditional branch of guidance; its embedding is `null_text`.
    """

    def __init__(
        self,
        prompts: list[str],
        embedded: "Embeddings | Mapping[str, Tensor]",
        device: "torch.device",
        dtype: "torch.dtype",
        negative: str = "",
    ) -> None:
        self.prompts = prompts
        self.embedded = embedded
        self.device = device
        self.dtype = dtype
        self.null_text = self._load(negative)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> "Tensor":
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._load(self.prompts[index])

    def rows(self, indices: Iterable[int]) -> "Tensor":
        """Embeddings (B, L, D) of the prompts at these indices."""
        import torch  # takes seconds

        rows = [self.embedded[self.prompts[index]] for index in indices]
        return torch.stack(rows).to(self.device, self.dtype)

    def _load(self, prompt: str) -> "Tensor":
        return self.embedded[prompt].to(self.device, self.dtype)[None]
