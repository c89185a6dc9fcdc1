"""The built-in methods pass the conformance checks, and planted faults are found."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
from torch import nn

from distill_bench.method import Batch, Loss, Method, Nets, mean_per_sample, renoise, toward
from distill_bench.noise import add_noise
from distill_bench.registry import methods
from distill_bench.testing import checks, ranks
from distill_bench.testing.runs import Runs
from distill_bench.train.loop import train

VARIANTS = [
    *methods(),
    {"name": "dmd2", "preset": "paper", "r1_weight": 1.0},
    {"name": "dmd2", "preset": "fastgen", "r1_weight": 1.0},
    {"name": "sgmd", "weighting": "c_t_batchnorm", "residual_space": "x0", "correction": "x0"},
    {
        "name": "gradient_template",
        "a": "1/n",
        "b": "-1/n",
        "lam": "1/n",
        "teacher_stop_gradient": False,
    },
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("conformance")


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", VARIANTS, ids=lambda m: m if isinstance(m, str) else "-".join(map(str, m.values()))
)
def test_every_built_in_method_conforms(method, tmp_path):
    checks.check_methods(method, folder=tmp_path, ranks=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # longer than the check's own timeout, which names the method
def test_two_ranks_end_where_one_does(folder):
    """One launch for all, as starting processes takes longest; the last method differs by rank."""
    others = [{"name": f"{__file__}:Broken", "fault": fault} for fault in ("none", "rank")]
    with pytest.raises(
        AssertionError,
        match=r":Broken, rank: check_two_ranks: two ranks, \S+ is off by (0\.000\d|\d\S*e-05)",
    ):
        ranks.check_two_ranks(*VARIANTS, *others, folder=folder)


@pytest.mark.slow
def test_two_ranks_that_hang_are_a_failure_of_the_method(tmp_path):
    with pytest.raises(AssertionError, match=r"^dmd2: check_two_ranks: not done after 0\.5 s"):
        ranks.check_two_ranks("dmd2", folder=tmp_path, timeout=0.5)


SAYS = {  # fault of the whole loss -> error message
    "nan": "the student's loss: term 'kl' is nan",
    "no gradient": r"the student's loss has no gradient: no term of \['kl'\] has a graph",
    "no scalar": r"the student's loss: term 'kl' is not a scalar but torch.Size\(\[4\]\)",
    "cut": "no term has a gradient at Loss.x0",
    "lost": "makes a rollout, but Loss.x0 is None",
    "raises": "KeyError: 'raises'",
}


@dataclass(frozen=True)
class Broken(Method):
    """DMD2 with one fault at a time."""

    paper: ClassVar[str] = "none"
    fault: str = "none"

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        if self.fault == "no samples":
            x_t, sigma = batch.noise("x"), batch.sigma("s")
            return Loss({"regression": nets.student(x_t, sigma, batch.text).square().mean()})
        x0 = nets.rollout(batch)
        if self.fault in ("none", "rank"):
            scores = renoise(nets, batch, x0, through_fake_score=True)
            scale = 0.7 + 0.1 * (self.fault == "rank") * int(os.environ.get("RANK", 0))
            return Loss({"gap": scale * (scores.x0_fake - scores.x0_teacher).square().mean()}, x0)
        if self.fault in SAYS:
            given = {
                "nan": float("nan") * x0.mean(),
                "no gradient": x0.detach().mean(),
                "no scalar": x0.mean((1, 2, 3, 4)),
            }
            if self.fault == "raises":
                raise KeyError(self.fault)
            return Loss(
                {"kl": given.get(self.fault, x0.mean())},
                {"cut": x0.detach(), "lost": None}.get(self.fault, x0),
            )
        if self.fault == "normaliser":
            scores = renoise(nets, batch, x0.detach(), through_fake_score=False)
            x_t = add_noise(x0, batch.noise("renoise/noise"), scores.sigma)
            n = mean_per_sample((x0 - nets.teacher(x_t, scores.sigma, batch.text)).abs())
            return Loss({"kl": ((scores.x0_fake - scores.x0_teacher) * x0 / n).mean()}, x0)
        if self.fault in ("leak", "leak to the teacher"):
            role = nets.fake_score if self.fault == "leak" else nets.unguided_teacher
            role.net.requires_grad_(True)
            return Loss({"kl": role(x0, batch.sigma("s"), batch.text).square().mean()}, x0)
        if self.fault == "not detached":
            scores = renoise(nets, batch, x0, through_fake_score=True, through_teacher=True)
            return Loss({"kl": ((scores.x0_fake - scores.x0_teacher) * x0).mean()}, x0)
        scores = renoise(nets, batch, x0, through_fake_score=self.fault == "declared in vain")
        if self.fault == "cost" and len(batch.text) > 2:  # not in a rehearsal, whose batch is 2
            renoise(nets, batch, x0.detach(), through_fake_score=False)
        return Loss({"kl": toward(x0, scores.x0_fake.detach() - scores.x0_teacher)}, x0)

    def fake_score_loss(self, nets: Nets, batch: Batch, x0) -> Loss:
        if self.fault == "routing":
            x0 = x0 + 0 * nets.student(x0, batch.sigma("s"), batch.text)
        return super().fake_score_loss(nets, batch, x0)

    @property
    def differentiated_roles(self) -> frozenset[str]:
        through = self.fault in ("declared in vain", "none", "rank")
        return frozenset({"fake_score"} if through else ())

    def after_student_update(self, networks: Mapping[str, nn.Module]) -> None:
        if self.fault == "resume":
            # state that is in no checkpoint
            self.__dict__["seen"] = self.__dict__.get("seen", 0) + 1
            next(networks["student"].parameters()).add_(0.01 * self.__dict__["seen"])


@pytest.mark.parametrize(
    ("fault", "check", "says"),
    [
        ("cost", checks.check_cost, "the ledger counted"),
        (
            "declared in vain",
            checks.check_detachment,
            "differentiated_roles has fake_score, whose input the student's loss does not reach",
        ),
        (
            "not detached",
            checks.check_detachment,
            "reaches the input of fake_score, which differentiated_roles lacks",
        ),
        ("leak", checks.check_routing, "the student's phase leaves a gradient on fake_score"),
        (
            "leak",
            checks.check_detachment,
            "the student's loss has a graph to weights of fake_score",
        ),
        (
            "leak to the teacher",
            checks.check_detachment,
            "the student's loss has a graph to weights of teacher",
        ),
        ("routing", checks.check_detachment, "the fake score's loss runs the student"),
        ("resume", checks.check_resume, "a run stopped after each update"),
        (
            "normaliser",
            checks.check_detachment,
            "reaches the input of teacher, which differentiated_roles lacks",
        ),
        (
            "nan",
            checks.check_routing,
            r"Collapsed: the gradient of the student is nan \(not finite: student_loss, kl\)",
        ),
        ("nan", checks.check_cost, "with the base: the gradient of the student is nan"),
        (
            "no gradient",
            checks.check_routing,
            r"ValueError: .*Broken: the student loss \(kl\) has no gradient",
        ),
        *((fault, checks.check_losses, says) for fault, says in SAYS.items()),
    ],
)
def test_a_fault_is_found(fault, check, says, folder):
    runs = Runs(
        {"name": f"{__file__}:Broken", "fault": fault}, folder, f"broken-{fault}-{check.__name__}"
    )
    with pytest.raises(
        AssertionError, match=f"^{re.escape(runs.name)}: {check.__name__}: .*{says}"
    ):
        check(runs)


def test_a_method_may_make_no_samples_of_its_own_and_then_has_none_to_reuse(folder):
    runs = Runs({"name": f"{__file__}:Broken", "fault": "no samples"}, folder, "no-samples")
    for check in (checks.check_losses, checks.check_cost):
        check(runs)
    with pytest.raises(
        ValueError,
        match="Broken: the student's phase makes no samples to reuse; set `reuse_rollout: false`",
    ):
        train(runs.make(reuse_rollout=True))


def test_a_check_needs_a_method_and_an_empty_folder(tmp_path):
    with pytest.raises(TypeError, match=r"a method is a name, a class or a mapping, not \['dmd'\]"):
        checks.check_methods(["dmd"], ranks=False)
    (tmp_path / "runs").mkdir()
    with pytest.raises(FileExistsError, match="earlier check; give an empty folder"):
        checks.check_methods("dmd", folder=tmp_path, ranks=False)
