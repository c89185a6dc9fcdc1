"""Shards networks over the ranks of a run (FSDP2), and handles sharded tensors.

FSDP averages gradients over the ranks itself, in each backward. It gathers weights block by block
for a forward or backward and frees them afterwards, the root's too, so code that averages or saves
weights between passes always sees shards. Traps:

- A forward that a hook aborts by an exception must still return normally (`Reached`).
- A moving average cannot replace gathered weights, so it needs a separate network.
- With bfloat16 compute, parameters that must stay float32 have to be excluded one by one
  (`param_dtype_override_fn`).
"""

import warnings
from collections.abc import Callable, Iterable, Sequence

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
from distill_bench.networks.ranks import group_ranks
from distill_bench.teachers.architecture import architecture_called
from distill_bench.teachers.experts import Experts, networks_in


class Reached(Exception):
    """Raised by a hook after the block whose output is needed, to skip the later blocks."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens = tokens


def all_ranks(device: torch.device) -> DeviceMesh:
    """All ranks of the process group as a one-dimensional mesh."""
    return init_device_mesh(device.type, (group_ranks().world,))


def shard(
    net: nn.Module, mesh: DeviceMesh, compute: torch.dtype | None = None, offload: bool = False
) -> nn.Module:
    """Shard a network in place, block by block.

    Args:
        net: a transformer, or experts; the shards keep its dtype, so they are the master weights.
        mesh: ranks that share the weights.
        compute: dtype in which weights are gathered and used, except for those that the network's
            class keeps in float32; None: the dtype of the shards.
        offload: keep the shards in host memory between their uses.

    Raises:
        ValueError: if `compute` is given and the installed torch would round the float32 weights.
    """
    if isinstance(net, Experts):
        for expert in networks_in(net):
            shard(expert, mesh, compute, offload)
        net.mesh = mesh
        return net
    forward = net.forward

    def abortable(*inputs: object, **options: object) -> object:
        try:
            return forward(*inputs, **options)
        except Reached as reached:
            return (reached.tokens,)

    # FSDP's hooks wrap this function: they see a normal output, and gather the weights again for
    # its backward.
    net.forward = abortable
    # FSDP2 warns about in-place changes of views, but nothing here changes an output in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    offload_policy = OffloadPolicy()
    if offload:
        offload_policy = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    policies = {"mp_policy": _precision(net, compute), "offload_policy": offload_policy}
    for block in architecture_called(net).blocks(net):
        fully_shard(block, mesh=mesh, reshard_after_forward=True, **policies)
    return fully_shard(net, mesh=mesh, reshard_after_forward=True, **policies)


def _precision(net: nn.Module, compute: torch.dtype | None) -> MixedPrecisionPolicy:
    """Gather and use weights in `compute`, reduce gradients in float32."""
    if compute is None:
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    options = {
        "param_dtype": compute,
        "reduce_dtype": torch.float32,
        "cast_forward_inputs": False,
    }
    kept = kept_in_float32(net)
    if kept:
        if not hasattr(MixedPrecisionPolicy, "param_dtype_override_fn"):
            raise ValueError(
                "`sharding` with `weights: bfloat16` needs torch 2.15 or later; found "
                f"{torch.__version__}; upgrade torch, or set `weights: float32`"
            )
        options["param_dtype_override_fn"] = lambda parameter: (
            parameter.dtype if parameter in kept else None
        )
    return MixedPrecisionPolicy(**options)


def is_sharded(tensor: Tensor) -> bool:
    """True if this rank holds only a part of the tensor."""
    return isinstance(tensor, DTensor)


def lister(net: nn.Module) -> Callable[[], Iterable[nn.Parameter]]:
    """A function that lists the parameters of a network as they are when it is called.

    They are listed once where they stay the same objects, because a walk through the modules takes
    1 % of a step of a small network; FSDP replaces them around each pass.
    """
    parameters = list(net.parameters())
    return net.parameters if any(map(is_sharded, parameters)) else lambda: parameters


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that is on this rank; any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered in host memory; any other tensor unchanged.

    A collective: if the tensor is sharded, every rank must call it.
    """
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def shard_as(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard a tensor, of which every rank has a whole copy, in the same way as `like`."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def clip_gradients(parameters: Sequence[Tensor], max_norm: float) -> float:
    """Clip the joint gradient norm of all parameters to `max_norm`, in place.

    Returns:
        The norm before clipping, over sharded and replicated parameters.
    """
    sharded = [p for p in parameters if is_sharded(p)]
    replicated = [p for p in parameters if not is_sharded(p)] if sharded else parameters
    groups = [group for group in (sharded, replicated) if group]
    norms = [nn.utils.get_total_norm([p.grad for p in group]) for group in groups]
    if sharded:
        joint = torch.stack([whole(norm).cpu().double() for norm in norms]).norm()
        norm, exact = joint.to(local(parameters[0]).device, torch.float32), float(joint)
    else:
        norm, exact = norms[0], float(norms[0])
    if not float(norm) + 1e-6 < max_norm:  # otherwise torch multiplies by 1; NaN must spread
        for group in groups:
            nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return exact
