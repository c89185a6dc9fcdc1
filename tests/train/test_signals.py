"""Diagnostic signals: their definitions on given predictions, and what a run lends to them."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from distill_bench.draws import Draws, generator
from distill_bench.method import Batch, Loss, Method, Nets
from distill_bench.noise import add_noise
from distill_bench.testing.runs import Runs
from distill_bench.train.signals import gradient_signals, score_signals, signals, signals_of

SHAPE, B = (2, 1, 2, 1), 8
DRAWS = Draws(0, 0, "signals", range(B), torch.device("cpu"), torch.float64)
TEXT = DRAWS.noise("text", (1, 1))
BATCH = Batch(TEXT, DRAWS, SHAPE, 2.0, 0.1, 0.9)
X0, FAKE, TEACHER, EXACT = (DRAWS.noise(name, SHAPE) for name in ("x0", "fake", "teacher", "exact"))
BINS = ["0.10-0.30", "0.30-0.50", "0.50-0.70", "0.70-0.90"]
GAUSSIAN = {"teacher": "gaussian", "data": None}


def test_gradients_of_terms_at_x0_are_measured_and_compared():
    """A norm is the root mean square times the elements; terms apart from x0 have no signals."""
    x0, elsewhere = X0.clone().requires_grad_(), torch.ones((), requires_grad=True)
    a, b, c = (DRAWS.noise(name, SHAPE) for name in ("a", "b", "c"))
    shared = x0.square() / 2  # part of two terms' graphs
    terms = {
        "a": (a / X0 * shared).sum(),
        "detached": x0.detach().sum(),
        "b": (b / X0 * shared).sum(),
        "elsewhere": elsewhere.square(),
        "c": (c * x0).sum(),
    }
    values = gradient_signals(terms, x0)
    expected = {
        f"x0_gradient_norm/{name}": float(g.square().mean().sqrt()) * g.numel()
        for name, g in (("a", a), ("b", b), ("c", c))
    }
    for name, first, second in (("a/b", a, b), ("a/c", a, c), ("b/c", b, c)):
        cosine = cosine_similarity(first.flatten(), second.flatten(), 0)
        expected[f"x0_gradient_cosine/{name}"] = float(cosine)
    assert values == pytest.approx(expected)
    assert x0.grad is None


class Given:
    """A denoiser with a given prediction; it keeps its inputs."""

    def __init__(self, x0: Tensor) -> None:
        self.x0 = x0

    def __call__(self, *inputs: Tensor) -> Tensor:
        self.inputs = inputs
        return self.x0


@pytest.mark.parametrize("exact", [None, Given(EXACT)])
def test_scores_are_compared_in_bins_of_equal_width_between_the_lowest_and_highest_level(exact):
    """Samples i, i + 4 fall in bin i, and every network sees the same noised samples."""
    fake, teacher = Given(FAKE), Given(TEACHER)
    nets = SimpleNamespace(fake_score=fake, teacher=teacher)
    values = score_signals(nets, BATCH, X0, exact)
    x_t, sigma, text = fake.inputs
    assert text is TEXT
    torch.testing.assert_close(x_t, add_noise(X0, BATCH.noise("signals/noise"), sigma))
    for other in (teacher, exact or fake):
        assert all(map(torch.equal, other.inputs, fake.inputs))
    place = (sigma - 0.1) / 0.2
    torch.testing.assert_close(place - torch.arange(B) % 4, DRAWS.uniform("signals/sigma"))
    by_sample = {
        "score_gap": (FAKE - TEACHER).abs().flatten(1).mean(1)
        / (X0 - TEACHER).abs().flatten(1).mean(1),
        "fake_score_error": (X0 - FAKE).square().flatten(1).mean(1),
        "tracking_lag": (EXACT - FAKE).square().flatten(1).mean(1),
    }
    if exact is None:
        del by_sample["tracking_lag"]
    assert values == pytest.approx(
        {
            f"{name}/sigma_{BINS[i]}": float((value[i] + value[i + 4]) / 2)
            for name, value in by_sample.items()
            for i in range(4)
        }
    )


@dataclass(frozen=True)
class Sized(Method):
    """A method whose loss is the size of its samples, which it may keep to itself."""

    paper: ClassVar[str] = "none"
    seen: ClassVar[list[Tensor]] = []
    gives_x0: bool = True

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        x0 = nets.rollout(batch)
        if nets.exit_sigma is not None:
            self.seen.append(nets.exit_sigma(batch))
        elsewhere = torch.ones((), requires_grad=True).square()  # a term without x0
        terms = {"size": x0.square().sum(), "elsewhere": elsewhere}
        return Loss(terms, x0 if self.gives_x0 else None)


@pytest.mark.parametrize("gives_x0", [True, False])
@pytest.mark.parametrize("has_graph", [True, False])
@pytest.mark.parametrize("has_fake_score", [True, False])
def test_a_run_has_the_signals_that_its_method_allows(gives_x0, has_graph, has_fake_score):
    x0 = X0.clone().requires_grad_(has_graph)
    fake = Given(FAKE) if has_fake_score else None
    nets = Nets(Given(X0), fake, Given(TEACHER), rollout=lambda _: x0)
    values = signals(Sized(gives_x0), nets, BATCH, Given(EXACT))
    kinds = {key.partition("/")[0] for key in values}
    expected = {"x0_gradient_norm"} if has_graph else set()
    if has_fake_score:
        expected |= {"score_gap", "fake_score_error", "tracking_lag"}
    assert kinds == (expected if gives_x0 else set())


def test_signals_are_taken_at_the_last_step_on_eight_samples_that_never_change(tmp_path):
    """Also where the training would draw another exit, and after the fake score's phase."""
    run = Runs(f"{__file__}:Sized", tmp_path).build(**GAUSSIAN, nfe=4, seed=4)
    seen, levels = run.method.seen, []
    seen.clear()
    velocity = run.nets.student.velocity
    inputs = []
    run.nets.student.velocity = lambda x, sigma, text: (
        levels.append(sigma) or inputs.append(x) or velocity(x, sigma, text)
    )
    run.update_student()
    run.update_fake_score(0)  # freezes the student
    levels.clear()
    inputs.clear()
    first = signals_of(run)
    keys = [generator(4, 0, "signals", "rollout/0", index) for index in range(8)]
    noise = [torch.randn(run.batches.latent_shape, generator=key) for key in keys]
    assert torch.equal(inputs[0], torch.stack(noise)), "keyed as no draw of an update"
    assert [level.tolist() for level in levels] == [
        [float(sigma)] * 8 for sigma in run.student_input.exit_step.sigmas
    ]
    assert first["x0_gradient_norm/size"] > 0
    assert {key.partition("/")[0] for key in first} >= {"score_gap", "tracking_lag"}
    run.student_updates = 3
    assert signals_of(run) == first
    last = run.student_input.exit_step.sigmas[-1].expand(8)
    assert [level.tolist() for level in seen[-2:]] == [last.tolist()] * 2
    batch = run.batches.drawn(0, "signals", range(8))
    assert not torch.equal(run.nets.exit_sigma(batch), last)
    assert run.student_input.exit_step.steps == [0, 1, 2, 3]


@pytest.mark.parametrize("fails", [False, True])
def test_signals_leave_cost_and_modules_as_they_were_even_if_they_fail(fails, tmp_path):
    """f-distill's loss moves its averages of density ratios."""
    run = Runs("f_distill", tmp_path).build(**GAUSSIAN)
    run.update_student()
    counts = {role: dict(row) for role, row in run.ledger.counts.items()}
    ratio = run.networks["modules"]["histogram"].ratio
    before = ratio.clone()
    if fails:
        method = run.method

        def failing(*inputs):
            method.student_loss(*inputs)
            assert not torch.equal(ratio, before)
            raise ArithmeticError

        run.method = SimpleNamespace(student_loss=failing)
        with pytest.raises(ArithmeticError):
            signals_of(run)
        run.method = method
    else:
        signals_of(run)
    assert run.ledger.counts == counts
    assert torch.equal(ratio, before)
    run.update_student()
    assert run.ledger.counts["student"]["full_backward"] == 2
