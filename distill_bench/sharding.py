"""Networks whose weights the processes of a run share (FSDP2), and tensors of which each process may hold a part."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


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
    sharded, replicated = [p for p in parameters if is_sharded(p)], [p for p in parameters if not is_sharded(p)]
    if not sharded:
        return float(nn.utils.clip_grad_norm_(parameters, largest))
    norms = [whole(nn.utils.get_total_norm([p.grad for p in group])) for group in (sharded, replicated) if group]
    norm = torch.stack([n.cpu().double() for n in norms]).norm()
    for group in (sharded, replicated):
        nn.utils.clip_grads_with_norm_(group, largest, norm.to(local(parameters[0]).device, torch.float32))
    return float(norm)
