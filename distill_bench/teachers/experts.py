"""Several networks behind one denoiser: each sample goes to the expert of its noise level."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ReduceOp, all_reduce
from torch.distributed.device_mesh import DeviceMesh

from distill_bench.noise import GuidanceByLevel, GuidanceScale, is_high_noise
from distill_bench.teachers.architecture import architecture_called
from distill_bench.teachers.folder import TeacherError
from distill_bench.teachers.kinds import find_teacher

# (network, x_t (B, C, T, H, W), sigma (B,), text (B, L, D)) -> output (B, ...)
PerNetwork = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


class Experts(nn.Module):
    """Two networks of one architecture, for high and for low noise (Wan2.2-A14B).

    A sample runs through one of them, so a forward costs as much as that of one network.

    Args:
        high_noise: runs samples at noise levels from `boundary` on.
        low_noise: runs samples below `boundary`.
        boundary: noise level, in (0, 1].
    """

    def __init__(self, high_noise: nn.Module, low_noise: nn.Module, boundary: float) -> None:
        super().__init__()
        self.high_noise = high_noise
        self.low_noise = low_noise
        self.boundary = boundary
        self.architecture = architecture_called(high_noise)
        self.mesh: DeviceMesh | None = None  # ranks that share the weights; None: this one has all

    def named_parameters(self, *_: object, **__: object) -> Iterator[tuple[str, nn.Parameter]]:
        for expert, net in self.named_children():
            for name, parameter in net.named_parameters():  # a view of an adapter chooses its own
                yield f"{expert}.{name}", parameter

    def routed(self, run: PerNetwork, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """Run each sample through its expert; the output is in the order of the samples.

        Args:
            run: runs one expert on a part of the batch.
            x_t: (B, C, T, H, W).
            sigma: (B,), in (0, 1].
            text: (B, L, D).
        """
        rows = self.rows(sigma)
        used = self._used_by_any_rank(rows, sigma.device)
        if sum(used) == 1:
            return run(networks_in(self)[used.index(True)], x_t, sigma, text)
        outputs, place, filled = [], {}, 0
        for net, own, is_used in zip(networks_in(self), rows, used, strict=True):
            if is_used:
                # Ranks gather a sharded expert together, in its forward and in its backward. A rank
                # without samples for it runs one whose output, with gradient zero, is dropped.
                chosen = own or [0]
                outputs.append(run(net, x_t[chosen], sigma[chosen], text[chosen]))
                place |= {sample: filled + i for i, sample in enumerate(own)}
                filled += len(chosen)
        return torch.cat(outputs)[[place[sample] for sample in range(len(sigma))]]

    def rows(self, sigma: Tensor) -> tuple[list[int], list[int]]:
        """Indices of the samples above and below the boundary."""
        is_high = is_high_noise(sigma, self.boundary).tolist()
        high = [sample for sample, above in enumerate(is_high) if above]
        return high, [sample for sample, above in enumerate(is_high) if not above]

    def _used_by_any_rank(self, rows: Sequence[list[int]], device: torch.device) -> list[bool]:
        used = [bool(own) for own in rows]
        if self.mesh is None:
            return used
        flags = torch.tensor(used, dtype=torch.int32, device=device)
        all_reduce(flags, ReduceOp.MAX, self.mesh.get_group())
        return [bool(flag) for flag in flags.tolist()]


def networks_in(net: nn.Module) -> tuple[nn.Module, ...]:
    """The networks of a role, all of one architecture: its experts, or the network itself."""
    return (net.high_noise, net.low_noise) if isinstance(net, Experts) else (net,)


def guidance_of(
    scale: float | Mapping[str, float], teacher: str, net: nn.Module | None = None
) -> GuidanceScale:
    """A guidance scale of a config, with the noise level at which experts change.

    Args:
        scale: a number, or one by expert.
        teacher: name, of which a scale by expert needs two experts.
        net: the guided network, if it may be experts of another pipeline.
    """
    if not isinstance(scale, Mapping):
        return scale
    boundary = net.boundary if isinstance(net, Experts) else find_teacher(teacher).boundary
    if boundary is None:
        raise TeacherError(f"guidance {scale}: {teacher} has one network; write a number")
    return GuidanceByLevel(**scale, boundary=boundary)


def routed(net: nn.Module, run: PerNetwork, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
    """Run a network, or each expert on its samples; arguments as for `Experts.routed`."""
    if isinstance(net, Experts):
        return net.routed(run, x_t, sigma, text)
    return run(net, x_t, sigma, text)
