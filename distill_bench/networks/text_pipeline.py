"""TODO: networks.text_pipeline."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers
from rich.console import Console
from rich.progress import track
from torch import Tensor

from distill_bench.networks.loading import load_part, naming_folder
from distill_bench.networks.ranks import ranks
from distill_bench.store.claims import once
from distill_bench.teachers.architectures import Architecture, architecture_of
from distill_bench.teachers.folder import TeacherError
from distill_bench.teachers.kinds import find_teacher
from distill_bench.teachers.texts import (
    Embeddings,
    Texts,
    embeddings_folder,
    has_text_encoder,
    read_prompts,
    write_shard,
)

SHARD = 128  # embeddings a file


@dataclass(frozen=True)
class TextPipeline:
    """The prompts and texts of a pipeline folder; its text encoder is loaded for a text that the store does not have."""

    folder: Path
    architecture: Architecture
    device: torch.device
    store: Path | None = None  # where embeddings are kept
    prompts_file: Path | None = None  # instead of the folder's own prompts.txt

    def prompts(self) -> list[str]:
        """The training prompts: those of the run's own file, else those beside the weights, one a line in `prompts.txt`."""
        if self.prompts_file is not None:
            return read_prompts(self.prompts_file)
        path = self.folder / "prompts.txt"
        if not path.is_file():
            raise TeacherError(
                f"teacher {self.folder} has no prompts.txt: name a file of prompts in the run's key `prompts`"
            )
        return read_prompts(path)

    def encode_text(self, prompts: list[str]) -> Tensor:
        """Text embeddings (B, L, D), as diffusers' pipeline makes them. The empty prompt is the null text."""
        embedded = self._embedded(prompts)
        return torch.stack([embedded[prompt] for prompt in prompts]).to(self.device)

    def texts(self, prompts: list[str], dtype: torch.dtype = torch.float32) -> Texts:
        """The texts of prompts, read one by one as they are asked for where there is a store."""
        return Texts(prompts, self._embedded([*prompts, ""]), self.device, dtype)

    def embed(self, prompts: list[str], store: Path) -> int:
        """Encode into a store those prompts that it does not have; returns how many these were.

        Raises:
            TeacherError: for a prompt that has no embedding and cannot be given one.
        """
        folder = self.embeddings(store)
        there = () if folder is None else Embeddings(folder)
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in there]
        if missing and not has_text_encoder(self.folder):
            raise TeacherError(
                f"the prompt {missing[0]!r} has no embedding ({len(missing)} of {len(prompts)} have none) and the teacher "
                f"{self.folder} no text encoder; where it has one: distill-bench embed TEACHER PROMPTS --store {store}"
            )
        if missing:
            pipeline = self.text_pipeline()
            encode, length = (
                self._encoder(pipeline),
                self.architecture.text_length(pipeline.tokenizer),
            )
            cut = [
                prompt
                for prompt in missing
                if len(pipeline.tokenizer(prompt, verbose=False).input_ids) > length
            ]
            if cut:
                say = f"{len(cut)} of {len(missing)} prompts have more than the {length} tokens that {self.folder.name} takes"
                print(
                    f"{say}: their ends are cut, for instance {cut[0][:60]!r}",
                    file=sys.stderr,
                    flush=True,
                )
            shards = [missing[at : at + SHARD] for at in range(0, len(missing), SHARD)]
            console = Console(file=sys.stderr, quiet=not sys.stderr.isatty() or not ranks().first)
            for shard in track(shards, "encoding prompts", console=console, transient=True):
                write_shard(
                    folder, {prompt: encode(prompt).cpu() for prompt in shard}, self.folder.name
                )
        return len(missing)

    def _embedded(self, prompts: list[str]) -> Mapping[str, Tensor] | Embeddings:
        """The embedding (L, D) of each prompt, out of the store, which is first given what it lacks, by one process for all."""
        if self.store is None:
            encode = self._encoder(self.text_pipeline())
            return {prompt: encode(prompt) for prompt in prompts}

        def there() -> Embeddings | None:
            folder = self.embeddings(self.store)
            stored = None if folder is None else Embeddings(folder)
            return (
                stored
                if stored is not None and all(prompt in stored for prompt in prompts)
                else None
            )

        if (stored := there()) is None:
            once(
                self.store / "embeddings",
                lambda: there() is not None,
                lambda: self.embed(prompts, self.store),
            )
            stored = there()
        return stored

    def embeddings(self, store: Path) -> Path | None:
        """The folder of this pipeline's embeddings in a store: see `distill_bench.teachers.texts`."""
        about = [
            self.architecture.PIPELINE,
            self.architecture.TEXT_LENGTH,
            self.architecture.transformer.get("max_text_seq_length"),
        ]
        return embeddings_folder(store, self.folder, about)

    def text_pipeline(self) -> diffusers.DiffusionPipeline:
        """diffusers' pipeline with its tokenizer and text encoder alone."""
        with naming_folder(self.folder / "tokenizer"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder / "tokenizer")
        encoder = load_part(
            getattr(transformers, self.architecture.TEXT_ENCODER), self.folder / "text_encoder"
        )
        encoder = encoder.to(self.device).eval().requires_grad_(False)
        pipeline_class = getattr(diffusers, self.architecture.PIPELINE)
        return pipeline_class(
            tokenizer=tokenizer, text_encoder=encoder, vae=None, transformer=None, scheduler=None
        )

    def _encoder(self, pipeline: diffusers.DiffusionPipeline) -> Callable[[str], Tensor]:
        """What makes the embedding (L, D) of a prompt: of each alone, so that company does not change its bits."""
        length = self.architecture.text_length(pipeline.tokenizer)

        @torch.no_grad()
        def encode(prompt: str) -> Tensor:
            return self.architecture.encode_text(pipeline, [prompt], length)[0].float()

        return encode


def load_texts(
    name: str, device: torch.device, prompts: Path | None = None, store: Path | None = None
) -> TextPipeline:
    """The texts of the teacher `name`, without its networks.

    Raises:
        TeacherError: if there is no such teacher, or its texts are no network's.
    """
    teacher = find_teacher(name)
    if not teacher.has_networks:
        raise TeacherError(f"teacher {name!r} has no text encoder: it takes no embeddings")
    return TextPipeline(teacher.folder, architecture_of(teacher.folder), device, store, prompts)
