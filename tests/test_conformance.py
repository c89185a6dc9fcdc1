"""The built-in methods pass the conformance tests by the call that a stranger makes, and broken ones are found."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
from torch import nn

from distill_bench import testing
from distill_bench.method import Batch, Cost, Loss, Method, Nets, Passes, renoise, toward
from distill_bench.registry import methods

VARIANTS = [
    *methods(),
    {"name": "dmd2", "preset": "paper"},
    {"name": "dmd2", "preset": "fastgen", "r1_weight": 1.0},
    {"name": "sgmd", "weighting": "c_t_batchnorm", "residual_space": "x0", "correction": "x0"},
    {"name": "gradient_template", "a": "1/n", "b": "-1/n", "lam": "1/n", "teacher_stop_gradient": False},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("conformance")


@pytest.mark.parametrize("method", VARIANTS, ids=lambda m: m if isinstance(m, str) else "-".join(map(str, m.values())))
def test_every_built_in_method_conforms(method, tmp_path):
    testing.check_methods(method, folder=tmp_path, ranks=False)


def test_two_ranks_end_where_one_does(folder):
    """One launch for all: starting two processes takes longer than their work."""
    testing.check_two_ranks(*VARIANTS, folder=folder)


@dataclass(frozen=True)
class Broken(Method):
    """DMD2 with one fault at a time."""

    paper: ClassVar[str] = "none"
    fault: str = "cost"

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        x0 = nets.rollout(batch)
        if self.fault in ("leak", "leak to the teacher"):
            role = nets.fake_score if self.fault == "leak" else nets.unguided_teacher
            role.net.requires_grad_(True)
            return Loss({"kl": role(x0, batch.sigma("s"), batch.text).square().mean()}, x0)
        if self.fault == "not detached":
            scores = renoise(nets, batch, x0, through_fake_score=True, through_teacher=True)
            return Loss({"kl": ((scores.x0_fake - scores.x0_teacher) * x0).mean()}, x0)
        scores = renoise(nets, batch, x0, through_fake_score=self.fault == "cost")
        return Loss({"kl": toward(x0, scores.x0_fake.detach() - scores.x0_teacher)}, x0)

    def fake_score_loss(self, nets: Nets, batch: Batch, x0) -> Loss:
        if self.fault == "routing":
            x0 = x0 + 0 * nets.student(x0, batch.sigma("s"), batch.text)
        return super().fake_score_loss(nets, batch, x0)

    def cost(self) -> Cost:
        if self.fault != "cost":
            return super().cost()
        student = {"rollout": Passes(1, full_backward=1), "fake_score": Passes(1, 1), "teacher": Passes(1)}
        return Cost(student, {"fake_score": Passes(1, full_backward=1)})

    def after_student_update(self, networks: Mapping[str, nn.Module]) -> None:
        if self.fault == "resume":
            self.__dict__["seen"] = self.__dict__.get("seen", 0) + 1  # state that no checkpoint knows
            next(networks["student"].parameters()).add_(0.01 * self.__dict__["seen"])


@pytest.mark.parametrize(
    ("fault", "check", "says"),
    [
        ("cost", testing.check_cost, "the ledger counted"),
        ("not detached", testing.check_cost, "of fake_score, the ledger counted .*'input_backward': 1.0"),
        ("leak", testing.check_routing, "the student's phase leaves a gradient on fake_score"),
        ("leak", testing.check_detachment, "the student's loss has a graph to weights of fake_score"),
        ("leak to the teacher", testing.check_detachment, "the student's loss has a graph to weights of teacher"),
        ("routing", testing.check_cost, "the ledger counted"),
        ("resume", testing.check_resume, "a run stopped after each update"),
    ],
)
def test_a_fault_is_found(fault, check, says, folder):
    runs = testing.Runs({"name": f"{__file__}:Broken", "fault": fault}, folder, f"broken-{fault}-{check.__name__}")
    with pytest.raises(AssertionError, match=says):
        check(runs)
