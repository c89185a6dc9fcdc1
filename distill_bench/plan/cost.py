"""TODO: plan.cost."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from distill_bench.networks.ledger import PASSES, Ledger

if TYPE_CHECKING:
    from distill_bench.config.schema import RunConfig


Counts = dict[str, dict[str, float]]  # role -> kind of pass -> count, as in Ledger.counts


def declared(config: "RunConfig") -> Counts:
    """The passes of one student update and its fake-score updates, by what the method declares; mean over exit steps."""
    from distill_bench.config.resolve import method_of

    cost, updates = method_of(config).cost(), config.fake_score_updates or 0
    steps = (config.nfe + 1) / 2 if config.exit_step == "random" else config.nfe
    rollout = 1.0 if config.student_input == "real_data" else steps
    counts: Counts = {}

    def add(role: str, times: float, **passes: float) -> None:
        row = counts.setdefault(role, dict.fromkeys(PASSES, 0.0))
        for kind, count in passes.items():
            row[kind] += times * count

    guided = config.guidance_scale != 1
    # what a role of a declaration is in the ledger, and how many of its passes each is
    roles = {
        "teacher": ("teacher", 1 + guided),
        "unguided_teacher": ("teacher", 1),
        "guidance": ("teacher", float(guided)),
    }
    for phase, times in ((cost.student, 1), (cost.fake_score, updates)):
        for role, passes in phase.items():
            if role == "rollout":
                add("student", times * passes.forward, forward=rollout)
                add("student", times, full_backward=passes.full_backward)
            elif role != "fake_score" or config.fake_score == "trained":
                name, each = roles.get(role, (role, 1))
                add(name, times * each, **vars(passes))
    if (
        config.adapter is not None
    ):  # no gradient of the base's weights: what a backward to the input costs
        for row in counts.values():
            row["input_backward"] += row["full_backward"]
            row["full_backward"] = 0.0
    if config.reuse_rollout and updates:
        add("student", -1, forward=rollout)
    if config.reuse_rollout == "graph" and updates:
        add("fake_score", -1, forward=cost.fake_score["fake_score"].forward)
    add("student", updates, forward=rollout)
    return counts


def priced(counts: Counts, sizes: Mapping[str, float]) -> float:
    """Forward equivalents of counts, with roles of `sizes`; a role that is not there is of the student's."""
    return sum(
        Ledger(1, dict(sizes)).weight(role) * PASSES[kind] * n
        for role, row in counts.items()
        for kind, n in row.items()
    )
