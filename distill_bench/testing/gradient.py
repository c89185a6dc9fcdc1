"""TODO: testing.gradient."""

import dataclasses
from collections.abc import Mapping

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
    """The gradient of a method's student loss at x0, (B, C, T, H, W), for given denoisers and draws.

    Every draw of noise is `noise`, every draw of a noise level `sigma`, every draw of an integer 0, whatever its purpose, so that
    nothing is random. All is in the dtype of the inputs. Heads have random weights of a fixed seed, on `features` of the
    denoisers where these have them, else on their predictions as tokens. A method that makes its samples itself (`Loss.x0` is
    not the rollout's) is differentiated there.

    Args:
        student_x0: the student's samples (B, C, T, H, W).
        noise: (B, C, T, H, W).
        sigma: in (0, 1], (B,).
        fake_score: (x_t, sigma, text) -> x0_hat; closures of any kind.
        teacher: likewise, unguided.
        text: (B, L, D); None is zeros (B, 1, 1).
        null_text: (1, L, D), for methods that look at guidance themselves and for a guidance_scale other than 1.
        guidance_scale: of the teacher, uncond + g (cond - uncond).
        student: predicts for terms that run the student directly; by default it gives student_x0 whatever it sees.
        extras: real_latents and ode_pairs as `Batch.extra` gives them; by default student_x0 stands for data.
    """
    x0 = student_x0.detach().clone().requires_grad_()
    text = noise.new_zeros(len(noise), 1, 1) if text is None else text
    null_text = torch.zeros_like(text[:1]) if null_text is None else null_text
    direct = student_x0.detach().clone().requires_grad_()
    given = {"x0": student_x0.detach(), "noise": noise, "text": text}
    extras = {"real_latents": given, "ode_pairs": given} | dict(extras or {})
    batch = Batch(
        text,
        _GivenDraws(noise, sigma),
        tuple(noise.shape[1:]),
        1.0,
        0.0,
        1.0,
        {k: (lambda _, v=v: v) for k, v in extras.items()},
    )
    role = _WithFeatures(teacher)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        modules = method.modules(role.features(noise, sigma, text, 1.0).shape[-1])
    nets = Nets(
        student=_WithFeatures(student or (lambda x_t, sigma, text: direct)),
        fake_score=_WithFeatures(fake_score),
        teacher=Guided(role, null_text, guidance_scale),
        rollout=lambda _: x0,
        exit_sigma=lambda _: torch.zeros_like(sigma),
        target=teacher,
        unguided_teacher=role,
        null_text=null_text,
        guidance_scale=guidance_scale,
        modules={
            name: module.to(noise.dtype).requires_grad_(False) for name, module in modules.items()
        },
    )
    loss = method.student_loss(nets, batch)
    if loss.x0 is None:
        raise ValueError(
            f"{type(method).__name__} makes no samples of the student: its loss has no gradient at x0"
        )
    (gradient,) = torch.autograd.grad(loss.total, loss.x0, allow_unused=True)
    return torch.zeros_like(x0) if gradient is None else gradient.detach()


@dataclasses.dataclass(frozen=True)
class _GivenDraws:
    """Draws that are what they are told to be."""

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
    """A denoiser whose features, where it has none, are its prediction as tokens (B, T H W, C)."""

    denoise: Denoise

    def __call__(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        return self.denoise(x_t, sigma, text)

    def features(self, x_t: Tensor, sigma: Tensor, text: Tensor, depth: float) -> Tensor:
        if hasattr(self.denoise, "features"):
            return self.denoise.features(x_t, sigma, text, depth)
        return self.denoise(x_t, sigma, text).flatten(2).transpose(1, 2)
