"""Scores do not depend on how a device rounds: kernels of other rounding stand in for a GPU's."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from gpu_scores import EVERY, differences, score_on, write_case
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from distill_bench.evaluate import cache, encoders

PRODUCTS = ("convolution", "mm", "bmm", "addmm", "baddbmm", "_scaled_dot_product")
KEPT = 10  # bits of the mantissa of TF32 and of half precision


class DoublePrecision(TorchDispatchMode):
    """Runs every operation on float32 tensors in float64 and rounds its results."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.is_view or function._schema.is_mutable:
            return function(*args, **(kwargs or {}))
        double = tree_map_only(Tensor, as_type(torch.float32, torch.float64), (args, kwargs or {}))
        results = function(*double[0], **double[1])
        if results is args:
            return results
        return tree_map_only(Tensor, as_type(torch.float64, torch.float32), results)


class TensorFloat(TorchDispatchMode):
    """Rounds the inputs of convolutions and products to TF32, as a GPU may by default."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function._schema.name.removeprefix("aten::").startswith(PRODUCTS):
            args = tree_map_only(Tensor, rounded, args)
        return function(*args, **(kwargs or {}))


def as_type(old: torch.dtype, new: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(new) if tensor.dtype == old else tensor


def rounded(tensor: Tensor) -> Tensor:
    """The nearest number of ten bits of mantissa."""
    if tensor.dtype != torch.float32:
        return tensor
    mantissa, exponent = torch.frexp(tensor)
    return torch.ldexp((mantissa * 2**KEPT).round() / 2**KEPT, exponent)


@contextlib.contextmanager
def plain_convolutions() -> Iterator[None]:
    """Without oneDNN, one clip per batch."""
    with torch.backends.mkldnn.flags(enabled=False), mock.patch.object(cache, "BATCH", 1):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_other_kernels_give_the_scores_of_the_processors_own(name, tmp_path):
    """The tolerances of eval/README.md; products in TF32 exceed them."""
    case = write_case(tmp_path / "case", name)
    own = score_on("cpu", case)
    for kernels in (DoublePrecision, plain_convolutions):
        with kernels():
            features, scores = differences(own, score_on("cpu", case))
        assert features <= 1 and scores <= 1, (kernels.__name__, features, scores)
    with TensorFloat():
        assert max(differences(own, score_on("cpu", case))) > 1


@pytest.mark.slow
def test_pictures_in_half_precision_differ_far_more_than_kernels_do(tmp_path, monkeypatch):
    """Within the tolerance, because features average over pixels, but 20 times a kernel's share."""
    case, scaled = write_case(tmp_path / "case", "fvd"), encoders.scaled
    own = score_on("cpu", case)
    with DoublePrecision():
        kernels, _ = differences(own, score_on("cpu", case))
    monkeypatch.setattr(encoders, "scaled", lambda frames: scaled(frames).half().float())
    assert differences(own, score_on("cpu", case))[0] > 20 * kernels


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("name", EVERY)
def test_a_gpu_gives_the_scores_of_the_processor(name, tmp_path):
    case = write_case(tmp_path / "case", name)
    features, scores = differences(*(score_on(place, case) for place in ("cpu", "cuda")))
    assert features <= 1 and scores <= 1
