"""The trainer against its algorithm, written out without the trainer's parts, in float64.

The teacher is Gaussian, so networks are small enough to call directly. Every setting has a value of
its own: a learning rate, shift, weight or key of a draw that reaches another place shows.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import softplus

from distill_bench.config.resolve import resolve
from distill_bench.config.schema import RunConfig
from distill_bench.config.yaml_files import dump_yaml
from distill_bench.discriminator import Head
from distill_bench.draws import generator
from distill_bench.networks.pipeline import load_pipeline
from distill_bench.train import checkpoint
from distill_bench.train.extras import real_latents
from distill_bench.train.loop import train

FIELDS = {
    "method": {"name": "dmd2", "gan_weight": 0.3, "discriminator_weight": 0.7},
    "teacher": "gaussian",
    "precision": "float64",
    "seed": 3,
    "student_updates": 3,
    "fake_score_updates": 2,
    "batch_size": 4,
    "accumulation": 2,
    "nfe": 3,
    "shift": 3.0,
    "score_shift": 1.7,
    "sigma_min": 0.05,
    "sigma_max": 0.85,
    "guidance_scale": 2.5,
    "student_lr": 1e-2,
    "fake_score_lr": 3e-3,
    "beta1": 0.5,
    "beta2": 0.9,
    "weight_decay": 0.1,
    "grad_clip": 0.15,
    "ema": 0.8,
    "checkpoint_every": 1,
    "log_every": 1,
    "signals_every": 1,
    "trackers": [],
    "evaluations": 3,
    "protocol": {"clips": 2, "teacher_steps": 2, "evaluators": ["exact_divergence"]},
}
CASES = {
    "renoise": {},
    "ode": {"stepping": "ode", "student_updates": 4},
    "last step": {
        "exit_step": "last",
        "accumulation": 1,
        "guidance_scale": 1.0,
        "grad_clip": 0.002,
    },
    "reused samples": {"reuse_rollout": True},
    "reused samples, one update": {"reuse_rollout": True, "fake_score_updates": 1},
    "real data": {"student_input": "real_data"},
    "batched rollouts": {"fake_score_rollouts": "batched", "fake_score_updates": 3},
    "batched rollouts by ode, after reused samples": {
        "fake_score_rollouts": "batched",
        "fake_score_updates": 4,
        "reuse_rollout": True,
        "stepping": "ode",
    },
    "batched real data": {"fake_score_rollouts": "batched", "student_input": "real_data"},
    "no average": {"ema": None},
    "one level per batch": {"score_levels": "batch"},
    "gan on the fake score": {"method": FIELDS["method"] | {"gan": "fake_score"}},
    "gan on the teacher": {
        "method": FIELDS["method"] | {"gan": "teacher", "discriminator_lr": 5e-2}
    },
}


class Algorithm:
    """DMD2's alternating updates for a run's config, with the draws that its seed gives."""

    def __init__(self, config: RunConfig, store: Path) -> None:
        self.config = config
        self.pipeline = pipeline = load_pipeline("gaussian", torch.device("cpu"))
        self.text = pipeline.encode_text(pipeline.prompts()).double()
        self.teacher = pipeline.transformer.double()
        self.student, self.fake_score = pipeline.student().double(), pipeline.fake_score().double()
        steps = 1 - torch.arange(config.nfe, dtype=torch.float64) / config.nfe
        self.sigmas = shifted(steps, config.shift).float().double()
        self.average = [p.detach().clone() for p in self.student.parameters()]
        self.data = real_latents(config, pipeline, store)
        self.gan = config.method["gan"]
        with torch.random.fork_rng():
            torch.manual_seed(generator(config.seed, "modules").initial_seed())
            self.head = Head(self.text.new_zeros(pipeline.shape).numel()).double()
        head = list(self.head.parameters()) if self.gan != "none" else []
        own = config.method["discriminator_lr"]
        groups = {"student": (list(self.student.parameters()), config.student_lr)}
        if own is None:
            groups["fake"] = ([*self.fake_score.parameters(), *head], config.fake_score_lr)
        else:
            groups["fake"] = (list(self.fake_score.parameters()), config.fake_score_lr)
            groups["head"] = (head, own)
        self.optimisers = {
            name: torch.optim.AdamW(
                parameters,
                lr,
                betas=(config.beta1, config.beta2),
                weight_decay=config.weight_decay,
            )
            for name, (parameters, lr) in groups.items()
        }
        self.clipped: set[str] = set()
        self.lines: list[dict[str, float]] = []  # of train.jsonl

    def run(self) -> None:
        for update in range(self.config.student_updates):
            self.update, self.phase = update, "student"
            x0, text = self.samples()
            loss = self.student_loss(x0, text)
            self.lines.append({"student_updates": update + 1, "student_loss": float(loss.detach())})
            self.lines[-1]["x0_std"] = float(x0.detach().std(correction=0))
            self.step(["student"], loss)
            for p, average in zip(self.student.parameters(), self.average, strict=True):
                decay = self.config.ema or 0.0
                average.copy_(decay * average + (1 - decay) * p.detach())
            for index in range(self.config.fake_score_updates):
                self.phase = f"fake_score/{index}"
                if index > 0 or not self.config.reuse_rollout:
                    x0, text = self.samples()
                loss = self.fake_score_loss(x0.detach(), text)
                self.lines[-1]["fake_score_loss"] = float(loss.detach())
                self.step([name for name in self.optimisers if name != "student"], loss)

    def step(self, names: list[str], loss: Tensor) -> None:
        parameters = {n: self.optimisers[n].param_groups[0]["params"] for n in names}
        gradients = torch.autograd.grad(loss, sum(parameters.values(), []))
        for name in names:
            own, gradients = gradients[: len(parameters[name])], gradients[len(parameters[name]) :]
            norm = float(sum(g.square().sum() for g in own)) ** 0.5
            scale = min(1.0, self.config.grad_clip / (norm + 1e-6))
            self.clipped |= {name} if scale < 1 else set()
            logged = {"fake": "fake_score"}.get(name, name)
            self.lines[-1][f"{logged}_grad_norm"] = norm
            for parameter, gradient in zip(parameters[name], own, strict=True):
                parameter.grad = scale * gradient
            self.optimisers[name].step()

    # ---- losses

    def student_loss(self, x0: Tensor, text: Tensor) -> Tensor:
        with torch.no_grad():
            sigma, x_t = self.noised(x0, "renoise")
            cond = clean(self.teacher, x_t, sigma, text)
            uncond = clean(self.teacher, x_t, sigma, torch.zeros_like(text))
            x0_teacher = uncond + self.config.guidance_scale * (cond - uncond)
            n = (x0 - x0_teacher).abs().mean((1, 2, 3, 4), keepdim=True)
            gradient = (clean(self.fake_score, x_t, sigma, text) - x0_teacher) / n
        loss = (gradient * x0).mean()
        if self.gan != "none":
            sigma, x_t = self.noised(x0, "gan")
            loss = loss + 0.3 * softplus(-self.logits(x_t, sigma, text)).mean()
        return loss

    def fake_score_loss(self, x0: Tensor, text: Tensor) -> Tensor:
        sigma, x_t = self.noised(x0, "denoise")
        velocity = self.fake_score(x_t, 1000 * sigma, text)[0]
        loss = 0.5 * (velocity - (x_t - x0) / column(sigma)).square().mean()
        if self.gan != "none":
            rows = self.integers("real_latents", len(self.data.text_of_row))
            real = self.data.tensors["x0"][rows].double()
            real_text = self.text[[self.data.text_of_row[row] for row in rows]]
            sigma, x_t = self.noised(x0, "gan")
            fake_logits = self.logits(x_t, sigma, text)
            sigma, x_t = self.noised(real, "gan_real")
            real_logits = self.logits(x_t, sigma, real_text)
            loss = loss + 0.7 * (softplus(fake_logits) + softplus(-real_logits)).mean()
        return loss

    def logits(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        net = self.fake_score if self.gan == "fake_score" else self.teacher
        return self.head(net(x_t, 1000 * sigma, text)[0].flatten(1)[:, None])

    # ---- samples and draws

    def samples(self) -> tuple[Tensor, Tensor]:
        """The student's samples (B, C, T, H, W) and their text (B, 1, E)."""
        if self.config.student_input == "real_data":
            rows = self.integers("real_latents", len(self.data.text_of_row))
            text = self.text[[self.data.text_of_row[row] for row in rows]]
        else:
            text = self.text[self.integers("prompt", len(self.text))]
        exits = self.config.nfe if self.config.exit_step == "random" else 1
        step = int(torch.randint(exits, (), generator=self.generator("exit")))
        step += self.config.nfe - exits
        if self.config.student_input == "real_data":
            sigma = self.sigmas[step].expand(4)
            x_t = (1 - column(sigma)) * self.data.tensors["x0"][rows].double()
            x_t = x_t + column(sigma) * self.noise("rollout/0")
            return clean(self.student, x_t, sigma, text), text
        x_t = self.noise("rollout/0")
        for high, low, index in zip(self.sigmas, self.sigmas[1:], range(step), strict=False):
            x0 = clean(self.student, x_t, high.expand(4), text).detach()
            if self.config.stepping == "renoise":
                x_t = (1 - low) * x0 + low * self.noise(f"rollout/{index + 1}")
            else:
                x_t = x0 + low * (x_t - x0) / high
        return clean(self.student, x_t, self.sigmas[step].expand(4), text), text

    def noised(self, x0: Tensor, purpose: str) -> tuple[Tensor, Tensor]:
        c = self.config
        keys = [self.generator(f"{purpose}/sigma", index) for index in range(4)]
        if c.score_levels == "batch":
            keys = [self.generator(f"{purpose}/sigma") for _ in range(4)]
        uniform = torch.stack([torch.rand((), generator=key) for key in keys]).double()
        sigma = shifted(uniform, c.score_shift).clamp(c.sigma_min, c.sigma_max)
        s = column(sigma)
        return sigma, (1 - s) * x0 + s * self.noise(f"{purpose}/noise")

    def noise(self, purpose: str) -> Tensor:
        keys = [self.generator(purpose, index) for index in range(4)]
        shape = self.pipeline.shape
        return torch.stack([torch.randn(shape, generator=key) for key in keys]).double()

    def integers(self, purpose: str, high: int) -> list[int]:
        keys = [self.generator(purpose, index) for index in range(4)]
        return [int(torch.randint(high, (), generator=key)) for key in keys]

    def generator(self, purpose: str, *index: int) -> torch.Generator:
        return generator(self.config.seed, self.update, self.phase, purpose, *index)


def shifted(sigma: Tensor, shift: float) -> Tensor:
    return 1 / (1 + (1 / sigma - 1) / shift)


def column(sigma: Tensor) -> Tensor:
    return sigma.reshape(-1, 1, 1, 1, 1)


def clean(net: nn.Module, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
    return x_t - column(sigma) * net(x_t, 1000 * sigma, text)[0]


@pytest.mark.parametrize("case", CASES)
def test_a_run_ends_with_the_weights_of_its_algorithm(case, tmp_path):
    """Stopped and resumed after its first update; the clips' student is the moving average."""
    config = resolve(FIELDS | CASES[case])
    run = tmp_path / "runs" / "run"
    run.mkdir(parents=True)
    (run / "run.yaml").write_text(dump_yaml(config.model_dump(mode="json")))
    assert train(run, stop=lambda: True)["status"] == "stopped"
    summary = train(run)
    assert summary["status"] == "done"
    algorithm = Algorithm(config, run.parent)
    algorithm.run()
    assert algorithm.clipped >= {"student", "fake"}
    weights = load_file(checkpoint.folders(run)[-1] / "weights.safetensors")
    kept = load_file(checkpoint.students(run)[config.student_updates])
    names = [name for name, _ in algorithm.student.named_parameters()]
    expected = {f"student.{name}": p for name, p in algorithm.student.named_parameters()}
    expected |= {f"fake_score.{name}": p for name, p in algorithm.fake_score.named_parameters()}
    if config.method["gan"] != "none":
        expected |= {f"modules.head.{name}": p for name, p in algorithm.head.named_parameters()}
    for name, parameter in expected.items():
        torch.testing.assert_close(
            weights[name],
            parameter.detach(),
            rtol=0,
            atol=1e-9,
            msg=lambda m, name=name: f"{name}: {m}",
        )
    for name, average in zip(names, algorithm.average, strict=True):
        torch.testing.assert_close(kept[name], average, rtol=0, atol=1e-9)

    records = (run / "train.jsonl").read_text().splitlines()
    check_records(config, summary, [json.loads(line) for line in records], algorithm.lines)


def check_records(
    config: RunConfig, summary: dict, lines: list[dict], expected: list[dict]
) -> None:
    """One line per update with the values of the whole batch; costs and samples of every update."""
    assert len(lines) == len(expected) == config.student_updates
    for line, values in zip(lines, expected, strict=True):
        # DMD's surrogate has the gradient of the reverse KL, but another value
        kl_free = {name: value for name, value in values.items() if name != "student_loss"}
        assert {name: line[name] for name in kl_free} == pytest.approx(kl_free, rel=1e-6)
        terms = line["kl"] + line.get("gan", 0.0)
        assert line["student_loss"] == pytest.approx(terms)
        assert line["rho"] == pytest.approx(config.fake_score_updates * 3e-3 / 1e-2)
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    assert len(set(seconds)) > 1
    updates = config.student_updates
    assert summary["samples_seen"] == 4 * updates
    assert summary["cost"]["student"]["full_backward"] == pytest.approx(updates)
    if config.method["gan"] == "none":
        guided = 2 if config.guidance_scale != 1 else 1
        assert summary["cost"]["teacher"] == {
            "forward": guided * updates,
            "input_backward": 0,
            "full_backward": 0,
        }
        full = config.fake_score_updates * updates
        assert summary["cost"]["fake_score"]["full_backward"] == pytest.approx(full)
