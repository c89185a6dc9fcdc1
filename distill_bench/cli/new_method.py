"""Write a commented file of a method: `distill-bench new-method NAME`."""

from distill_bench.cli.new_file import write_from

TEMPLATE = '''\
"""One line: the idea of $name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from distill_bench.method import (
    Batch,
    Loss,
    Method,
    Nets,
    NotNegative,
    Preset,
    Scales,
    dmd_normaliser,
    renoise,
    toward,
    velocity_loss,
)


@dataclass(frozen=True)
class $title(Method):
    """Gradient weight * (x0_fake - x0_teacher) / n at x0; n = mean |x0 - x0_teacher| per sample.

    State the formula in the first line: `distill-bench list` shows it. Settings that must be equal
    between methods (noise levels, rollout, guidance, learning rates, cadence) are keys of the run.
    """

    # A `Citation` (of distill_bench.method) lets `distill-bench cite` print BibTeX.
    paper: ClassVar[str] = "none"
    # Raise it when the numbers change: it is part of a run's id.
    version: ClassVar[int] = 1
    # Named settings with their source: `method: {name: $place, preset: frequent}`.
    presets: ClassVar[Mapping[str, Preset]] = {
        "frequent": Preset("none", {"method.weight": 0.5, "fake_score_updates": 5}),
    }

    # Every field is a key of a sweep (`method.weight: [0.5, 1]`), its type is checked, and it must
    # have an effect. A number states its direction: `Scales` says that it is the weight of the term
    # "kl"; `Raises`, `Lowers`, `Equals` and `NoDirection` are in distill_bench/fields.py.
    weight: Annotated[NotNegative, Scales("kl")] = 1.0

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        """Loss of the student's phase; tensors are (B, C, T, H, W)."""
        # Samples of the student, with their graph.
        x0 = nets.rollout(batch)
        # Both scores on the renoised samples. To differentiate through the fake score, pass x0
        # itself with through_fake_score=True and name it in `differentiated_roles`.
        scores = renoise(nets, batch, x0.detach(), through_fake_score=False)
        gap = scores.x0_fake - scores.x0_teacher
        term = self.weight * toward(x0, gap / dmd_normaliser(x0, scores.x0_teacher))
        # Terms by name: their sum is differentiated, and each is logged.
        return Loss({"kl": term}, x0, {"score_gap": gap.abs().mean()})

    def fake_score_loss(self, nets: Nets, batch: Batch, x0) -> Loss:
        """Loss of a fake-score update on detached samples x0; this is the default."""
        return Loss({"denoise": velocity_loss(nets.fake_score, batch, x0)})

    # Optional, see distill_bench/method.py: `modules` and `learning_rates` for networks of your
    # own (a GAN head), `needs` for real latents or ODE pairs, `after_student_update` for a hook,
    # `packages` for imports that must be installed, `has_fake_score = False` for no fake score.
'''


def main(argv: list[str] | None = None) -> int:
    """Write the file; returns the exit code."""
    return write_from("new-method", TEMPLATE, "method: $place, in a sweep file", argv)


if __name__ == "__main__":
    raise SystemExit(main())
