"""`fake_score: exact` with `student_input: real_data`.

A student that predicts from noised clips has another density than one that makes rollouts: a
mixture with one Gaussian per exit step and clip.
"""

import json

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from distill_bench.config.resolve import resolve
from distill_bench.config.yaml_files import dump_yaml
from distill_bench.noise import add_noise
from distill_bench.train.loop import train
from distill_bench.train.run import Run
from distill_bench.train.setup import build

FIELDS = {
    "teacher": "gaussian",
    "method": "dmd2",
    "fake_score": "exact",
    "student_input": "real_data",
    "nfe": 2,
    "batch_size": 8,
    "student_updates": 2,
    "log_every": 1,
    "signals_every": 1,
    "trackers": [],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return build(resolve(FIELDS | {"precision": "float64"}), tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def run_to_the_last_step(tmp_path_factory) -> Run:
    config = resolve(FIELDS | {"precision": "float64", "exit_step": "last"})
    return build(config, tmp_path_factory.mktemp("store"))


@pytest.mark.parametrize(("name", "exits"), [("run", [0, 1]), ("run_to_the_last_step", [1])])
def test_the_prediction_is_the_gradient_of_the_samples_log_density(name, exits, request):
    """Tweedie: x0 = (x_t + s^2 grad log p(x_t)) / (1 - s), with p written out clip by clip."""
    run = request.getfixturevalue(name)
    rows = run.student_input.data.every()
    block, s = run.networks["student"].blocks[0].double(), 0.4
    eye = torch.eye(16, dtype=torch.float64)
    text = run.batches.batch(0, "student", 0).text[:1]
    own = (rows["text"] == text).all(-1).flatten()
    assert 1 < own.sum() < len(own)
    x_t = torch.randn(1, *run.batches.latent_shape, dtype=torch.float64).requires_grad_()
    log_densities = []
    for level in run.student_input.exit_step.sigmas[exits].double():
        weight, offset = block.at(level.expand(1), text[:, 0])
        clean = eye - level * weight[0]
        noisy = (1 - s) ** 2 * level**2 * clean @ clean.T + s**2 * eye
        for y in rows["x0"][own].flatten(1).double():
            mean = clean @ ((1 - level) * y) - level * offset[0]
            density = MultivariateNormal((1 - s) * mean.detach(), noisy.detach())
            log_densities.append(density.log_prob(x_t.flatten()))
    (score,) = torch.autograd.grad(torch.stack(log_densities).logsumexp(0), x_t)
    expected = ((x_t + s**2 * score) / (1 - s)).detach()
    x0_fake = run.nets.fake_score(x_t.detach(), torch.tensor([s], dtype=torch.float64), text)
    torch.testing.assert_close(x0_fake, expected, rtol=1e-7, atol=1e-9)
    # of x_t alone: the student's weights are those of another network, as for a trained fake score
    leaf = x_t.detach().requires_grad_()
    prediction = run.nets.fake_score(leaf, torch.tensor([s], dtype=torch.float64), text)
    weights = list(run.networks["student"].parameters())
    by_x_t, *by_weights = torch.autograd.grad(prediction.sum(), [leaf, *weights], allow_unused=True)
    assert by_x_t.abs().max() > 0 and by_weights == [None] * len(weights)


def samples(run: Run, batches: int) -> tuple[Tensor, Tensor, Tensor]:
    """Samples of the student, their noised versions at level 0.5 (N, d), and the predictions."""
    x0, x_t, x0_fake = [], [], []
    with torch.no_grad():
        for update in range(batches):
            batch = run.batches.drawn(update, "fake_score/0", range(50))
            x0.append(run.nets.rollout(batch))
            sigma = x0[-1].new_full((len(batch.text),), 0.5)
            x_t.append(add_noise(x0[-1], batch.noise("test"), sigma))
            x0_fake.append(run.nets.fake_score(x_t[-1], sigma, batch.text))
    return tuple(torch.cat(parts).flatten(1) for parts in (x0, x_t, x0_fake))


@pytest.mark.slow
def test_nothing_linear_is_left_in_the_error(run):
    """Monte Carlo: neither x_t nor the prediction predicts the error, up to chance.

    The moments of rollouts in place of those of noised clips leave 12 % to be explained.
    """
    x0, x_t, x0_fake = samples(run, 20)
    error = x0 - x0_fake
    inputs = torch.cat([x_t, x0_fake, torch.ones_like(x_t[:, :1])], 1)
    fit = inputs @ torch.linalg.lstsq(inputs, error).solution
    by_chance = inputs.shape[1] / len(inputs)
    assert fit.square().mean() / error.square().mean() < 1.5 * by_chance


@pytest.mark.parametrize("fake_score", ["trained", "exact"])
def test_the_tracking_lag_is_that_of_the_samples_of_the_run(fake_score, tmp_path):
    """It is zero for an exact fake score, and falls below the denoising error for a trained one."""
    run_dir = tmp_path / "runs" / "run"
    run_dir.mkdir(parents=True)
    config = resolve(FIELDS | {"fake_score": fake_score})
    (run_dir / "run.yaml").write_text(dump_yaml(config.model_dump(mode="json")))
    train(run_dir)
    line = json.loads((run_dir / "train.jsonl").read_text().splitlines()[-1])
    lags = {key: value for key, value in line.items() if key.startswith("tracking_lag/")}
    assert len(lags) == 4
    for key, lag in lags.items():
        error = line[key.replace("tracking_lag", "fake_score_error")]
        assert lag == 0 if fake_score == "exact" else 0 < lag < error


def test_student_and_teacher_have_their_flops_without_a_trained_fake_score(run):
    assert run.ledger.flops.keys() == {"student", "teacher"}
    assert min(run.ledger.flops.values()) > 0
