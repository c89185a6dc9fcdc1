"""The Gaussian teacher: closed forms equal sampling, and a run trains and gets exact scores."""

import json

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from distill_bench.config.errors import ConfigError
from distill_bench.config.identity import run_id
from distill_bench.config.resolve import resolve
from distill_bench.config.yaml_files import dump_yaml
from distill_bench.domain.gaussian import SPREAD, LinearBlock, velocity_matrix
from distill_bench.domain.gaussian_teacher import main
from distill_bench.eval.exact_divergence import ExactDivergence, fisher, kl, wasserstein
from distill_bench.evaluate.score import evaluate
from distill_bench.networks.denoiser import Denoiser, Guided
from distill_bench.networks.ledger import Ledger
from distill_bench.networks.pipeline import load_pipeline
from distill_bench.noise import add_noise, student_sigmas
from distill_bench.rollout import rollout
from distill_bench.sample.run import sample
from distill_bench.teachers.kinds import read_teacher
from distill_bench.testing.checks import check_optimiser_steps, check_resume
from distill_bench.testing.runs import Runs
from distill_bench.train.loop import train
from distill_bench.train.setup import build_from
from distill_bench.train.signals import signals_of

BASE = {
    "teacher": "gaussian",
    "student_updates": 4,
    "batch_size": 8,
    "nfe": 2,
    "trackers": [],
    "log_every": 2,
    "signals_every": 2,
    "evaluations": 1,
    "student_lr": 1e-2,
    "protocol": {"clips": 2, "teacher_steps": 2, "evaluators": ["exact_divergence"]},
}


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline("gaussian", torch.device("cpu"))


def test_the_teacher_is_the_best_denoiser_of_its_data(pipeline):
    """Its error equals the posterior variance, and an affine correction does not reduce it."""
    x0 = pipeline.data(["component 1"] * 4000, list(range(4000)))
    text = pipeline.encode_text(["component 1"]).expand(4000, -1, -1)
    sigma = torch.full((4000,), 0.6)
    x_t = add_noise(x0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)), sigma)
    predicted = Denoiser(pipeline.transformer, "teacher", Ledger(1))(x_t, sigma, text)
    error = (x0 - predicted).flatten(1)
    inputs = torch.cat([x_t.flatten(1), torch.ones(4000, 1)], 1)
    correction = torch.linalg.lstsq(inputs, error).solution
    assert (inputs @ correction).square().mean() / error.square().mean() < 0.01
    eye = torch.eye(16, dtype=torch.float64)
    posterior = torch.linalg.inv(torch.linalg.inv(pipeline.covariance) + (0.4 / 0.6) ** 2 * eye)
    variance = float(torch.trace(posterior) / 16)
    assert float(error.square().mean()) == pytest.approx(variance, rel=0.03)


def test_a_teacher_is_loaded_frozen_and_to_the_asked_device(pipeline):
    """The meta device stands for a GPU."""

    class Rows:
        def every(self) -> dict[str, torch.Tensor]:
            return {"x0": torch.zeros(3, *pipeline.shape), "text": torch.zeros(3, 1, 4)}

    loaded = read_teacher(pipeline.folder).load(torch.device("meta"))
    assert not any(p.requires_grad for p in loaded.transformer.parameters())
    samples = loaded.exact_fake_score(loaded.student(), torch.ones(1), "ode", [0], Rows()).samples
    for tensor in (*loaded.transformer.parameters(), samples.x0, samples.text):
        assert tensor.device == loaded.device == torch.device("meta")


def test_the_command_without_options_writes_the_teacher_of_the_package_again(tmp_path, pipeline):
    """Up to rounding, and in a folder that exists or not."""
    out, marker = tmp_path / "teachers" / "again", "gaussian.json"
    assert main(["--out", str(out)]) == main(["--out", str(out)]) == 0
    assert (out / marker).read_bytes() == (pipeline.folder / marker).read_bytes()
    written = read_teacher(out).load(torch.device("cpu"))
    assert (written.shape, written.prompts()) == (pipeline.shape, pipeline.prompts())
    for name in ("mean", "shifts", "covariance"):
        torch.testing.assert_close(getattr(written, name), getattr(pipeline, name))


def test_levels_below_zero_and_above_one_count_as_these_in_any_precision(pipeline):
    block, text = pipeline.student().double().blocks[0], torch.eye(4).double()
    inside = block.at(torch.tensor([0.0, 0.3, 1.0, 1.0]).double(), text)
    beyond = block.at(torch.tensor([-0.1, 0.3, 1.0, 1.2]), text)
    for part, expected in zip(beyond, inside, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-6, atol=1e-6)


def test_between_its_knots_a_new_student_is_near_the_teachers_velocity_minus_the_spread(pipeline):
    sigma = torch.linspace(0, 1, 200, dtype=torch.float64)
    student = LinearBlock(pipeline.mean, pipeline.shifts, pipeline.covariance)
    text = torch.zeros(len(sigma), len(pipeline.shifts), dtype=torch.float64)
    expected = velocity_matrix(sigma, pipeline.covariance)
    expected = expected - SPREAD * sigma[:, None, None] ** 2 * torch.eye(len(pipeline.mean))
    error = (student.at(sigma, text)[0] - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2))
    assert error.max() < 0.04


def test_guidance_moves_only_the_mean(pipeline):
    text, null = pipeline.encode_text(["component 2", ""]).split(1)
    x_t = torch.randn(1, *pipeline.shape, generator=torch.Generator().manual_seed(1))
    sigma = torch.tensor([0.5])
    teacher = Denoiser(pipeline.transformer, "teacher", Ledger(1))
    guided = Guided(teacher, null, 3.0)(x_t, sigma, text)
    torch.testing.assert_close(guided, teacher(x_t, sigma, 3.0 * text))


@pytest.mark.parametrize("network", ["student", "teacher"])
@pytest.mark.parametrize("stepping", ["renoise", "ode", 0.6])
@pytest.mark.parametrize(("nfe", "guidance"), [(1, 1.0), (3, 1.0), (3, 2.5)])
def test_exact_moments_equal_those_of_samples(pipeline, network, stepping, nfe, guidance):
    net = pipeline.student() if network == "student" else pipeline.transformer
    count, sigmas = 6000, student_sigmas(nfe, 2.0)
    facts = pipeline.facts(net, sigmas, stepping, 1.0, guidance)
    draw = torch.Generator().manual_seed(0)
    noises = [torch.randn(count, *pipeline.shape, generator=draw) for _ in range(nfe)]
    text, null = pipeline.encode_text(["component 3", ""]).split(1)
    guided = Guided(Denoiser(net, network, Ledger(1)), null, guidance)
    with torch.no_grad():
        x0 = rollout(guided, noises, sigmas, text.expand(count, -1, -1), stepping).flatten(1)
    spread = np.sqrt(np.diag(facts["covariance"]))
    mean_error = np.abs(x0.mean(0).numpy() - facts["mean"][3]).max()
    covariance_error = np.abs(np.cov(x0.numpy().T) - facts["covariance"]).max()
    assert mean_error < 5 * spread.max() / count**0.5 + 1e-5
    assert covariance_error < 6 * spread.max() ** 2 / count**0.5 + 1e-5


def test_the_exact_fake_score_of_one_exit_is_the_denoiser_of_the_students_moments(pipeline):
    net = pipeline.student().double()
    sigmas = student_sigmas(2, 2.0).double()
    facts = pipeline.facts(net, sigmas, "renoise", 1.0)
    text = pipeline.encode_text(["component 0"]).double()
    x_t = torch.randn(1, *pipeline.shape, dtype=torch.float64)
    sigma = torch.tensor([0.4], dtype=torch.float64)
    mean, covariance = (torch.from_numpy(facts[key]) for key in ("mean", "covariance"))
    noisy = 0.36 * covariance + 0.16 * torch.eye(16, dtype=torch.float64)
    expected = mean[0] + 0.6 * covariance @ torch.linalg.solve(noisy, x_t.flatten() - 0.6 * mean[0])
    x0_fake = pipeline.exact_fake_score(net, sigmas, "renoise", [1], None)(x_t, sigma, text)
    torch.testing.assert_close(x0_fake.flatten(), expected, rtol=1e-9, atol=1e-11)


def test_the_exact_fake_score_of_random_exits_is_the_gradient_of_a_mixture(pipeline):
    """Tweedie: x0 = (x_t + sigma^2 grad log p(x_t)) / (1 - sigma), p the mixture over exits."""
    net, sigmas = pipeline.student().double(), student_sigmas(3, 2.0).double()
    text = pipeline.encode_text(["component 0"]).double()
    generator = torch.Generator().manual_seed(2)
    x_t = torch.randn(1, *pipeline.shape, dtype=torch.float64, generator=generator)
    x_t.requires_grad_()
    s, eye = 0.4, torch.eye(16, dtype=torch.float64)
    log_densities = []
    for steps in (1, 2, 3):
        facts = pipeline.facts(net, sigmas[:steps], "renoise", 1.0)
        mean, covariance = torch.from_numpy(facts["mean"][0]), torch.from_numpy(facts["covariance"])
        density = MultivariateNormal((1 - s) * mean, (1 - s) ** 2 * covariance + s**2 * eye)
        log_densities.append(density.log_prob(x_t.flatten()))
    (score,) = torch.autograd.grad(torch.stack(log_densities).logsumexp(0), x_t)
    expected = ((x_t + s**2 * score) / (1 - s)).detach()
    fake_score = pipeline.exact_fake_score(net, sigmas, "renoise", [0, 1, 2], None)
    x0_fake = fake_score(x_t.detach(), torch.tensor([s], dtype=torch.float64), text)
    torch.testing.assert_close(x0_fake, expected, rtol=1e-7, atol=1e-9)


def test_exact_divergences_equal_torch_and_their_definitions():
    """KL against torch, Fisher against sampling, W2 against equal and shifted Gaussians."""
    g = torch.Generator().manual_seed(3)
    means = torch.randn(2, 4, generator=g, dtype=torch.float64)
    roots = torch.randn(2, 4, 4, generator=g, dtype=torch.float64)
    p, q = (
        MultivariateNormal(m, a @ a.T + torch.eye(4, dtype=torch.float64))
        for m, a in zip(means, roots, strict=True)
    )
    moments = (p.mean, p.covariance_matrix, q.mean, q.covariance_matrix)
    arrays = [moment.numpy() for moment in moments]
    assert kl(*arrays) == pytest.approx(float(kl_divergence(p, q)), rel=1e-9)
    torch.manual_seed(0)
    x = p.sample((40_000,)).requires_grad_()
    (slope,) = torch.autograd.grad((p.log_prob(x) - q.log_prob(x)).sum(), x)
    assert fisher(*arrays) == pytest.approx(float(slope.square().sum(1).mean()), rel=0.03)
    assert wasserstein(*arrays[:2], *arrays[:2]) == pytest.approx(0, abs=1e-6)
    moved = wasserstein(arrays[0], arrays[1], arrays[0] + 2.0, arrays[1])
    assert moved == pytest.approx(4.0, rel=1e-6)  # a shift by 2 on each of 4 axes


def run_folder(tmp_path, name: str, **fields):
    """Write the run folder `name`: the config BASE with other `fields`."""
    run = tmp_path / "runs" / name
    run.mkdir(parents=True)
    (run / "run.yaml").write_text(dump_yaml(resolve(BASE | fields).model_dump(mode="json")))
    return run


@pytest.mark.parametrize("fake_score", ["trained", "exact"])
def test_a_run_trains_samples_and_is_scored_exactly(fake_score, tmp_path):
    run = run_folder(tmp_path, "run", method="sgmd", fake_score=fake_score)
    summary = train(run)
    assert summary["status"] == "done"
    assert ("fake_score" in summary["cost"]) == (fake_score == "trained")
    lines = evaluate(sample(run)[-1], {}, ["exact_divergence"])
    assert {line["column"] for line in lines} == set(ExactDivergence.columns)
    assert all(line["value"] > 0 for line in lines)
    last_line = json.loads((run / "train.jsonl").read_text().splitlines()[-1])
    lags = [value for key, value in last_line.items() if key.startswith("tracking_lag/")]
    assert len(lags) == 4
    assert all(lag > 0 if fake_score == "trained" else lag == 0 for lag in lags)


def test_signals_are_logged_and_change_neither_cost_nor_student(tmp_path):
    with_signals = run_folder(tmp_path, "with", method="sgmd")
    without = run_folder(tmp_path, "without", method="sgmd", signals_every=None)
    costs = [train(run)["cost"] for run in (with_signals, without)]
    assert costs[0] == costs[1]
    line = json.loads((with_signals / "train.jsonl").read_text().splitlines()[-1])
    assert {
        "x0_gradient_norm/fisher",
        "x0_gradient_norm/residual",
        "x0_gradient_cosine/fisher/residual",
    } <= line.keys()
    assert -1 <= line["x0_gradient_cosine/fisher/residual"] <= 1
    assert sum(key.startswith("score_gap/sigma_") for key in line) == 4
    assert sum(key.startswith("fake_score_error/sigma_") for key in line) == 4
    assert line["rho"] == pytest.approx(5 * 1e-4 / 1e-2)
    students = [
        next((run / "students").glob("*.safetensors")).read_bytes()
        for run in (with_signals, without)
    ]
    assert students[0] == students[1]


def test_signals_use_the_last_step_for_every_seed(tmp_path):
    """Seed 4 would draw the first of four steps, where this method has no score term."""
    run = build_from(run_folder(tmp_path, "run", method="dp_dmd", nfe=4, seed=4))
    batch = run.batches.drawn(0, "signals", range(2))
    assert run.student_input.exit_step.step(batch) == 0
    assert signals_of(run)["x0_gradient_norm/kl"] > 0


def test_an_exact_fake_score_has_no_updates_and_needs_a_gaussian_teacher():
    exact = [
        resolve(BASE | {"method": "dmd2", "fake_score": "exact", "fake_score_updates": k})
        for k in (1, 5)
    ]
    assert exact[0].fake_score_updates is None
    assert run_id(exact[0]) == run_id(exact[1])
    with pytest.raises(ConfigError, match="closed form"):
        resolve({"method": "dmd2", "fake_score": "exact"})
    with pytest.raises(ConfigError, match="fake_score_updates is null"):
        resolve({"method": "dmd2", "fake_score_updates": None})


def test_keys_of_a_run_override_its_preset_which_is_replaced_by_its_values():
    method = {"name": "sgmd", "preset": "paper", "residual_weight": 0.2}
    config = resolve({"method": method, "stepping": "renoise"})
    assert config.method["weighting"] == "c_t"
    assert config.method["residual_weight"] == 0.2
    assert "preset" not in config.method
    assert config.fake_score_updates == 1
    assert config.reuse_rollout == "graph"
    assert config.stepping == "renoise"
    spelled_out = {
        "name": "sgmd",
        "weighting": "c_t",
        "residual_space": "x0",
        "correction": "x0",
        "residual_weight": 0.2,
    }
    keys = {"fake_score_updates": 1, "reuse_rollout": "graph"}
    assert run_id(config) == run_id(resolve({"method": spelled_out} | keys))
    with pytest.raises(ConfigError, match="no such preset; known: paper, official, shared"):
        resolve({"method": {"name": "sgmd", "preset": "papr"}})


def test_input_and_full_backward_give_equal_gradients_and_are_counted_apart(tmp_path):
    """Each backward covers 2 of the 4 samples of a batch."""
    run = Runs("dmd2", tmp_path).build()
    net, ledger = run.nets.fake_score, run.ledger
    batch = run.batches.drawn(0, "student", range(2))
    x_t = batch.noise("x").requires_grad_()
    sigma, text = torch.tensor([0.3, 0.8]), batch.text
    gradients = []
    for weights in (False, True):
        net.net.requires_grad_(weights)
        net(x_t, sigma, text).square().sum().backward()
        gradients.append(x_t.grad.clone())
        x_t.grad = None
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-7)
    assert ledger.counts["fake_score"] == {
        "forward": 1.0,
        "input_backward": 0.5,
        "full_backward": 0.5,
    }


def test_features_run_and_cost_only_their_share_of_the_blocks(tmp_path):
    run = Runs("dmd2", tmp_path).build()
    net, batch = run.nets.unguided_teacher, run.batch("student")
    x, sigma, text = batch.noise("x"), torch.full((4,), 0.5), batch.text
    blocks_run = []
    for i, block in enumerate(net.net.blocks):
        block.register_forward_hook(lambda *_, i=i: blocks_run.append(i))
    tokens = net.features(x, sigma, text, 0.5)
    assert tokens.shape == (4, tokens.shape[1], 24)
    assert blocks_run == [0]
    assert run.ledger.counts["teacher"]["forward"] == 0.5
    x0 = net(x, sigma, text)
    assert x0.shape == x.shape
    assert blocks_run == [0, 0, 1]
    assert run.ledger.counts["teacher"]["forward"] == 1.5


def test_real_data_come_from_a_folder_and_enter_the_id_by_content(tmp_path):
    runs = Runs("consistency", tmp_path)
    run = runs.build()
    batch = run.batch("student")
    data = batch.extra("real_latents")
    assert data["x0"].shape == (4, *batch.latent_shape)
    assert torch.equal(data["x0"], batch.extra("real_latents")["x0"])
    assert run.config.data_hash != resolve({"method": "consistency"}).data_hash
    with pytest.raises(ConfigError, match=r"it lacks clips.npy, manifest.jsonl"):
        resolve({"method": "consistency", "data": str(tmp_path / "nowhere")})
    with pytest.raises(ValueError, match="render them at the run's frames"):
        runs.build(frames=9)


@pytest.mark.parametrize("check", [check_resume, check_optimiser_steps])
def test_a_run_with_an_exact_fake_score_conforms(check, tmp_path):
    class Exact(Runs):
        def make(self, **fields):
            exact = {"teacher": "gaussian", "fake_score": "exact", "data": None}
            return super().make(**exact | fields)

    check(Exact("sgmd", tmp_path))
