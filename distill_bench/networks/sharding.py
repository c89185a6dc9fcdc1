"""Networks whose weights the processes of a run share (FSDP2), and tensors of which each process may hold a part.

FSDP averages gradients itself, in each backward. Weights are gathered by block for a forward or backward and dropped after it,
the root's as well: what averages or saves weights between passes must find shards. Traps: a forward that a hook stops by an
exception must still end as one (`Reached`); a moving average cannot be laid over gathered weights (it is a network of its own);
of weights gathered in bfloat16 those that unsharded networks keep in float32 are to be named one by one.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from distill_bench.networks.precision import kept_in_float32
from distill_bench.teachers.architectures import architecture_called


class Reached(Exception):
    """The block whose output was wanted has run: the forward behind it is not."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens = tokens


def all_processes(device: torch.device) -> DeviceMesh:
    """One line of all processes of the run."""
    return init_device_mesh(device.type, (torch.distributed.get_world_size(),))


def shard(
    net: nn.Module, mesh: DeviceMesh, compute: torch.dtype | None = None, offload: bool = False
) -> nn.Module:
    """Shard a network in place, block by block.

    Args:
        compute: what weights are gathered and used in, but for those that stay in float32; None is as they are. The shards are as
            they are: the masters of what is trained.
        offload: shards lie in host memory between their uses.

    Raises:
        ValueError: for `compute` with a torch that would round what stays in float32.
    """
    forward = net.forward

    def stoppable(*inputs: object, **options: object) -> object:
        try:
            return forward(*inputs, **options)
        except Reached as reached:
            return (reached.tokens,)

    net.forward = (
        stoppable  # inside FSDP's hooks: they see an output, and gather weights for its backward
    )
    warnings.filterwarnings(
        "ignore", message="FSDP2-wrapped module .* returned a view tensor"
    )  # nothing here is in place on it
    precision = {
        "param_dtype": compute,
        "reduce_dtype": compute and torch.float32,
        "cast_forward_inputs": False,
    }
    kept = kept_in_float32(net) if compute else set()
    if kept:
        if not hasattr(MixedPrecisionPolicy, "param_dtype_override_fn"):
            raise ValueError(
                f"sharding with weights: bfloat16 needs torch 2.15, here is {torch.__version__}"
            )
        precision["param_dtype_override_fn"] = lambda parameter: (
            parameter.dtype if parameter in kept else None
        )
    policies = {
        "mp_policy": MixedPrecisionPolicy(**precision),
        "offload_policy": CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
        if offload
        else OffloadPolicy(),
    }
    for block in architecture_called(net).blocks(net):
        fully_shard(block, mesh=mesh, reshard_after_forward=True, **policies)
    return fully_shard(net, mesh=mesh, reshard_after_forward=True, **policies)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of the tensor."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, in host memory where it was sharded: then every process must ask for it."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def shard_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, sharded as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def clip_gradients(parameters: Sequence[Tensor], largest: float) -> float:
    """Scale the gradients down to a norm of `largest` together, and return what the norm was."""
    sharded, replicated = (
        [p for p in parameters if is_sharded(p)],
        [p for p in parameters if not is_sharded(p)],
    )
    if not sharded:
        return float(nn.utils.clip_grad_norm_(parameters, largest))
    norms = [
        whole(nn.utils.get_total_norm([p.grad for p in group]))
        for group in (sharded, replicated)
        if group
    ]
    norm = torch.stack([n.cpu().double() for n in norms]).norm()
    for group in (sharded, replicated):
        nn.utils.clip_grads_with_norm_(
            group, largest, norm.to(local(parameters[0]).device, torch.float32)
        )
    return float(norm)
