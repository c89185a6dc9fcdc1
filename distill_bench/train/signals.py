"""Signals that say something about a training, which the losses of this family do not: under 1/n they are free of scale.

All on the same training prompts and the same noise, which no update sees, at every call, so that a curve shows the training
and not the draws; on samples of the student's last step, as clips are made, so that runs of several seeds compare. Keys of
train.jsonl:

    x0_gradient_norm/<term>              root mean square over elements of the term's gradient at x0, times their number
    x0_gradient_cosine/<term>/<term>     between two terms' gradients at x0
    score_gap/sigma_<low>-<high>         mean |x0_fake - x0_teacher| / n on these samples, by noise level
    fake_score_error/sigma_<low>-<high>  mean (x0 - x0_fake)^2 on them: the posterior variance and the fake score's tracking lag
    tracking_lag/sigma_<low>-<high>      mean (x0_exact - x0_fake)^2, the lag alone: where the teacher offers the exact fake score

A term that does not pass x0 (a regression on another prediction of the student's) has no gradient there, and none of the first
two.
"""

from itertools import combinations

import torch
from torch import Tensor

from distill_bench.method import Batch, Denoise, Method, Nets, dmd_normaliser, mean_per_sample
from distill_bench.noise import add_noise

SIGNAL_SAMPLES = 8
SIGMA_BINS = 4


def signals(
    method: Method, nets: Nets, batch: Batch, exact: Denoise | None = None
) -> dict[str, float]:
    """The signals of a method on a batch; the student's weights must be trainable, no gradient is left behind.

    `exact` is the fake score that would track the student perfectly, where it is known.
    """
    loss = method.student_loss(nets, batch)
    if loss.x0 is None:
        return {}
    found = _gradients(loss.terms, loss.x0) if loss.x0.requires_grad else {}
    return found | (
        by_sigma(nets, batch, loss.x0.detach(), exact) if nets.fake_score is not None else {}
    )


def _gradients(terms: dict[str, Tensor], x0: Tensor) -> dict[str, float]:
    gradients = {
        name: torch.autograd.grad(term, x0, retain_graph=True, allow_unused=True)[0]
        for name, term in terms.items()
        if term.requires_grad
    }
    gradients = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    found = {
        f"x0_gradient_norm/{name}": float(g.norm()) * g.numel() ** 0.5
        for name, g in gradients.items()
    }
    for (one, a), (other, b) in combinations(gradients.items(), 2):
        found[f"x0_gradient_cosine/{one}/{other}"] = float(
            torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)
        )
    return found


@torch.no_grad()
def by_sigma(
    nets: Nets, batch: Batch, x0: Tensor, exact: Denoise | None = None
) -> dict[str, float]:
    """Score gap and the fake score's error on samples x0 (B, C, T, H, W), by noise level; sample i falls in bin i mod bins."""
    bins = torch.arange(len(x0), device=x0.device) % SIGMA_BINS
    width = (batch.sigma_max - batch.sigma_min) / SIGMA_BINS
    sigma = batch.sigma_min + width * (bins + batch.draws.uniform("signals/sigma"))
    x_t = add_noise(x0, batch.noise("signals/noise"), sigma)
    x0_fake, x0_teacher = (
        nets.fake_score(x_t, sigma, batch.text),
        nets.teacher(x_t, sigma, batch.text),
    )
    values = {
        "score_gap": mean_per_sample((x0_fake - x0_teacher).abs()) / dmd_normaliser(x0, x0_teacher),
        "fake_score_error": mean_per_sample((x0 - x0_fake).square()),
    }
    if exact is not None:
        values["tracking_lag"] = mean_per_sample((exact(x_t, sigma, batch.text) - x0_fake).square())
    found = {}
    for i in range(SIGMA_BINS):
        low, high = batch.sigma_min + width * i, batch.sigma_min + width * (i + 1)
        found |= {
            f"{name}/sigma_{low:.2f}-{high:.2f}": float(v.flatten()[bins == i].mean())
            for name, v in values.items()
        }
    return found
