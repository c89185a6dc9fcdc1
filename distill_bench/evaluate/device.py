"""Device on which evaluators run their networks, and forward passes that fit into its memory.

A network that is an `nn.Module` is moved to the device for its forward passes; any other function
runs on the processor. On a GPU, convolutions and matrix products keep all bits of float32: TF32
would change features in the third digit.
"""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from distill_bench.evaluate.estimate import current_estimate
from distill_bench.networks.ranks import group_ranks, ranks
from distill_bench.store.failures import failure_kind, first_line

CPU = torch.device("cpu")
ON_PROCESSOR = "score on the processor: --device cpu, or protocol.device: cpu"

_device: ContextVar[torch.device | None] = ContextVar("device", default=None)
_used: ContextVar[set[str] | None] = ContextVar("used", default=None)


class Preprocessed(nn.Module):
    """A network with its preprocessing: `function(net, frames)` as one module.

    Args:
        constants: tensors that move with the network; `function` gets them by these names.
    """

    def __init__(
        self, function: Callable[..., Tensor], net: nn.Module, **constants: Tensor
    ) -> None:
        super().__init__()
        self.function, self.net, self.names = function, net, tuple(constants)
        for name, value in constants.items():
            self.register_buffer(name, value)

    def forward(self, frames: Tensor) -> Tensor:
        constants = {name: getattr(self, name) for name in self.names}
        return self.function(self.net, frames, **constants)


def scoring_device(name: str | None) -> torch.device:
    """The device that `name` means: `cpu`, `cuda` or `cuda:N`.

    `cuda` is the GPU of this process. None is the same, or the processor without a GPU.

    Raises:
        ValueError: for any other name, or a GPU that this process does not see.
    """
    own = ranks().device
    if name is None:
        return own
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is unknown; known: cpu, cuda, cuda:N")
    if device.type == "cpu":
        return CPU
    if own.type == "cpu":
        raise ValueError(f"device {name}: this process sees no GPU; use cpu")
    if device.index is None:
        return own
    count = torch.cuda.device_count()
    if device.index >= count:
        seen = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise ValueError(f"device {name}: this process sees {seen}; use one of these or cpu")
    return device


@contextmanager
def running_on(device: torch.device) -> Iterator[None]:
    """Run the networks of evaluators on this device instead of the process's own."""
    token = _device.set(device)
    try:
        yield
    finally:
        _device.reset(token)


@contextmanager
def devices_used() -> Iterator[set[str]]:
    """Collect the names of the devices on which networks run, or ran for cached features."""
    used: set[str] = set()
    token = _used.set(used)
    try:
        yield used
    finally:
        _used.reset(token)
        note_devices(used)


def note_devices(names: set[str]) -> None:
    """Add devices to those of the innermost `devices_used`."""
    used = _used.get()
    if used is not None:
        used |= names


def device_name(device: torch.device) -> str:
    """`cpu`, or the model of a GPU, e.g. `NVIDIA H100 80GB HBM3`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@contextmanager
def placed(net: Callable[..., Tensor], name: str) -> Iterator[torch.device]:
    """Move a network to the device of this context, and back to the processor at the end.

    Yields:
        The device of its forward passes: the processor if it is no `nn.Module`.

    Raises:
        ValueError: if one clip does not fit into the memory of the device.
    """
    wanted = _device.get() or group_ranks().device
    device = wanted if isinstance(net, nn.Module) else CPU
    note_devices({device_name(device)})
    try:
        if device == CPU:
            yield device
        elif isinstance(net, nn.Module):
            torch.cuda.reset_peak_memory_stats(device)
            net.to(device)
            with _full_float32():
                yield device
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        advice = "" if device == CPU else f"; {ON_PROCESSOR}"
        raise ValueError(
            f"{name} does not fit into the memory of {device} with one clip: "
            f"{first_line(error)}{advice}"
        ) from error
    finally:
        if device != CPU and isinstance(net, nn.Module):
            net.to(CPU)


@contextmanager
def _full_float32() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    try:
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        ):
            yield
    finally:
        matmul.fp32_precision = before


class FittingBatches:
    """Forward passes in batches, whose size is halved for good if one does not fit into memory."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size
        self.halved = False

    def __call__(self, forward: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Apply `forward` to parts of the inputs (B, ...); returns its outputs (B, ...) in order.

        Raises:
            RuntimeError, MemoryError: if a batch of one does not fit into memory.
        """
        outputs: list[Tensor] = []
        done, count, estimate = 0, len(inputs[0]), current_estimate()
        while done < count:
            part = [x[done : done + self.size] for x in inputs]
            began = 0.0 if estimate is None else time.perf_counter()
            output = self._fitting(forward, part)
            if output is None:
                continue
            outputs.append(output)
            done += len(part[0])
            # a GPU returns before it is done, and needs few parts
            if estimate is not None and output.device == CPU:
                left = count - done
                estimate.leave_out((time.perf_counter() - began) * left / len(output))
                outputs.append(output[:1].expand(left, *output.shape[1:]))
                break
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _fitting(self, forward: Callable[..., Tensor], part: list[Tensor]) -> Tensor | None:
        """Output of a batch; None, with half the size, if it does not fit."""
        count = len(part[0])
        try:
            return forward(*part)
        except (RuntimeError, MemoryError) as error:
            if count == 1 or not out_of_memory(error):
                raise
        # outside of `except`: the traceback keeps the tensors of the failed pass
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not self.halved and group_ranks().first:
            text = f"{self.name}: a batch of {count} does not fit into memory and is halved"
            print(text, file=sys.stderr, flush=True)
        self.size, self.halved = count // 2, True
        return None


def out_of_memory(error: BaseException) -> bool:
    """True if memory of the device or of the machine is exhausted."""
    return failure_kind(error) in ("cuda_oom", "host_oom")


def peak_bytes(device: torch.device) -> int:
    """Peak memory of a GPU since a network was placed there, or of this process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
