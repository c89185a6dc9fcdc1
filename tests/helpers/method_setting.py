"""Roles and a batch for any method: roles note whether a gradient passes through them."""

import torch
from torch import Tensor

from distill_bench.draws import Draws
from distill_bench.method import Batch, Method, Nets

SHAPE, B = (2, 1, 2, 1), 3
DRAWS = Draws(5, 0, "student", range(B), torch.device("cpu"), torch.float64)
DATA = {"x0": DRAWS.noise("data", SHAPE), "noise": DRAWS.noise("z", SHAPE)}


class Role:
    """A role that notes whether a gradient passes through one of its predictions."""

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.differentiated = False
        self.has_graph = False

    def note(self, _gradient: Tensor) -> None:
        self.differentiated = True

    def __call__(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        s = sigma.reshape(-1, 1, 1, 1, 1)
        prediction = torch.tanh(self.scale * x_t + s) + text[..., None, None]
        if prediction.requires_grad:
            self.has_graph = True
            prediction.register_hook(self.note)
        return prediction

    def features(self, x_t: Tensor, sigma: Tensor, text: Tensor, depth: float) -> Tensor:
        return self(x_t, sigma, text).flatten(2).transpose(1, 2)


def setting(method: Method) -> tuple[Nets, Batch, list[str]]:
    """Nets and a batch for a method; the list receives the data that it asks for."""
    text, asked = DRAWS.noise("text", (1, 1)), []

    def given(need: str):
        def rows(draws: Draws) -> dict[str, Tensor]:
            assert draws is batch.draws
            asked.append(need)
            return DATA | {"text": text}

        return rows

    extras = {need: given(need) for need in ("real_latents", "ode_pairs")}
    batch = Batch(text, DRAWS, SHAPE, 2.0, 0.1, 0.9, extras)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        modules = {name: net.double() for name, net in method.modules(2).items()}
    x0 = DRAWS.noise("x0", SHAPE).requires_grad_()

    def rollout(given: Batch) -> Tensor:
        assert given is batch
        return x0

    def exit_sigma(given: Batch) -> Tensor:
        assert given is batch
        return torch.full((B,), 0.8, dtype=torch.float64)

    nets = Nets(
        student=Role(0.3),
        fake_score=Role(0.7),
        teacher=Role(-0.5),
        rollout=rollout,
        exit_sigma=exit_sigma,
        target=Role(0.4),
        unguided_teacher=Role(-0.9),
        null_text=torch.zeros(1, 1, 1, dtype=torch.float64),
        guidance_scale=2.0,
        modules=modules,
    )
    return nets, batch, asked
