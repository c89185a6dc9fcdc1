"""A whole family of gradients in one line of YAML: a D + J^T (b D + lam r) at x0."""

import ast
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field
from torch import Tensor

from distill_bench.expressions import ExpressionError, evaluate_expression
from distill_bench.method import (
    Batch,
    Loss,
    Lowers,
    Method,
    Nets,
    NotNegative,
    Preset,
    dmd_normaliser,
    mean_per_sample,
    renoise,
)
from distill_bench.noise import over

# (n, sigma) at which every coefficient must be finite
PROBES = [(n, sigma) for n in (0.37, 1.73) for sigma in (0.13, 0.57, 0.91)]


# a number in the YAML becomes an expression
Coefficient = Annotated[str, BeforeValidator(str), Field(examples=["1/n", "0.5 * sigma"])]


@dataclass(frozen=True)
class GradientTemplate(Method):
    """Gradient a D + J^T (b D + lam r) at x0, with D = x0_fake - x0_teacher and r = x0 - x0_fake.

    If the teacher is not stopped, J_T^T (lam (x0_teacher - x0) - b D) is added. J and J_T are
    (1 - sigma) times the Jacobians of the fake score and the teacher in x_t; nothing else is
    differentiated. The coefficients are expressions in `n`, `sigma` and numbers:

        a      b                           lam        teacher_stop_gradient    is
        1/n    0                           0          true                     dmd2
        0      1/n or (1-sigma)**2/sigma**4  0          true                     tsg_fisher
        0      1/n                         0.1/sigma  true                     sgmd, as released
        1/n    (1 - 2*1.2)/n               1/n        false                    sid at alpha 1.2

    n = epsilon + mean |x0 - x0_teacher| per `sample` or over the `batch` (FastVideo's), or
    n = epsilon + 1 (`none`).
    """

    paper: ClassVar[str] = (
        "none: the common form of arXiv:2311.18828, 2405.14867, 2605.30116 and 2404.04057"
    )
    title: ClassVar[str] = "Gradient template"
    presets: ClassVar[Mapping[str, Preset]] = {
        "fastvideo": Preset(
            "FastVideo@2f3d407, train/methods/distribution_matching/dmd2.py, rollout_mode simulate",
            {
                "method.a": "1/n",
                "method.normaliser": "batch",
                "exit_step": "random",
                "score_levels": "batch",
                "fake_score_updates": 5,
            },
        ),
        "fisher_with_teacher": Preset(
            "the Fisher divergence, differentiated through the teacher too",
            {"method.a": "0", "method.b": "1/n", "method.teacher_stop_gradient": False},
        ),
    }

    a: Coefficient = "1/n"
    b: Coefficient = "0"
    lam: Coefficient = "0"
    normaliser: Literal["sample", "batch", "none"] = "sample"
    epsilon: Annotated[
        NotNegative, Lowers("gradient/direct", "gradient/fake_score", "gradient/teacher")
    ] = 0.0
    teacher_stop_gradient: bool = True

    def __post_init__(self) -> None:
        for name in ("a", "b", "lam"):
            for n, sigma in PROBES:
                n = 1.0 + self.epsilon if self.normaliser == "none" else n
                try:
                    value = coefficient(getattr(self, name), n, sigma)
                except ArithmeticError as error:
                    value = str(error)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
                if not isinstance(value, float) or not math.isfinite(value):
                    raise ValueError(
                        f"{name} {getattr(self, name)!r} is not a finite number "
                        f"at n = {n:g}, sigma = {sigma:g}: {value}"
                    )

    @property
    def differentiated_roles(self) -> frozenset[str]:
        if not self._jacobian:
            return frozenset()
        return frozenset(
            {"fake_score"} if self.teacher_stop_gradient else {"fake_score", "teacher"}
        )

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        x0 = nets.rollout(batch)
        through_teacher = self._jacobian and not self.teacher_stop_gradient
        scores = renoise(nets, batch, x0, self._jacobian, through_teacher)
        x0_fake, x0_teacher = scores.x0_fake.detach(), scores.x0_teacher.detach()
        clean = x0.detach()
        n = dmd_normaliser(clean, x0_teacher)
        if self.normaliser != "sample":
            n = nets.mean_over_ranks(n.mean()) if self.normaliser == "batch" else 1.0
        n = n + self.epsilon
        sigma = over(scores.sigma, x0)
        a, b, lam = (coefficient(text, n, sigma) for text in (self.a, self.b, self.lam))
        gap = x0_fake - x0_teacher
        # each cotangent times the prediction that it is pulled back through
        terms = {"direct": (a * gap * x0).mean()}
        if self._jacobian:
            terms["fake_score"] = ((b * gap + lam * (clean - x0_fake)) * scores.x0_fake).mean()
        if through_teacher:
            terms["teacher"] = ((lam * (x0_teacher - clean) - b * gap) * scores.x0_teacher).mean()
        return Loss(terms, x0, {"score_gap": mean_per_sample(gap.abs() / n).mean()})

    @property
    def _jacobian(self) -> bool:
        """True if a Jacobian enters; otherwise no backward through the networks is needed."""
        return any(
            ast.unparse(ast.parse(text, mode="eval")) not in ("0", "0.0")
            for text in (self.b, self.lam)
        )


def _number(constant: object) -> float:
    if isinstance(constant, bool) or not isinstance(constant, int | float):
        raise ExpressionError(f"{constant!r} is no number")
    return float(constant)  # powers of Python integers have no size limit


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
