"""Prompts out of files, and their embeddings out of the store: made once, by `distill-bench embed` or before the first run.

    <store>/embeddings/<tokenizer>-<text encoder>/<shard>.safetensors

Both parts of the folder's name are digests of content. A shard holds embeddings by `text_key` of the prompt, without the zeros
that they end with. Imports nothing heavy before it is asked for embeddings: the command line resolves runs with it.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field, StringConstraints, TypeAdapter, ValidationError

from distill_bench.store.files import write_bytes
from distill_bench.teachers.contents import content_hash
from distill_bench.teachers.folder import TeacherError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class _Line(BaseModel, strict=True, extra="ignore"):
    """A prompt of a JSON file: VBench calls it prompt_en."""

    prompt: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
    seed: Annotated[int, Field(ge=0)] | None = None


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: text, one a line; `.jsonl`, an object with `prompt` a line; `.json`, a list of such, as VBench's.

    A line may have a `seed`, as such files do: it is checked and left, for seeds are the protocol's, the same for every run.

    Raises:
        ValueError: if there are none, or a line is no prompt.
    """
    try:
        text = path.read_text(
            encoding="utf-8-sig"
        )  # some editors begin with a mark, which is no part of the prompt
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"prompts {path}: {getattr(error, 'strerror', None) or 'it is no text'}"
        ) from error
    if path.suffix == ".json":
        entries = _json(text, f"prompts {path}")
        if not isinstance(entries, list):
            kind = "null" if entries is None else type(entries).__name__
            raise ValueError(
                f"prompts {path}: a list of strings or of {{'prompt': TEXT}} is allowed, found {kind}"
            )
        found = [_prompt(entry, f"prompts {path}, entry {n}") for n, entry in enumerate(entries, 1)]
    elif path.suffix == ".jsonl":
        lines = [
            (f"prompts {path}, line {n}", line)
            for n, line in enumerate(text.split("\n"), 1)
            if line.strip()
        ]
        found = [_prompt(_json(line, where), where) for where, line in lines]
    else:
        found = [
            line.strip() for line in text.split("\n") if line.strip()
        ]  # not splitlines: JSON and prompts may have U+2028
    if not found:
        raise ValueError(f"prompts {path}: there are none")
    return found


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: no JSON: {error.msg}") from error


def _prompt(line: Any, where: str) -> str:
    if isinstance(line, str):
        line = {"prompt": line}
    if isinstance(line, dict) and "prompt" not in line and "prompt_en" in line:
        line = line | {"prompt": line["prompt_en"]}
    try:
        return TypeAdapter(_Line).validate_python(line).prompt
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(
            f"{where}: {f'{key}: ' if key else ''}{first['msg']}; a prompt is {{'prompt': TEXT, 'seed': 0}}"
        ) from error


def prompts_hash(path: Path) -> str:
    """A digest of a file's prompts (12 digits): they count by content."""
    return hashlib.sha256(json.dumps(read_prompts(path)).encode()).hexdigest()[:12]


# ---- embeddings


def text_key(prompt: str) -> str:
    """What a prompt's embedding is called."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:32]


def embeddings_folder(store: Path, teacher: Path, about: Sequence[Any]) -> Path | None:
    """Where the embeddings of a teacher lie, whether or not there are any; None where its text encoder is gone and none are.

    Args:
        about: what else decides an embedding: the pipeline that makes it, its length.
    """
    tokenizer = hashlib.sha256(
        json.dumps([content_hash(teacher / "tokenizer"), *about]).encode()
    ).hexdigest()[:12]
    root = store / "embeddings"
    if has_text_encoder(teacher):
        return root / f"{tokenizer}-{content_hash(teacher / 'text_encoder')}"
    found = sorted(root.glob(f"{tokenizer}-*"))
    if len(found) > 1:
        raise TeacherError(
            f"teacher {teacher} has no text encoder, and embeddings of {len(found)} lie in {root}: remove those that are not its"
        )
    return found[0] if found else None


def has_text_encoder(teacher: Path) -> bool:
    """Whether a teacher's text encoder is there with weights."""
    return any((teacher / "text_encoder").glob("*.safetensors"))


def write_shard(folder: Path, embeddings: Mapping[str, "Tensor"], teacher: str) -> None:
    """Write the embeddings (L, D) of prompts, of one L, as one file, named by what is in it, whole or not at all."""
    from safetensors.torch import save

    rows = {}
    for prompt, embedding in embeddings.items():
        filled = (embedding != 0).any(-1).nonzero()
        rows[text_key(prompt)] = embedding[
            : int(filled.max()) + 1 if len(filled) else 0
        ].contiguous()
    about = {"teacher": teacher, "length": str(len(next(iter(embeddings.values()))))}
    about["prompts"] = json.dumps({text_key(prompt): prompt for prompt in embeddings})
    name = hashlib.sha256("".join(sorted(rows)).encode()).hexdigest()[:16]
    write_bytes(folder / f"{name}.safetensors", save(rows, about))


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of a folder, read one by one."""

    folder: Path

    @cached_property
    def shards(self) -> dict[str, Any]:
        """Every embedding's key -> its open shard.

        Raises:
            TeacherError: for a shard that cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        found = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                shard = safe_open(path, "pt")
            except (OSError, SafetensorError) as error:
                raise TeacherError(
                    f"embeddings {path} cannot be read ({error}): remove it, to have its prompts encoded again"
                ) from error
            found |= dict.fromkeys(shard.keys(), shard)
        return found

    def __contains__(self, prompt: str) -> bool:
        return text_key(prompt) in self.shards

    def __getitem__(self, prompt: str) -> "Tensor":
        """The embedding (L, D) of a prompt, float32."""
        import torch

        shard = self.shards[text_key(prompt)]
        rows = shard.get_tensor(text_key(prompt)).float()
        return torch.cat(
            [rows, rows.new_zeros(int(shard.metadata()["length"]) - len(rows), rows.shape[1])]
        )


class Texts(Sequence):
    """The texts of prompts, each (1, L, D) on a device, and the null text, out of the embeddings (L, D) of each."""

    def __init__(
        self,
        prompts: list[str],
        embedded: "Embeddings | Mapping[str, Tensor]",
        device: "torch.device",
        dtype: "torch.dtype",
    ) -> None:
        self.prompts, self.embedded, self.device, self.dtype = prompts, embedded, device, dtype
        self.null_text = self._of("")

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> "Tensor":
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._of(self.prompts[index])

    def rows(self, indices: Iterable[int]) -> "Tensor":
        """The texts of these prompts, (B, L, D)."""
        import torch

        return torch.cat([self[index] for index in indices])

    def _of(self, prompt: str) -> "Tensor":
        return self.embedded[prompt].to(self.device, self.dtype)[None]
