"""The whole family as one line of YAML: the gradient at x0 is a D + J^T (b D + lam r)."""

import ast
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator
from torch import Tensor

from distill_bench.expressions import ExpressionError, evaluate_expression
from distill_bench.method import (
    Batch,
    Cost,
    Loss,
    Method,
    Nets,
    NotNegative,
    Passes,
    Preset,
    dmd_normaliser,
    mean_per_sample,
    renoise,
)
from distill_bench.noise import over

PROBES = [
    (n, sigma) for n in (0.37, 1.73) for sigma in (0.13, 0.57, 0.91)
]  # where a coefficient must have a value


def _written(value: object) -> object:
    """A number of the YAML as the expression that it is."""
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


Coefficient = Annotated[str, BeforeValidator(_written)]


@dataclass(frozen=True)
class GradientTemplate(Method):
    """At x0: a D + J^T (b D + lam r), and J_T^T (lam (x0_teacher - x0) - b D) where the teacher is not stopped.

    D = x0_fake - x0_teacher, r = x0 - x0_fake, J and J_T are (1 - sigma) times the Jacobians of the fake score and the teacher in
    x_t; nothing else is differentiated. The coefficients are expressions in `n`, `sigma` and numbers:

        a      b                           lam        teacher_stop_gradient    is
        1/n    0                           0          true                     dmd2
        0      1/n or (1-sigma)**2/sigma**4  0          true                     tsg_fisher
        0      1/n                         0.1/sigma  true                     sgmd, as released
        1/n    (1 - 2*1.2)/n               1/n        false                    sid at alpha 1.2

    n = epsilon + mean |x0 - x0_teacher| per `sample` or over the `batch` (FastVideo's), or 1 (`none`).
    """

    paper: ClassVar[str] = (
        "none: the common form of arXiv:2311.18828, 2405.14867, 2605.30116 and 2404.04057"
    )
    presets: ClassVar[Mapping[str, Preset]] = {
        "fastvideo": Preset(
            "FastVideo@2f3d407, train/methods/distribution_matching/dmd2.py: the normaliser of the whole batch",
            {
                "method.a": "1/n",
                "method.normaliser": "batch",
                "exit_step": "last",
                "fake_score_updates": 5,
            },
        ),
        "fisher_with_teacher": Preset(
            "the Fisher divergence as it is, the teacher differentiated",
            {"method.a": "0", "method.b": "1/n", "method.teacher_stop_gradient": False},
        ),
    }

    a: Coefficient = "1/n"
    b: Coefficient = "0"
    lam: Coefficient = "0"
    normaliser: Literal["sample", "batch", "none"] = "sample"
    epsilon: NotNegative = 0.0
    teacher_stop_gradient: bool = True

    def __post_init__(self) -> None:
        for name in ("a", "b", "lam"):
            for n, sigma in PROBES:
                n = 1.0 + self.epsilon if self.normaliser == "none" else n
                try:
                    value = coefficient(getattr(self, name), n, sigma)
                except ArithmeticError as error:
                    value = str(error)
                if not isinstance(value, float) or not math.isfinite(value):
                    expression = f"{name} {getattr(self, name)!r}"
                    raise ValueError(
                        f"{expression} is no finite number at n = {n:g}, sigma = {sigma:g}: {value}"
                    )

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        x0 = nets.rollout(batch)
        through_teacher = self._jacobian and not self.teacher_stop_gradient
        scores = renoise(nets, batch, x0, self._jacobian, through_teacher)
        x0_fake, x0_teacher, clean = (
            scores.x0_fake.detach(),
            scores.x0_teacher.detach(),
            x0.detach(),
        )
        n = dmd_normaliser(clean, x0_teacher)
        if self.normaliser != "sample":
            n = nets.mean_over_ranks(n.mean()) if self.normaliser == "batch" else 1.0
        n = n + self.epsilon
        sigma = over(scores.sigma, x0)
        a, b, lam = (coefficient(each, n, sigma) for each in (self.a, self.b, self.lam))
        gap = x0_fake - x0_teacher
        # each cotangent times what it pulls back through: no surrogate, no square
        terms = {"direct": (a * gap * x0).mean()}
        if self._jacobian:
            terms["fake_score"] = ((b * gap + lam * (clean - x0_fake)) * scores.x0_fake).mean()
        if through_teacher:
            terms["teacher"] = ((lam * (x0_teacher - clean) - b * gap) * scores.x0_teacher).mean()
        return Loss(terms, x0, {"score_gap": mean_per_sample(gap.abs() / n).mean()})

    def cost(self) -> Cost:
        student = {
            "rollout": Passes(1, full_backward=1),
            "fake_score": Passes(1, float(self._jacobian)),
            "teacher": Passes(1, float(self._jacobian and not self.teacher_stop_gradient)),
        }
        return Cost(student, {"fake_score": Passes(1, full_backward=1)})

    @property
    def _jacobian(self) -> bool:
        """Whether any network's Jacobian enters: where none does, none is paid for."""
        return any(
            ast.unparse(ast.parse(each, mode="eval")) not in ("0", "0.0")
            for each in (self.b, self.lam)
        )


def _number(constant: object) -> float:
    if isinstance(constant, bool) or not isinstance(constant, int | float):
        raise ExpressionError(f"{constant!r} is no number")
    return float(constant)  # powers of integers have no bound


GRAMMAR = {
    ast.Constant: _number,
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
}


def coefficient(expression: str, n: Tensor | float, sigma: Tensor | float) -> Tensor | float:
    """Value of an expression in n, sigma, numbers, + - * / ** and brackets.

    Raises:
        ValueError: for anything else.
    """
    values = {"n": n, "sigma": sigma}

    def value_of(name: str) -> Tensor | float:
        if name not in values:
            raise ExpressionError(f"{name!r} is not allowed")
        return values[name]

    try:
        return evaluate_expression(expression, GRAMMAR, value_of)
    except ExpressionError as error:
        raise ValueError(
            f"coefficient {expression!r} may hold n, sigma, numbers and + - * / ** ( ): {error}"
        ) from error
