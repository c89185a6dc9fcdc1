"""Gradient of a method's loss at x0, for comparison with a formula."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from distill_bench.method import Batch, Denoise, Method, Nets
from distill_bench.networks.denoiser import Guided


def student_gradient(
    method: Method,
    student_x0: Tensor,
    noise: Tensor,
    sigma: Tensor,
    fake_score: Denoise,
    teacher: Denoise,
    text: Tensor | None = None,
    null_text: Tensor | None = None,
    *,
    guidance_scale: float = 1.0,
    student: Denoise | None = None,
    extras: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Tensor:
    """Gradient (B, C, T, H, W) of a method's student loss at x0, for given denoisers and draws.

    Nothing is random: every draw of noise is `noise`, every draw of a noise level is `sigma`, and
    every draw of an integer is 0. All tensors have the dtype of the inputs. Heads have random
    weights from a fixed seed. They read the `features` of a denoiser or, if it has none, its
    prediction as tokens. A method that makes its own samples is differentiated at its `Loss.x0`.

    Args:
        method: the objective.
        student_x0: the student's samples, (B, C, T, H, W).
        noise: value of every draw of noise, (B, C, T, H, W).
        sigma: value of every draw of a noise level, in (0, 1], (B,).
        fake_score: any callable (x_t, sigma, text) -> x0_hat.
        teacher: teacher without guidance, with the same signature.
        text: (B, L, D); None: zeros (B, 1, 1).
        null_text: (1, L, D), used if guidance_scale is not 1 or the method guides; None: zeros.
        guidance_scale: weight g of the teacher's guidance, uncond + g (cond - uncond).
        student: called where a term runs the student directly; None: it predicts student_x0.
        extras: `real_latents` and `ode_pairs` as returned by `Batch.extra`; None: student_x0
            stands for data.

    Raises:
        ValueError: if the method makes no samples of the student.
    """
    x0 = student_x0.detach().clone().requires_grad_()
    prediction = student_x0.detach().clone().requires_grad_()
    text = noise.new_zeros(len(noise), 1, 1) if text is None else text
    null_text = torch.zeros_like(text[:1]) if null_text is None else null_text
    data = {"x0": student_x0.detach(), "noise": noise, "text": text}
    extras = {"real_latents": data, "ode_pairs": data} | dict(extras or {})
    batch = Batch(
        text,
        _GivenDraws(noise, sigma),
        latent_shape=tuple(noise.shape[1:]),
        score_shift=1.0,
        sigma_min=0.0,
        sigma_max=1.0,
        extras={need: _constant(rows) for need, rows in extras.items()},
    )
    role = _WithFeatures(teacher)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        modules = method.modules(role.features(noise, sigma, text, 1.0).shape[-1])
    nets = Nets(
        student=_WithFeatures(student or _constant(prediction)),
        fake_score=_WithFeatures(fake_score),
        teacher=Guided(role, null_text, guidance_scale),
        rollout=_constant(x0),
        exit_sigma=_constant(torch.ones_like(sigma)),
        target=teacher,
        unguided_teacher=role,
        null_text=null_text,
        guidance_scale=guidance_scale,
        modules={name: net.to(noise.dtype).requires_grad_(False) for name, net in modules.items()},
    )
    loss = method.student_loss(nets, batch)
    if loss.x0 is None:
        raise ValueError(
            f"{type(method).__name__} makes no samples of the student: "
            "its loss has no gradient at x0"
        )
    (gradient,) = torch.autograd.grad(loss.total, loss.x0, allow_unused=True)
    return torch.zeros_like(x0) if gradient is None else gradient.detach()


def _constant(value: Any) -> Callable[..., Any]:
    return lambda *_: value


@dataclasses.dataclass(frozen=True)
class _GivenDraws:
    """Draws that always return the given values."""

    given_noise: Tensor
    given_sigma: Tensor

    def noise(self, *_: object) -> Tensor:
        return self.given_noise

    def sigma(self, *_: object) -> Tensor:
        return self.given_sigma

    def uniform(self, *_: object) -> Tensor:
        return self.given_sigma

    def integers(self, *_: object) -> list[int]:
        return [0] * len(self.given_sigma)

    def shared_integer(self, *_: object) -> int:
        return 0


@dataclasses.dataclass(frozen=True)
class _WithFeatures:
    """Denoiser with features: those of the wrapped one, or its prediction as tokens (B, THW, C)."""

    denoise: Denoise

    def __call__(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        return self.denoise(x_t, sigma, text)

    def features(self, x_t: Tensor, sigma: Tensor, text: Tensor, depth: float) -> Tensor:
        if hasattr(self.denoise, "features"):
            return self.denoise.features(x_t, sigma, text, depth)
        return self.denoise(x_t, sigma, text).flatten(2).transpose(1, 2)
