"""Denoisers: the call of a network, what stops early, guidance, precision and FLOPs."""

import functools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from distill_bench.networks.denoiser import Denoiser, Guided, forward_flops
from distill_bench.networks.ledger import Ledger
from distill_bench.noise import GuidanceByLevel, x0_to_velocity
from distill_bench.teachers.architecture import Architecture
from distill_bench.teachers.experts import Experts

SHAPE, WIDTH = (2, 1, 1, 3), 6


@dataclass(frozen=True)
class Scaled(Architecture):
    """A network that counts noise levels in a unit of its own, and takes one more argument."""

    def velocity(self, net, call, x_t, sigma, text):
        return -call(x_t, net.unit * sigma, text, sign=-1)


class Net(nn.Module):
    """Blocks over tokens: the elements of x_t, moved by the level and by the mean text.

    Like a network whose first layer multiplies them, it takes no inputs of several dtypes.
    """

    architecture = Scaled()
    unit = 7.0

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64, blocks: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layers = (nn.Linear(WIDTH, WIDTH, dtype=dtype) for _ in range(blocks))
            self.blocks = nn.ModuleList(layers)

    def forward(self, x_t, level, text, sign, return_dict=True):
        assert x_t.dtype == level.dtype == text.dtype
        tokens = x_t.flatten(1) + level[:, None] + sign * text.mean((1, 2))[:, None]
        for block in self.blocks:
            tokens = torch.tanh(block(tokens))
        output = tokens.reshape(x_t.shape)
        return {"sample": output} if return_dict else (output,)

    def expected(self, x_t: Tensor, sigma: Tensor, text: Tensor, blocks: int) -> Tensor:
        tokens = x_t.flatten(1) + 7 * sigma[:, None] - text.mean((1, 2))[:, None]
        for index, block in enumerate(self.blocks[:blocks], 1):
            tokens = block(tokens) if index == blocks else torch.tanh(block(tokens))
        return tokens


def inputs(*levels: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    x_t = torch.randn(len(levels), *SHAPE, generator=draws, dtype=dtype)
    text = torch.randn(len(levels), 4, 5, generator=draws, dtype=dtype)
    return x_t, torch.tensor(levels, dtype=dtype), text


def denoiser(net: nn.Module, **options) -> Denoiser:
    return Denoiser(net, "teacher", Ledger(1), **options)


def test_a_network_is_called_as_its_architecture_says():
    """The whole of it, and its first blocks alone."""
    net, (x_t, sigma, text) = Net(), inputs(0.2, 0.5)
    velocity = -torch.tanh(net.expected(x_t, sigma, text, 3)).reshape(x_t.shape)
    own = denoiser(net)
    torch.testing.assert_close(own.velocity(x_t, sigma, text), velocity)
    x0 = x_t - sigma.reshape(2, 1, 1, 1, 1) * velocity
    torch.testing.assert_close(own(x_t, sigma, text), x0)
    for depth, blocks in ((0.0, 1), (0.7, 2), (1.0, 3)):
        tokens = own.features(x_t, sigma, text, depth)
        torch.testing.assert_close(tokens, net.expected(x_t, sigma, text, blocks))


def test_weights_laid_over_a_network_replace_its_own():
    net, other = Net(0), Net(1)
    own = denoiser(net, weights=dict(other.named_parameters()))
    torch.testing.assert_close(own(*inputs(0.3)), denoiser(other)(*inputs(0.3)))
    tokens = own.features(*inputs(0.3), 0.5)
    torch.testing.assert_close(tokens, denoiser(other).features(*inputs(0.3), 0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_predictions_have_the_dtype_of_the_latents_and_the_precision_of_the_network(dtype):
    net, given = Net(dtype=torch.float32), inputs(0.3, dtype=torch.float32)
    exact, low = denoiser(net), denoiser(net, autocast=dtype)
    for predict in ("velocity", "__call__"):
        full, rounded = (getattr(one, predict)(*given) for one in (exact, low))
        assert full.dtype == rounded.dtype == torch.float32
        assert 0 < (full - rounded).abs().max() < 0.05
    features = low.features(*given, 1.0)
    assert features.dtype == torch.float32
    assert torch.equal(features, features.to(dtype).float())
    assert torch.equal(features, features.bfloat16().float()) == (dtype == torch.bfloat16)


@pytest.mark.parametrize(("trained", "kind"), [(True, "full_backward"), (False, "input_backward")])
def test_a_backward_is_of_the_kind_of_the_phase_that_runs_it(trained, kind):
    """Two phases may share a graph and train different roles."""
    net, ledger = Net().requires_grad_(not trained), Ledger(2)
    x_t, sigma, text = inputs(0.3, 0.6)
    output = Denoiser(net, "student", ledger)(x_t.requires_grad_(), sigma, text)
    net.requires_grad_(trained)
    output.sum().backward()
    counts = {name: count for name, count in ledger.counts["student"].items() if count}
    assert counts == {"forward": 1, kind: 1}


def test_features_of_a_network_that_is_compiled_as_a_whole_are_its_own():
    """Also after a whole forward, whose graph has no block to stop at."""
    net, given = Net(), inputs(0.2, 0.5)
    expected = denoiser(net).features(*given, 0.5)
    net.compile(backend="eager")
    compiled = denoiser(net)
    x0 = compiled(*given)
    torch.testing.assert_close(compiled.features(*given, 0.5), expected)
    torch.testing.assert_close(compiled(*given), x0)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0, 3.5, GuidanceByLevel(4.0, 1.5, boundary=0.4)])
@pytest.mark.parametrize(
    "batched, forwards", [({}, [6]), ({"batched": True}, [6]), ({"batched": False}, [3, 3])]
)
def test_guidance_extrapolates_each_sample_by_the_scale_of_its_level(scale, batched, forwards):
    """In one forward or two, or one without a null text; the velocity as the clean latents."""
    own, (x_t, sigma, text) = denoiser(Net()), inputs(0.2, 0.4, 0.9)
    null_text = torch.full((1, 4, 5), 0.3, dtype=torch.float64)
    guided, seen = Guided(own, null_text, scale, **batched), []
    own.net.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    by_sample = [4.0 if level >= 0.4 else 1.5 for level in sigma]
    scales = torch.tensor(by_sample if isinstance(scale, GuidanceByLevel) else [scale] * 3)
    cond, uncond = own(x_t, sigma, text), own(x_t, sigma, null_text.expand(3, 4, 5))
    x0 = uncond + scales.reshape(3, 1, 1, 1, 1) * (cond - uncond)
    seen.clear()
    torch.testing.assert_close(guided(x_t, sigma, text), x0)
    assert seen == ([3] if scale == 1 else forwards)
    velocity = x0_to_velocity(x0, x_t, sigma)
    torch.testing.assert_close(guided.velocity(x_t, sigma, text), velocity)

    def jacobian(predict):  # of a fixed direction, through both predictions
        x = x_t.clone().requires_grad_()
        return torch.autograd.grad((predict(x) * x_t).sum(), x)[0]

    by_cond = jacobian(lambda x: own(x, sigma, text))
    by_uncond = jacobian(lambda x: own(x, sigma, null_text.expand(3, 4, 5)))
    expected = by_uncond + scales.reshape(3, 1, 1, 1, 1) * (by_cond - by_uncond)
    torch.testing.assert_close(jacobian(lambda x: guided(x, sigma, text)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flops_are_those_of_one_sample_through_one_expert_in_the_networks_own_dtype(dtype):
    """On the meta device, which stands for a GPU; a multiplication with addition counts as two."""
    nets = [Net(dtype=dtype, blocks=3).to("meta"), Net(dtype=dtype, blocks=2).to("meta")]
    text = torch.zeros(4, 4, 5, dtype=dtype, device="meta")
    flops = functools.partial(forward_flops, latent_shape=SHAPE, text=text)
    assert flops(nets[0]) == 3 * 2 * WIDTH**2
    assert flops(Experts(*nets, boundary=0.5)) == 3 * 2 * WIDTH**2
