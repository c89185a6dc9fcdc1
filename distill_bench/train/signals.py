"""Diagnostic signals of training. Losses hide them: the 1/n normaliser removes the losses' scale.

Every call uses the same training prompts and the same noise, so that a curve shows training and not
the draws. No update uses this noise. Samples come from the student's last step, as clips do, so
that seeds are comparable. Keys of train.jsonl:

    x0_gradient_norm/<term>              RMS of the term's gradient at x0, times its elements
    x0_gradient_cosine/<term>/<term>     between two terms' gradients at x0
    score_gap/sigma_<low>-<high>         mean |x0_fake - x0_teacher| / n, by noise level
    fake_score_error/sigma_<low>-<high>  mean (x0 - x0_fake)^2: posterior variance + tracking lag
    tracking_lag/sigma_<low>-<high>      mean (x0_exact - x0_fake)^2: the lag, if x0_exact is known

A term without a gradient at x0 (a regression on another prediction of the student) has no norm and
no cosine.
"""

import dataclasses
from itertools import combinations

import torch
from torch import Tensor

from distill_bench.method import Batch, Denoise, Method, Nets, dmd_normaliser, mean_per_sample
from distill_bench.noise import add_noise
from distill_bench.train.run import Run

SIGNAL_SAMPLES = 8
SIGMA_BINS = 4


def signals_of(run: Run) -> dict[str, float]:
    """The current signals of a run; its clock, ledger and weights do not change."""
    last_step = dataclasses.replace(
        run.student_input.exit_step, steps=run.student_input.exit_step.steps[-1:]
    )
    student_input = dataclasses.replace(run.student_input, exit_step=last_step)
    nets = dataclasses.replace(run.nets, rollout=student_input.samples, exit_sigma=last_step.sigma)
    modules = run.networks["modules"]
    state = {key: value.clone() for key, value in modules.state_dict().items()}
    run.student.only_trainable()
    run.ledger.enabled = False
    try:
        batch = run.batches.drawn(0, "signals", range(SIGNAL_SAMPLES))
        return signals(run.method, nets, batch, run.exact_fake_score)
    finally:
        run.ledger.enabled = True
        modules.load_state_dict(state)


def signals(
    method: Method, nets: Nets, batch: Batch, exact: Denoise | None = None
) -> dict[str, float]:
    """The signals of a method on a batch; no gradient is accumulated.

    Args:
        nets: with a student whose weights require gradients.
        exact: the fake score in closed form, if it is known.
    """
    loss = method.student_loss(nets, batch)
    if loss.x0 is None:
        return {}
    values = gradient_signals(loss.terms, loss.x0) if loss.x0.requires_grad else {}
    if nets.fake_score is not None:
        values |= score_signals(nets, batch, loss.x0.detach(), exact)
    return values


def gradient_signals(terms: dict[str, Tensor], x0: Tensor) -> dict[str, float]:
    """Norms of the terms' gradients at x0 (B, C, T, H, W), and cosines between them."""
    gradients = {}
    for name, term in terms.items():
        if term.requires_grad:
            (gradient,) = torch.autograd.grad(term, x0, retain_graph=True, allow_unused=True)
            if gradient is not None:
                gradients[name] = gradient
    values = {
        f"x0_gradient_norm/{name}": float(gradient.norm()) * gradient.numel() ** 0.5
        for name, gradient in gradients.items()
    }
    for (name, a), (other, b) in combinations(gradients.items(), 2):
        cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)
        values[f"x0_gradient_cosine/{name}/{other}"] = float(cosine)
    return values


@torch.no_grad()
def score_signals(
    nets: Nets, batch: Batch, x0: Tensor, exact: Denoise | None = None
) -> dict[str, float]:
    """Score gap and error of the fake score on samples x0 (B, C, T, H, W), by noise level.

    Sample i falls in bin i mod SIGMA_BINS.
    """
    bins = torch.arange(len(x0), device=x0.device) % SIGMA_BINS
    width = (batch.sigma_max - batch.sigma_min) / SIGMA_BINS
    sigma = batch.sigma_min + width * (bins + batch.draws.uniform("signals/sigma"))
    x_t = add_noise(x0, batch.noise("signals/noise"), sigma)
    x0_fake = nets.fake_score(x_t, sigma, batch.text)
    x0_teacher = nets.teacher(x_t, sigma, batch.text)
    by_sample = {
        "score_gap": mean_per_sample((x0_fake - x0_teacher).abs()) / dmd_normaliser(x0, x0_teacher),
        "fake_score_error": mean_per_sample((x0 - x0_fake).square()),
    }
    if exact is not None:
        lag = exact(x_t, sigma, batch.text) - x0_fake
        by_sample["tracking_lag"] = mean_per_sample(lag.square())
    values = {}
    for i in range(SIGMA_BINS):
        low, high = batch.sigma_min + width * i, batch.sigma_min + width * (i + 1)
        for name, value in by_sample.items():
            mean = value.flatten()[bins == i].mean()
            values[f"{name}/sigma_{low:.2f}-{high:.2f}"] = float(mean)
    return values
