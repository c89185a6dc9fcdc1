"""Prompts of a teacher and their embeddings, from the store or from its own text encoder."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers
from torch import Tensor

from distill_bench.networks.loading import load_part, naming_folder
from distill_bench.networks.ranks import ranks
from distill_bench.store.claims import once
from distill_bench.store.progress import tracked
from distill_bench.teachers.architecture import Architecture, architecture_of
from distill_bench.teachers.embeddings import (
    Embeddings,
    Texts,
    embeddings_folder,
    has_text_encoder,
    write_shard,
)
from distill_bench.teachers.folder import TeacherError
from distill_bench.teachers.kinds import find_teacher
from distill_bench.teachers.prompts import negative_text, read_prompts

PROMPTS_PER_SHARD = 128


@dataclass(frozen=True)
class TextPipeline:
    """Prompts and texts of a pipeline folder; the text encoder is loaded only when needed."""

    folder: Path
    architecture: Architecture
    device: torch.device
    store: Path | None = None  # where embeddings are kept; None: encode at every call
    prompts_file: Path | None = None  # instead of the folder's own prompts.txt

    def prompts(self) -> list[str]:
        """Training prompts, from the run's file or else from the folder's `prompts.txt`.

        Raises:
            TeacherError: if there is no such file.
        """
        path = self.prompts_file or self.folder / "prompts.txt"
        if self.prompts_file is None and not path.is_file():
            raise TeacherError(
                f"teacher {self.folder} has no prompts.txt: name a file of prompts in the run's "
                "key `prompts`"
            )
        return read_prompts(path)

    def encode_text(self, prompts: list[str]) -> Tensor:
        """Embeddings (B, L, D) as diffusers' own pipeline makes them; "" is the empty prompt."""
        embeddings = self._embeddings_of(prompts)
        return torch.stack([embeddings[prompt] for prompt in prompts]).to(self.device)

    def texts(
        self, prompts: list[str], dtype: torch.dtype = torch.float32, negative_prompt: str = ""
    ) -> Texts:
        """Texts of the prompts and the negative prompt; with a store, they are read on demand."""
        negative = self.negative_text(negative_prompt)
        embedded = self._embeddings_of([*prompts, negative])
        return Texts(prompts, embedded, self.device, dtype, negative)

    def negative_text(self, value: str) -> str:
        """Text of a key `negative_prompt` (`distill_bench.teachers.prompts`)."""
        return negative_text(value, self.architecture.negative_prompt)

    def embed(self, prompts: list[str], store: Path) -> int:
        """Encode the prompts that a store lacks, and write them into it.

        Returns:
            The number of prompts encoded.

        Raises:
            TeacherError: if prompts are missing and the teacher has no text encoder.
        """
        folder = self.embeddings_folder(store)
        stored = () if folder is None else Embeddings(folder)
        prompts = list(dict.fromkeys(prompts))
        missing = [prompt for prompt in prompts if prompt not in stored]
        if not missing:
            return 0
        if not has_text_encoder(self.folder):
            raise TeacherError(
                f"the prompt {missing[0]!r} has no embedding ({len(missing)} of {len(prompts)} "
                f"have none) and the teacher {self.folder} has no text encoder; with a complete "
                f"copy of the teacher, run: distill-bench embed TEACHER PROMPTS --store {store} "
                "(a negative prompt: --negative-prompt)"
            )
        pipeline = self.text_encoder_pipeline()
        self._warn_of_truncation(missing, pipeline)
        encode = self._encoder(pipeline)
        shards = [
            missing[first : first + PROMPTS_PER_SHARD]
            for first in range(0, len(missing), PROMPTS_PER_SHARD)
        ]
        for shard in tracked(shards, "encoding prompts", ranks().first):
            encoded = {prompt: encode(prompt).cpu() for prompt in shard}
            write_shard(folder, encoded, self.folder.name)
        return len(missing)

    # quoted: diffusers imports its pipelines at the first use of the name, which takes seconds
    def _warn_of_truncation(
        self, prompts: list[str], pipeline: "diffusers.DiffusionPipeline"
    ) -> None:
        limit = self.architecture.text_length(pipeline.tokenizer)
        longer = [
            prompt
            for prompt in prompts
            if len(pipeline.tokenizer(prompt, verbose=False).input_ids) > limit
        ]
        if longer:
            print(
                f"{len(longer)} of {len(prompts)} prompts are longer than the {limit} tokens that "
                f"{self.folder.name} takes and are truncated, e.g. {longer[0][:60]!r}",
                file=sys.stderr,
                flush=True,
            )

    def _embeddings_of(self, prompts: list[str]) -> Mapping[str, Tensor] | Embeddings:
        """Embedding (L, D) of each prompt; with a store, one process encodes for all."""
        if self.store is None:
            encode = self._encoder(self.text_encoder_pipeline())
            return {prompt: encode(prompt) for prompt in prompts}

        def complete() -> Embeddings | None:
            folder = self.embeddings_folder(self.store)
            if folder is None:
                return None
            stored = Embeddings(folder)
            return stored if all(prompt in stored for prompt in prompts) else None

        embeddings = complete()
        if embeddings is None:
            once(
                self.store / "embeddings",
                lambda: complete() is not None,
                lambda: self.embed(prompts, self.store),
            )
            embeddings = complete()
        return embeddings

    def embeddings_folder(self, store: Path) -> Path | None:
        """The pipeline's folder in a store's embeddings (`distill_bench.teachers.embeddings`)."""
        settings = [
            self.architecture.PIPELINE,
            self.architecture.TEXT_LENGTH,
            self.architecture.transformer.get("max_text_seq_length"),
        ]
        return embeddings_folder(store, self.folder, settings)

    def text_encoder_pipeline(self) -> "diffusers.DiffusionPipeline":
        """diffusers' pipeline with only its tokenizer and text encoder.

        Raises:
            TeacherError: if the tokenizer or the text encoder cannot be loaded.
        """
        with naming_folder(self.folder / "tokenizer"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder / "tokenizer")
        encoder_class = getattr(transformers, self.architecture.TEXT_ENCODER)
        encoder = load_part(encoder_class, self.folder / "text_encoder")
        encoder = encoder.to(self.device).eval().requires_grad_(False)
        pipeline_class = getattr(diffusers, self.architecture.PIPELINE)
        return pipeline_class(
            tokenizer=tokenizer, text_encoder=encoder, vae=None, transformer=None, scheduler=None
        )

    def _encoder(self, pipeline: "diffusers.DiffusionPipeline") -> Callable[[str], Tensor]:
        """A function from a prompt to its float32 embedding (L, D).

        The function takes one prompt, because in a batch rounding would depend on other prompts.
        """
        length = self.architecture.text_length(pipeline.tokenizer)

        @torch.no_grad()
        def encode(prompt: str) -> Tensor:
            return self.architecture.encode_text(pipeline, [prompt], length)[0].float()

        return encode


def load_texts(
    name: str, device: torch.device, prompts: Path | None = None, store: Path | None = None
) -> TextPipeline:
    """The texts of a teacher, without its networks.

    Args:
        name: a pipeline folder or hub name.
        device: of the embeddings.
        prompts: file of training prompts; None: the folder's own.
        store: where embeddings are kept; None: encode at every call.

    Raises:
        TeacherError: if there is no such teacher, or the teacher takes no text embeddings.
    """
    teacher = find_teacher(name)
    if not teacher.has_networks:
        raise TeacherError(f"teacher {name!r} has no text encoder: it takes no embeddings")
    return TextPipeline(teacher.folder, architecture_of(teacher.folder), device, store, prompts)
