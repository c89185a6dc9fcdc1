"""Pipelines and their networks: everything that knows diffusers lies here and in `architectures`, and ends in a `Denoiser`.

A teacher is a diffusers pipeline folder (`transformer/`, `scheduler/`, `text_encoder/`, `tokenizer/`, optional `vae/`), local
or by hub name; `mini-wan` is the one that ships with the package. Latent axes are always B, C, T, H, W.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from distill_bench import shapes
from distill_bench.adapters import Adapted
from distill_bench.architectures import (
    OWN_AUTOENCODER,
    Architecture,
    Call,
    architecture_called,
    architecture_of,
)
from distill_bench.autoencoder import FrameAutoencoder
from distill_bench.config import RunConfig
from distill_bench.cost import Ledger
from distill_bench.gaussian import GaussianPipeline
from distill_bench.noise import velocity_to_x0
from distill_bench.sharding import Reached
from distill_bench.store import first_line, once
from distill_bench.teacher import (
    TeacherError,
    autoencoder_of,
    content_hash,
    is_gaussian,
    teacher_folder,
)
from distill_bench.texts import (
    Embeddings,
    Texts,
    embeddings_folder,
    has_text_encoder,
    prompts_hash,
    read_prompts,
    write_shard,
)

SHARD = 128  # embeddings a file

if not sys.stderr.isatty():  # a job's log has lines, not bars
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


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
            console = Console(
                file=sys.stderr, quiet=not sys.stderr.isatty() or place_of_launch()[0] > 0
            )
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
        """The folder of this pipeline's embeddings in a store: see `distill_bench.texts`."""
        about = [
            self.architecture.PIPELINE,
            self.architecture.TEXT_LENGTH,
            self.architecture.transformer.get("max_text_seq_length"),
        ]
        return embeddings_folder(store, self.folder, about)

    def text_pipeline(self) -> diffusers.DiffusionPipeline:
        """diffusers' pipeline with its tokenizer and text encoder alone."""
        with _naming(self.folder / "tokenizer"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder / "tokenizer")
        encoder = _loaded(
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


@dataclass(frozen=True, kw_only=True)
class Pipeline(TextPipeline):
    """The parts of a diffusers pipeline folder that are needed to train and to sample."""

    transformer: nn.Module
    vae: nn.Module | None
    student_folder: (
        Path  # of the pipeline whose transformer the student and the fake score begin from
    )

    @property
    def fps(self) -> float | None:
        """Frames a second of the teacher's clips, where it is known."""
        return self.architecture.fps

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents of a clip; without an autoencoder latents are pixels."""
        return self.architecture.latent_shape(frames, height, width)

    def draw(self, shape: tuple[int, ...], step: int, draws: torch.Generator) -> Tensor:
        """Noise (C, T, H, W) for a step of one clip."""
        return self.architecture.draw(shape, step, draws)

    def student(self) -> nn.Module:
        """A trainable float32 network, where the student begins: the teacher's, or that of the run's own folder."""
        return load_transformer(self.student_folder)

    def fake_score(self) -> nn.Module:
        """A trainable float32 network, where the fake score begins: as the student's."""
        return load_transformer(self.student_folder)

    def decode_video(self, latents: Tensor) -> Tensor:
        """Video (B, 3, T, H, W), about [-1, 1], of latents (B, C, T, H, W); differentiable."""
        if self.vae is None:
            return latents
        if isinstance(self.vae, FrameAutoencoder):
            return self.vae.decode(latents)
        return self.architecture.decode(self.vae, latents)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Frames uint8 (B, T, 3, H, W) of latents (B, C, T, H, W)."""
        frames = (
            ((self.decode_video(latents).float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        )
        return frames.transpose(1, 2).cpu()

    @torch.no_grad()
    def encode(self, frames: np.ndarray) -> Tensor:
        """Latents (B, C, T, H, W) of frames uint8 (B, T, 3, H, W)."""
        video = torch.from_numpy(frames).to(self.device).float().transpose(1, 2) / 127.5 - 1
        if self.vae is None:
            return video
        if isinstance(self.vae, FrameAutoencoder):
            return self.vae.encode(video)
        return self.architecture.encode(self.vae, video)

    def data(self, prompts: list[str], keys: list[int]) -> Tensor | None:
        """Latents (B, C, T, H, W) of real clips for the prompts, where their domain can be rendered; else None."""
        try:
            attributes = [shapes.parse(prompt) for prompt in prompts]
        except ValueError:
            return None
        return self.encode(
            np.stack([shapes.render(a, key) for a, key in zip(attributes, keys, strict=True)])
        )

    def flops(self, net: nn.Module, latent_shape: tuple[int, ...], text: Tensor) -> float:
        """FLOPs of one forward of one sample, for the weight of a role in the ledger."""
        return forward_flops(net, latent_shape, text)

    def exact_fake_score(self, *_: object) -> None:
        """None: the student's density is not known in closed form."""

    def facts(self, *_: object) -> dict[str, np.ndarray]:
        """What is known exactly of the student's clips beside their frames: nothing."""
        return {}


def place_of_launch() -> tuple[int, int, torch.device]:
    """This process among those that torchrun or accelerate started for one task, how many they are, and its device."""
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), device


def pipeline_of(
    config: RunConfig, device: torch.device, store: Path | None = None
) -> Pipeline | GaussianPipeline:
    """The pipeline of a run: its teacher, with what the run says of students and prompts, and the store's embeddings.

    Raises:
        TeacherError: if one of them is not what it was when the run was resolved.
    """
    prompts = None if config.prompts is None else Path(config.prompts)
    check_content(config, prompts)
    if store is not None and not is_gaussian(teacher_folder(config.teacher)):
        texts = load_texts(config.teacher, device, prompts, store)
        texts.texts(texts.prompts())  # a text encoder is gone before the first network comes
    return load_pipeline(config.teacher, device, config.student, prompts, store)


def check_content(config: RunConfig, prompts: Path | None = None) -> None:
    """TeacherError where teacher, student or prompts are not what they were when the run was resolved."""
    found = {"teacher": content_hash(teacher_folder(config.teacher))}
    if config.student is not None:
        found["student"] = content_hash(teacher_folder(config.student) / "transformer")
    if prompts is not None:
        found["prompts"] = prompts_hash(prompts)
    for key, content in found.items():
        recorded = getattr(config, f"{key}_hash")
        if recorded and content != recorded:
            raise TeacherError(
                f"{key} {getattr(config, key)} is not what the run was resolved with: its content is {content}, run.yaml has "
                f"{recorded}; put the files back, or start the sweep again, for a run of its own"
            )


def load_pipeline(
    name: str,
    device: torch.device,
    student: str | None = None,
    prompts: Path | None = None,
    store: Path | None = None,
) -> Pipeline | GaussianPipeline:
    """The teacher `name` in float32, frozen; its students begin from the folder `student`, where it is given.

    Its transformer is in host memory, for whoever runs it to place: it may be sharded, offloaded, or not needed at all.
    """
    folder = teacher_folder(name)
    if is_gaussian(folder):
        return GaussianPipeline.load(folder, device)
    architecture = architecture_of(folder)
    transformer = load_transformer(folder).eval().requires_grad_(False)
    vae = load_autoencoder(folder, architecture)
    if vae is not None:
        vae = vae.to(device).eval().requires_grad_(False)
    begin = teacher_folder(student) if student else folder
    return Pipeline(
        folder,
        architecture,
        device,
        store,
        prompts,
        transformer=transformer,
        vae=vae,
        student_folder=begin,
    )


def load_texts(
    name: str, device: torch.device, prompts: Path | None = None, store: Path | None = None
) -> TextPipeline:
    """The texts of the teacher `name`, without its networks.

    Raises:
        TeacherError: if there is no such teacher, or its texts are no network's.
    """
    folder = teacher_folder(name)
    if is_gaussian(folder):
        raise TeacherError(f"teacher {name!r} has no text encoder: it takes no embeddings")
    return TextPipeline(folder, architecture_of(folder), device, store, prompts)


def load_transformer(folder: Path) -> nn.Module:
    """A trainable float32 copy of the pipeline's transformer, which knows the architecture that calls it."""
    architecture = architecture_of(folder)
    net = _loaded(
        getattr(diffusers, architecture.transformer["_class_name"]),
        folder / "transformer",
        every=True,
    ).eval()
    net.architecture = architecture
    return net


def load_autoencoder(folder: Path, architecture: Architecture) -> nn.Module | None:
    """The pipeline's autoencoder in float32, set to take clips of any size; None where it has none.

    Raises:
        TeacherError: if it is another architecture's.
    """
    name = autoencoder_of(architecture)
    if name is None:
        return None
    if name == OWN_AUTOENCODER:
        return _loaded(FrameAutoencoder, folder / "vae")
    vae = _loaded(getattr(diffusers, name), folder / "vae")
    architecture.at_size(vae)
    return vae


def _loaded(
    kind: type, folder: Path, dtype: torch.dtype = torch.float32, every: bool = False
) -> nn.Module:
    """A part of a pipeline with its weights, all of them.

    Args:
        every: whether each weight of the files must have its place; those of text encoders hold copies and decoders.

    Raises:
        TeacherError: if they cannot be read or some are missing: the libraries would draw them at random and warn.
    """
    # of the two libraries one raises what weight has another shape, the other advice
    of_text = issubclass(kind, transformers.PreTrainedModel)
    options = (
        {"dtype": dtype, "ignore_mismatched_sizes": True} if of_text else {"torch_dtype": dtype}
    )
    with _naming(folder):
        part, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    wrong = [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]
    if wrong:
        raise TeacherError(
            f"{folder}: {len(wrong)} weights are missing or of another shape, for instance {wrong[0]}"
        )
    over = sorted(info["unexpected_keys"]) if every else []
    if over:
        raise TeacherError(
            f"{folder}: its config.json has no place for {len(over)} of its weights, for instance {over[0]}"
        )
    return part


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """What the libraries raise inside is a TeacherError of one line that names the folder."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        said = first_line(error).partition(". If you want to")[
            0
        ]  # behind it is advice on their arguments
        raise TeacherError(
            f"cannot load {folder}: {said.removeprefix('Cannot load  because ')}"
        ) from error


class Denoiser:
    """A role's network as clean prediction, (x_t, sigma, text) -> x0_hat; counts its passes in the ledger.

    With `weights` the network runs with those instead of its own (a moving average, without a second copy).
    """

    def __init__(
        self,
        net: nn.Module,
        role: str,
        ledger: Ledger,
        autocast: torch.dtype | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.net, self.role, self.ledger, self.autocast, self.weights = (
            net,
            role,
            ledger,
            autocast,
            weights,
        )
        self.architecture = architecture_called(net)

    def __call__(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """x0_hat (B, C, T, H, W) of x_t (B, C, T, H, W) at sigma (B,) in (0, 1] with text (B, L, D)."""
        return velocity_to_x0(self.velocity(x_t, sigma, text), x_t, sigma)

    def velocity(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """noise - x0 (B, C, T, H, W), of which `__call__` makes x0_hat."""
        return self._count(self._forward(x_t, sigma, text), len(x_t)).to(x_t.dtype)

    def features(self, x_t: Tensor, sigma: Tensor, text: Tensor, depth: float) -> Tensor:
        """Tokens (B, N, width) after the share `depth` of the blocks; what lies behind is neither run nor counted."""
        blocks = self.architecture.blocks(self.net)
        last, found = max(1, round(depth * len(blocks))), []

        def reached(_module: nn.Module, _inputs: tuple, output: Any) -> None:
            found.append(self.architecture.tokens(output))
            raise Reached(found[0])

        def call(*inputs: Any, **named: Any) -> Tensor:
            self._call(*inputs, **named)
            raise Reached(
                found[0]
            )  # a sharded network ends as if they were its output (`shard`), which is not to be converted

        handle = blocks[last - 1].register_forward_hook(reached)
        try:
            self._forward(x_t, sigma, text, call)
        except Reached:
            pass
        finally:
            handle.remove()
        return self._count(found[0], len(x_t) * last / len(blocks)).to(x_t.dtype)

    def _forward(
        self, x_t: Tensor, sigma: Tensor, text: Tensor, call: Call | None = None
    ) -> Tensor:
        with torch.autocast(x_t.device.type, self.autocast, enabled=self.autocast is not None):
            return self.architecture.velocity(self.net, call or self._call, x_t, sigma, text)

    def _call(self, *inputs: Any, **named: Any) -> Tensor:
        if self.weights is not None:
            return functional_call(
                self.net, dict(self.weights), inputs, {**named, "return_dict": False}
            )[0]
        return self.net(*inputs, **named, return_dict=False)[0]

    def _count(self, output: Tensor, samples: float) -> Tensor:
        self.ledger.add(self.role, "forward", samples)
        if output.requires_grad:
            output.register_hook(
                lambda _: self.ledger.add(self.role, self._kind_of_backward(), samples)
            )
        return output

    def _kind_of_backward(self) -> str:
        """Asked when a backward runs: of a graph that two phases share each takes its own part.

        One that trains adapters alone computes no gradient of the base's weights, and costs what one to the input does.
        """
        trained = any(p.requires_grad for p in self.net.parameters()) and not isinstance(
            self.net, Adapted
        )
        return "full_backward" if trained else "input_backward"


class Guided:
    """Classifier-free guidance of a denoiser, uncond + guidance_scale * (cond - uncond); 1 is none.

    In one forward of both, or in two one after the other, which need half the memory.
    """

    def __init__(
        self, denoiser: Denoiser, null_text: Tensor, guidance_scale: float, batched: bool = True
    ) -> None:
        self.denoiser, self.null_text, self.guidance_scale, self.batched = (
            denoiser,
            null_text,
            guidance_scale,
            batched,
        )

    def __call__(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        if self.guidance_scale == 1:
            return self.denoiser(x_t, sigma, text)
        null_text = self.null_text.expand_as(text)
        if self.batched:
            both = torch.cat([text, null_text])
            cond, uncond = self.denoiser(
                torch.cat([x_t, x_t]), torch.cat([sigma, sigma]), both
            ).chunk(2)
        else:
            cond, uncond = self.denoiser(x_t, sigma, text), self.denoiser(x_t, sigma, null_text)
        return uncond + self.guidance_scale * (cond - uncond)


def forward_flops(net: nn.Module, latent_shape: tuple[int, ...], text: Tensor) -> float:
    """FLOPs of one forward of one sample."""
    x = torch.zeros(1, *latent_shape, device=text.device, dtype=text.dtype)
    sigma = torch.full((1,), 0.5, device=text.device, dtype=text.dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        architecture_called(net).velocity(
            net, lambda *xs, **named: net(*xs, **named, return_dict=False)[0], x, sigma, text[:1]
        )
    return float(counter.get_total_flops())
