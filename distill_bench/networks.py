"""How a run holds the roles' networks: their precision, whole or as adapters of one base, checkpointed, sharded, offloaded."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from distill_bench.adapters import Adapted, activate, active, add_adapter
from distill_bench.architectures import architecture_called
from distill_bench.config import RunConfig
from distill_bench.masters import Masters, cast
from distill_bench.models import Pipeline
from distill_bench.sharding import shard


@dataclass(frozen=True)
class Networks:
    """The networks of a run by role."""

    student: nn.Module
    fake_score: nn.Module | None
    teacher: nn.Module
    # the student's average as a network of its own, where it cannot be laid over the student's
    target: nn.Module | None
    # by role what optimisers, average and checkpoints see: the network itself or its float32 masters
    trained: Mapping[str, nn.Module]


def build(config: RunConfig, pipeline: Pipeline, mesh: DeviceMesh | None = None) -> Networks:
    """The networks of a run, where they begin; what is sharded or offloaded is never whole on a device.

    Args:
        mesh: the processes that share the weights of each role, where the run is sharded.
    """

    def placed(net: nn.Module) -> nn.Module:
        return in_dtype(net, config).to(pipeline.device)

    has_fake_score, low = config.fake_score_updates is not None, config.weights == "bfloat16"
    teacher = cast(pipeline.transformer, torch.bfloat16) if low else pipeline.transformer
    if config.adapter is not None:
        base = placed(teacher)
        roles = ["student", "target", *(["fake_score"] if has_fake_score else [])]
        views = {role: add_adapter(base, role, config.adapter, config.seed) for role in roles}
        views["target"].load_state_dict(views["student"].state_dict())
        networks = Networks(
            views["student"],
            views.get("fake_score"),
            Adapted(base, None),
            views["target"],
            {role: views[role] for role in roles if role != "target"},
        )
    elif mesh is not None:
        compute = torch.bfloat16 if low else None
        nets = {"student": pipeline.student, "target": pipeline.student}
        if has_fake_score:
            nets["fake_score"] = pipeline.fake_score
        if config.ema is None:
            del nets["target"]
        teacher = shard(in_dtype(teacher, config), mesh, compute, config.teacher_offload)
        sharded = {
            role: shard(in_dtype(net(), config), mesh, compute) for role, net in nets.items()
        }
        networks = Networks(
            sharded["student"],
            sharded.get("fake_score"),
            teacher,
            sharded.get("target"),
            {role: net for role, net in sharded.items() if role != "target"},
        )
        if networks.target is not None:
            networks.target.requires_grad_(False)
    else:
        nets = {"student": placed(pipeline.student())}
        if has_fake_score:
            nets["fake_score"] = placed(pipeline.fake_score())
        trained = {role: Masters(net) for role, net in nets.items()} if low else nets
        teacher = (
            offloaded(in_dtype(teacher, config), pipeline.device)
            if config.teacher_offload
            else placed(teacher)
        )
        networks = Networks(nets["student"], nets.get("fake_score"), teacher, None, trained)
    if config.gradient_checkpointing:
        for net in (networks.student, networks.fake_score, networks.teacher):
            if net is not None:
                getattr(net, "net", net).enable_gradient_checkpointing(checkpointed)
    return networks


def in_dtype(net: nn.Module, config: RunConfig) -> nn.Module:
    """The network in the run's precision, where that is a higher one than networks are loaded in."""
    return net.double() if config.precision == "float64" else net


def checkpointed(block: nn.Module, *inputs: Tensor) -> Tensor:
    """The block's output, of which a backward computes the inside again, as it was: roles may share the block.

    Between the forward and its backward another role's adapter may have become the active one, and another phase begun.
    """
    then = _AsItWas(block)
    return checkpoint(
        block,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (contextlib.nullcontext(), then),
    )


class _AsItWas:
    """A context in which a block has the active adapters and trainable weights that it had when this was made."""

    def __init__(self, block: nn.Module) -> None:
        self.block, self.then = block, self._state(block)

    def __enter__(self) -> None:
        self.now = self._state(self.block)
        self._restore(*self.then)

    def __exit__(self, *_: object) -> None:
        self._restore(*self.now)

    @staticmethod
    def _state(block: nn.Module) -> tuple[list[str], list[bool]]:
        return active(block), [p.requires_grad for p in block.parameters()]

    def _restore(self, adapters: list[str], flags: list[bool]) -> None:
        activate(self.block, adapters)
        for parameter, flag in zip(self.block.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)


class Streamed(nn.Module):
    """A block whose weights lie in host memory: each forward has a copy on the device, for as long as it or its graph lives."""

    def __init__(self, block: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.block, self._device = block, device
        if device.type == "cuda":
            for parameter in block.parameters():
                parameter.data = parameter.data.pin_memory()

    def forward(self, *inputs: Tensor, **named: object) -> object:
        held = [*self.block.named_parameters(), *self.block.named_buffers()]
        there = {
            name: tensor.to(self._device, non_blocking=True, copy=True) for name, tensor in held
        }
        return functional_call(self.block, there, inputs, named)


def offloaded(net: nn.Module, device: torch.device) -> nn.Module:
    """The frozen network with its blocks in host memory, where a forward fetches them one by one; the rest is on the device."""
    blocks = architecture_called(net).blocks(net)
    held = list(blocks)
    for index in range(len(held)):
        blocks[index] = nn.Identity()
    net.to(device)
    for index, block in enumerate(held):
        blocks[index] = Streamed(block, device)
    return net


def in_host_memory(net: nn.Module) -> nn.Module:
    """The network as it was loaded, whether it was on a device or `offloaded`."""
    for part in list(net.modules()):
        for name, child in part.named_children():
            if isinstance(child, Streamed):
                setattr(part, name, child.block)
    return net.to("cpu")
