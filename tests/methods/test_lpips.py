"""DMD's regression by LPIPS, an optional package, for which a small network stands in here."""

import dataclasses
import sys
from types import ModuleType
from typing import ClassVar

import pytest
import torch
from method_setting import DATA, B, setting
from torch import Tensor, nn

from distill_bench.config.errors import ConfigError
from distill_bench.config.resolve import resolve
from distill_bench.methods import dmd
from distill_bench.methods.dmd import DMD
from distill_bench.methods.dmd2 import DMD2

DISTANCE = DMD(distance="lpips")


class LPIPS(nn.Module):
    """In place of the package's network: it keeps the frames that it compares."""

    made: ClassVar[list["LPIPS"]] = []

    def __init__(self, net: str, verbose: bool) -> None:
        super().__init__()
        self.net, self.verbose = net, verbose
        self.weight = nn.Parameter(torch.ones(()))
        self.made.append(self)

    def forward(self, frames: Tensor, other: Tensor) -> Tensor:
        self.frames = frames, other
        return (self.weight * (frames - other)).square().mean((1, 2, 3), keepdim=True)


@pytest.fixture
def kind(monkeypatch) -> type[Tensor]:
    """A type of tensors of its own, for which a new network is made."""
    module = ModuleType("lpips")
    module.LPIPS = LPIPS
    monkeypatch.setitem(sys.modules, "lpips", module)
    return type("Frames", (Tensor,), {})


@pytest.mark.parametrize(
    ("size", "enlarged"), [((16, 80), True), ((80, 16), True), ((64, 96), False)]
)
def test_lpips_compares_frames_with_frames_of_at_least_64_pixels(size, enlarged, kind):
    video, target = (torch.rand(2, 3, 4, *size).as_subclass(kind) for _ in range(2))
    distance = dmd.lpips(video, target)
    net = LPIPS.made[-1]
    frames, other = net.frames
    assert frames.shape == other.shape == (8, 3, *((64, 64) if enlarged else size))
    if enlarged:
        first = nn.functional.interpolate(video[:1, :, 3], size=(64, 64), mode="bilinear")[0]
        torch.testing.assert_close(frames[3], first)
    else:
        assert torch.equal(frames[5], video[1, :, 1])
        torch.testing.assert_close(distance, (video - target).square().mean())
    assert distance.ndim == 0
    assert (net.net, net.verbose, net.training) == ("vgg", False, False)
    assert not net.weight.requires_grad


def test_a_network_of_lpips_is_made_once_per_device_and_type_of_tensor(kind):
    """A rehearsal of memory uses tensors without data, on which another run's network fails."""
    video, made = torch.rand(1, 3, 1, 64, 64), len(LPIPS.made)
    other = type("Others", (Tensor,), {})
    for given in (kind, other, kind, other):
        dmd.lpips(video.as_subclass(given), video)
    assert len(LPIPS.made) == made + 2
    dmd.lpips(video.to("meta").as_subclass(kind), video.to("meta"))
    assert len(LPIPS.made) == made + 3
    assert LPIPS.made[-1].weight.device.type == "meta"


def test_the_regression_compares_decoded_clips_if_lpips_is_asked_for(kind):
    nets, batch, _ = setting(DISTANCE)

    def decode(latents: Tensor) -> Tensor:
        video = 2 * latents.expand(-1, -1, 3, -1, 64).repeat(1, 2, 1, 32, 1)[:, :3]
        return video.as_subclass(kind)

    nets = dataclasses.replace(nets, decode=decode)
    y, prediction = DATA["x0"], nets.student(DATA["noise"], torch.ones(B), batch.text)
    loss = DISTANCE.student_loss(nets, batch)
    expected = 0.25 * (decode(prediction) - decode(y)).square().mean()
    torch.testing.assert_close(loss.terms["regression"], expected)


def test_a_missing_package_is_named_before_a_run_and_not_needed_to_count_its_passes():
    assert DISTANCE.packages == {"lpips"}
    assert DMD().packages == frozenset()
    assert DISTANCE.rehearsed() == DMD()
    assert DMD2().rehearsed() == DMD2()
    with pytest.raises(ConfigError, match="lpips"):
        resolve({"method": {"name": "dmd", "distance": "lpips"}})
