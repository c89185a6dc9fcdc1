"""What a run will need, before anything of it exists: peak memory by role and the step's FLOPs, from the teacher's configs alone.

The trainer's own phases are rehearsed on fake tensors (shapes without data), and what is alive at their worst moment is counted:
the method's code, the run's settings and the architecture decide, no formula of ours. `distill-bench cost SWEEP --memory`
shows it; a training on a GPU that has less ends before its first step.

Not counted: what `compile` saves, what a kernel holds inside, the allocator's rounding and fragments, the text encoder (gone by
the first step), and the teacher's samples, where a method needs such data. Drawing a run's clips is rehearsed likewise:
`sampling_peak`.
"""

import contextlib
import dataclasses
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import diffusers
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill_bench.architectures import OWN_AUTOENCODER, architecture_called, architecture_of
from distill_bench.autoencoder import FrameAutoencoder
from distill_bench.config import RunConfig, method_of
from distill_bench.cost import PASSES, declared
from distill_bench.draws import Draws
from distill_bench.extras import needs_of
from distill_bench.masters import Masters
from distill_bench.method import Batch, Loss
from distill_bench.models import Pipeline
from distill_bench.networks import Streamed
from distill_bench.sample import Latents, Sampler, drawn_together
from distill_bench.teacher import TeacherError, is_gaussian, read_config, teacher_folder
from distill_bench.texts import Texts
from distill_bench.train import Trainer, _trained_in

FEW_FRAMES = (
    3,
    5,
)  # latent ones; the first of a clip is one of its own kind, and CogVideoX decodes two at a time
MOMENTS = 2  # of AdamW, each as large as what it moves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations make and that are alive; `peaks` are the most at once in each stage."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peaks = 0, [0]
        self._alive: dict[int, int] = {}

    def mark(self) -> None:
        """Begin a stage."""
        self.peaks.append(self.now)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self._see(value.untyped_storage(), made=False)
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._see(value.untyped_storage(), made=True)
        return result

    def _see(self, storage: torch.UntypedStorage, made: bool) -> None:
        key = storage._cdata
        if key not in self._alive:
            size = self._alive[key] = (
                storage.nbytes() if made else 0
            )  # what was there before is none of ours
            self.now += size
            self.peaks[-1] = max(self.peaks[-1], self.now)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._alive.pop(key, 0)


@dataclass(frozen=True)
class Prediction:
    """Bytes on one device, and FLOPs of a forward of one sample, by role."""

    weights: Mapping[str, int]  # by role, as they are held
    masters: Mapping[str, int]
    gradients: Mapping[str, int]
    moments: Mapping[str, int]
    ema: int
    other: int  # autoencoder, null text, heads with their moments
    # by the role that a phase trains: the most at once that is not held, in each stage of the phase (from pass to pass)
    stages: Mapping[str, tuple[int, ...]]
    flops: Mapping[str, float]
    held_back: int = 0  # weights in host memory: the blocks of an offloaded teacher

    @property
    def held(self) -> int:
        """What is there all the time."""
        parts = (self.weights, self.masters, self.moments)
        return sum(sum(part.values()) for part in parts) + self.ema + self.other

    @property
    def activations(self) -> dict[str, int]:
        """By the role that a phase trains: the most at once beside what is held and its gradients."""
        return {
            role: max(0, max(stages) - self.gradients[role]) for role, stages in self.stages.items()
        }

    @property
    def peak(self) -> int:
        """The most at once: in one of the two phases."""
        return self.held + max(
            self.gradients[role] + size for role, size in self.activations.items()
        )


def predicted(config: RunConfig, processes: int = 1) -> Prediction:
    """The memory of each of `processes` that train a run together, and the FLOPs of a step.

    Raises:
        TeacherError: for a teacher that is no pipeline of networks.
    """
    folder = teacher_folder(config.teacher)
    if is_gaussian(folder):
        raise TeacherError(
            f"teacher {config.teacher!r} has no networks whose memory could be asked for"
        )
    share = processes if config.sharding else 1
    config = config.model_copy(
        update={"sharding": False, "compile": False, "trackers": (), "threads": None}
    )
    if (
        config.accumulation > 2 and config.reuse_rollout != "graph"
    ):  # after the second, micro-batches are as the second
        batch = config.batch_size // config.accumulation * 2
        config = config.model_copy(update={"accumulation": 2, "batch_size": batch})
    student_folder = folder if config.student is None else teacher_folder(config.student)
    blocks = tuple(
        architecture_of(each).transformer["num_layers"] for each in (folder, student_folder)
    )
    # blocks are alike: with all roles in proportion every number is linear in how many there are, each stage by itself
    whole = math.gcd(*blocks)
    unit = [each // whole for each in blocks]
    few = math.ceil(2 / min(unit))
    if 2 * few >= whole:
        found, in_flight = rehearsed(config, blocks, processes)
    else:
        (low, in_flight), (high, _) = (
            rehearsed(config, tuple(n * each for each in unit), processes) for n in (few, 2 * few)
        )
        found = _linear(low, high, (whole - few) / few)
    return found if share == 1 else _shared(found, share, in_flight)


def rehearsed(config: RunConfig, blocks: tuple[int, int], processes: int) -> tuple[Prediction, int]:
    """The prediction for networks of so many blocks (the teacher's, the student's), and what sharding would add to a phase."""
    with _fake():
        rehearsal = Rehearsal(config, blocks, processes)
        return rehearsal.prediction(), rehearsal.in_flight()


def sampling_peak(config: RunConfig) -> int:
    """The most bytes at once on one device while a run's clips or their references are drawn and decoded."""
    with _fake():
        return RehearsedSampler(config).peak()


def step_flops(found: Prediction, config: RunConfig) -> tuple[float, float]:
    """FLOPs of one student update with its fake-score updates, over the whole batch; and those of checkpointing on top.

    The first is what the ledger counts; a backward of a checkpointed network runs its forward again.
    """
    needed = again = 0.0
    for role, row in declared(config).items():
        each = found.flops[role] * config.batch_size
        needed += sum(PASSES[kind] * n for kind, n in row.items()) * each
        again += (row["input_backward"] + row["full_backward"]) * each
    return needed, again if config.gradient_checkpointing else 0.0


def too_large(found: Prediction, available: int, config: RunConfig) -> str | None:
    """Why a training does not fit a device of `available` bytes, in one line with what to set, or None."""
    settings = {
        "precision: bfloat16 with weights: bfloat16": config.weights == "bfloat16",
        "gradient_checkpointing: true": config.gradient_checkpointing,
        "guidance_forwards: sequential": config.guidance_forwards == "sequential"
        or config.guidance_scale == 1,
        "adapter: {rank: 32}": config.adapter is not None or method_of(config).mixes_weights,
        "teacher_offload: true": config.teacher_offload or config.adapter is not None,
        "sharding: true with more processes": config.sharding or config.adapter is not None,
        f"accumulation above {config.accumulation}": config.accumulation == config.batch_size,
    }
    what = f"the run needs {gib(found.peak)} ({gib(found.held)} held, the rest gradients and activations)"
    return None if found.peak <= available else _too_little(what, available, settings)


def too_large_to_sample(peak: int, available: int, config: RunConfig) -> str | None:
    """Why the clips of a run or their references cannot be drawn on a device of `available` bytes, or None."""
    settings = {
        "protocol.precision: bfloat16": config.protocol.precision == "bfloat16",
        "teacher_offload: true": config.teacher_offload or config.adapter is not None,
        "guidance_forwards: sequential": config.guidance_forwards == "sequential"
        or config.protocol.teacher_guidance == 1,
    }
    return (
        None
        if peak <= available
        else _too_little(f"sampling needs {gib(peak)}", available, settings)
    )


def _too_little(what: str, available: int, settings: Mapping[str, bool]) -> str:
    left = [setting for setting, there in settings.items() if not there]
    return (
        f"too little memory: {what} on a device of {gib(available)}; set {', or '.join(left) or 'smaller clips'} "
        "(distill-bench cost SWEEP --memory)"
    )


def gib(size: float) -> str:
    """`12.3 GiB`."""
    return f"{size / 2**30:.3g} GiB"


# --- the rehearsal ---


@dataclass(frozen=True, kw_only=True)
class Outline(Pipeline):
    """A pipeline without weights, from the configs in its folder."""

    layers: int | None = None  # of the student; None: as many as it has

    def student(self) -> nn.Module:
        return _transformer(self.student_folder, self.layers)

    fake_score = student

    def encode_text(self, prompts: list[str]) -> Tensor:
        config = read_config(self.folder / "tokenizer", "tokenizer_config.json")
        length = self.architecture.text_length(
            SimpleNamespace(model_max_length=config.get("model_max_length", math.inf))
        )
        return torch.empty(
            len(prompts), int(length), self.architecture.transformer[self.architecture.TEXT_WIDTH]
        )

    def texts(self, prompts: list[str], dtype: torch.dtype = torch.float32) -> Texts:
        (any_of_them,) = self.encode_text([""])
        return Texts(prompts, dict.fromkeys([*prompts, ""], any_of_them), self.device, dtype)

    def prompts(self) -> list[str]:
        return (
            super().prompts()
            if self.prompts_file or (self.folder / "prompts.txt").is_file()
            else ["one"]
        )


def outline(config: RunConfig, layers: tuple[int | None, int | None] = (None, None)) -> Outline:
    """The networks of a run's pipelines by their configs; under FakeTensorMode without data.

    Args:
        layers: blocks of the teacher and of the student; None: as many as they have.
    """
    folder = teacher_folder(config.teacher)
    architecture, vae = architecture_of(folder), None
    if architecture.vae:
        name = architecture.vae["_class_name"]
        kind = FrameAutoencoder if name == OWN_AUTOENCODER else getattr(diffusers, name)
        vae = kind.from_config(architecture.vae).eval().requires_grad_(False)
        if name != OWN_AUTOENCODER:
            architecture.at_size(vae)
    return Outline(
        folder,
        architecture,
        torch.device("cpu"),
        transformer=_transformer(folder, layers[0]).requires_grad_(False),
        vae=vae,
        student_folder=folder if config.student is None else teacher_folder(config.student),
        prompts_file=None if config.prompts is None else Path(config.prompts),
        layers=layers[1],
    )


def _transformer(folder: Path, layers: int | None = None) -> nn.Module:
    architecture = architecture_of(folder)
    config = dict(architecture.transformer) | ({} if layers is None else {"num_layers": layers})
    net = getattr(diffusers, config["_class_name"]).from_config(config).eval()
    net.architecture = architecture
    return net


class Rehearsal(Trainer):
    """A trainer on fake tensors: its phases run forwards and backwards, and no optimiser steps."""

    def __init__(self, config: RunConfig, layers: tuple[int, int], processes: int) -> None:
        self.layers, self.processes, self.live = layers, processes, LiveBytes()
        self.stages: dict[str, tuple[int, ...]] = {}
        super().__init__(Path("rehearsal"), config)

    def _place(self) -> tuple[int, int, torch.device]:
        return self.processes, 0, torch.device("cpu")

    def _pipeline(self) -> Pipeline:
        self.outline = outline(self.config, self.layers)
        return self.outline

    def _extras(self, pipeline: Pipeline) -> dict[str, Callable[[Draws], dict[str, Tensor]]]:
        text = pipeline.encode_text([""])

        def rows(draws: Draws) -> dict[str, Tensor]:
            n = len(draws.indices)
            x0, noise = (torch.empty(n, *self.latent_shape, dtype=self.dtype) for _ in range(2))
            return {"x0": x0, "noise": noise, "text": text.expand(n, -1, -1).to(self.dtype)}

        return dict.fromkeys(needs_of(self.config), rows)

    def _batch_of(self, draws: Draws) -> Batch:
        return super()._batch_of(
            FakeDraws(**{f.name: getattr(draws, f.name) for f in dataclasses.fields(draws)})
        )

    def _exit_step(self, batch: Batch) -> int:
        return 0  # the steps before the exit keep nothing

    def _update(self, role: str, phase: str, loss_of: Callable[[Batch, int], Loss]) -> None:
        count, self.live.peaks = self.ledger.add, [self.live.now]

        def add(*passed: object) -> None:
            self.live.mark()
            count(*passed)

        self.ledger.add = add
        self._backward(role, phase, loss_of)
        self.ledger.add, self.stages[role] = count, tuple(self.live.peaks)
        for name, optimiser in self.optimisers.items():
            if _trained_in(role, name):
                optimiser.zero_grad(set_to_none=True)

    def prediction(self) -> Prediction:
        """Run both phases and add up."""
        config = self.config
        with self.live:
            samples = self.update_student()
            if self.fake_score is not None:
                self.update_fake_score(0, samples if config.reuse_rollout else None)
            del samples
        base = {"teacher": self.nets.unguided_teacher.net}
        nets = {"student": self.student, "fake_score": self.fake_score} | base
        weights = {role: _on_device(net) for role, net in nets.items() if net is not None}
        roles = {role: net for role, net in self.trained.items() if role != "modules"}
        trained = {role: _bytes(net.parameters()) for role, net in roles.items()}
        masters = {
            role: trained[role]
            - _bytes(p for p in net.parameters() if any(p is q for q in nets[role].parameters()))
            if isinstance(net, Masters)
            else 0
            for role, net in roles.items()
        }
        heads = _bytes(self.modules.parameters())
        vae = self.outline.vae
        other = (
            _bytes([self.texts.null_text])
            + (0 if vae is None else _bytes(vae.parameters()))
            + (1 + MOMENTS) * heads
        )
        gradients = {
            "student": trained["student"],
            "fake_score": trained.get("fake_score", 0) + heads,
        }
        flops = {
            role: self.ledger.flops.get(role, self.ledger.flops["student"])
            for role in ("student", "fake_score", "teacher")
        }
        flops["target"] = flops["student"]
        return Prediction(
            weights=weights,
            masters=masters,
            gradients={role: gradients[role] for role in self.stages},
            moments={role: MOMENTS * size for role, size in trained.items()},
            ema=_bytes(self.ema.values()),
            other=other,
            stages=self.stages,
            flops=flops,
            held_back=_held_back(base["teacher"]),
        )

    def in_flight(self) -> int:
        """Bytes of what FSDP has whole at once: of a role two blocks, one at work and the next, and of one that is trained the
        gradients of one, and these again in float32 where they are reduced.
        """
        most = 0
        for role, net in (("teacher", self.nets.unguided_teacher.net), *self.roles.items()):
            if role == "modules":
                continue
            blocks = [list(block.parameters()) for block in architecture_called(net).blocks(net)]
            inside = {parameter for block in blocks for parameter in block}
            parts = [
                *blocks,
                [parameter for parameter in net.parameters() if parameter not in inside],
            ]
            size, wide = (
                max(map(of, parts))
                for of in (_bytes, lambda part: sum(4 * p.numel() for p in part))
            )
            most = max(most, 2 * size if role == "teacher" else 3 * size + max(size, wide))
        return most


class RehearsedSampler(Sampler):
    """A sampler on fake tensors: what it would draw together is drawn once, and what is alive meanwhile counted."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.device, self.dtype = (
            config,
            torch.device("cpu"),
            getattr(torch, config.protocol.precision),
        )
        self.pipeline = outline(config)
        self.shape = self.pipeline.latent_shape(config.frames, config.height, config.width)
        self.seeds = list(range(min(drawn_together(config), config.protocol.clips)))
        self.texts = self.pipeline.texts([""] * len(self.seeds))

    def peak(self) -> int:
        """The most bytes at once on the device: of the student's rows or of the teacher's."""
        vae, decoding = self.pipeline.vae, self._decoding()
        beside = _bytes([self.texts.null_text]) + (0 if vae is None else _bytes(vae.parameters()))
        student = self.placed(self.pipeline.student())
        drawing = {student: self.student(student), self._teacher.net: self.teacher(1, self.seeds)}
        return beside + max(
            _on_device(net) + max(passes, decoding) for net, passes in drawing.items()
        )

    def _clips(self, seeds: list[int], latents: Latents) -> int:
        return self._most(lambda: latents(self._noises(seeds), self.texts.rows(range(len(seeds)))))

    def _decoding(self) -> int:
        """Of many latent frames by few: beyond these each needs as much more."""
        channels, frames, *size = self.shape

        def at(some: int) -> int:
            latents = torch.empty(len(self.seeds), channels, some, *size)
            return self._most(lambda: self.pipeline.decode(latents))

        few, more = FEW_FRAMES
        return (
            at(frames)
            if frames <= more
            else at(few) + (at(more) - at(few)) * (frames - few) // (more - few)
        )

    @torch.no_grad()
    def _most(self, do: Callable[[], object]) -> int:
        with LiveBytes() as live:
            do()
        return max(live.peaks)

    def _noise(self, seed: int, step: int) -> Tensor:
        return torch.empty(*self.shape)


@dataclass(frozen=True)
class FakeDraws(Draws):
    """Draws of the right shapes."""

    generator: None = field(default=None)

    def noise(self, purpose: str, shape: Iterable[int]) -> Tensor:
        return torch.empty(len(self.indices), *shape, dtype=self.dtype)

    def uniform(self, purpose: str) -> Tensor:
        return torch.empty(len(self.indices), dtype=self.dtype)

    def integers(self, purpose: str, high: int) -> list[int]:
        return [0] * len(self.indices)

    def shared_integer(self, purpose: str, high: int) -> int:
        return 0


@contextlib.contextmanager
def _fake() -> Iterator[None]:
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(nn.Module, "_apply", _apply),
        mock.patch.object(functional, "scaled_dot_product_attention", _fused_attention),
    ):
        yield


def _apply(net: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module.to` and its like on fake tensors, which torch's own cannot swap where something refers to them."""
    for tensor in [*net.parameters(recurse), *net.buffers(recurse)]:
        tensor.data = function(tensor.data)
    return net


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention that never holds its matrix, as real devices run it; fake tensors would be given the plain one."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of tensors, each once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def _held_back(net: nn.Module) -> int:
    """Bytes of the blocks that a network has in host memory."""
    streamed = [block for block in net.modules() if isinstance(block, Streamed)]
    return sum(_bytes(block.parameters()) + _bytes(block.buffers()) for block in streamed)


def _on_device(net: nn.Module) -> int:
    return _bytes(net.parameters()) + _bytes(net.buffers()) - _held_back(net)


def _linear(low: Prediction, high: Prediction, times: float) -> Prediction:
    """`low`, and `times` as much as `high` has more."""

    def at(few: object, more: object) -> object:
        if isinstance(few, Mapping):
            return {key: at(few[key], more[key]) for key in few}
        if isinstance(few, tuple):
            return tuple(map(at, few, more))
        return type(few)(few + (more - few) * times)

    fields = (f.name for f in dataclasses.fields(Prediction))
    return Prediction(**{name: at(getattr(low, name), getattr(high, name)) for name in fields})


def _shared(found: Prediction, share: int, in_flight: int) -> Prediction:
    """The prediction for processes that share each role's weights, and have so many bytes of them whole in a phase."""

    def part(sizes: Mapping[str, int]) -> dict[str, int]:
        return {role: math.ceil(size / share) for role, size in sizes.items()}

    gradients = part(found.gradients)
    # shards of what has masters are these, and of the network beside them what is its own master: no bfloat16 is held
    own = {
        role: found.moments[role] // MOMENTS - size for role, size in found.masters.items() if size
    }
    return dataclasses.replace(
        found,
        weights=part({**found.weights, **own}),
        masters=part(found.masters),
        gradients=gradients,
        moments=part(found.moments),
        ema=math.ceil(found.ema / share),
        stages={
            role: tuple(
                size - found.gradients[role] + gradients[role] + in_flight for size in stages
            )
            for role, stages in found.stages.items()
        },
    )
