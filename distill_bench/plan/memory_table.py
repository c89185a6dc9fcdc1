"""The table of `distill-bench cost SWEEP --memory`."""

from collections.abc import Mapping

from rich.table import Table

from distill_bench.config.identity import method_title
from distill_bench.config.protocol import protocol_hash, student_key
from distill_bench.config.schema import RunConfig
from distill_bench.config.sweep_file import SweepConfig
from distill_bench.plan.cost import step_flops
from distill_bench.plan.memory import predicted
from distill_bench.plan.prediction import Prediction
from distill_bench.plan.sampling import sampling_peak

HEADINGS = (
    "weights",
    "masters",
    "gradients",
    "moments",
    "average",
    "other",
    "activations",
    "peak",
    "sampling",
    "PFLOP per update",
    "recomputed",
)


def memory_table(sweep: SweepConfig, runs: list[RunConfig]) -> Table:
    """GiB per device by kind and role, and PFLOP per student update; equal cells share a line."""
    presets = sweep.presets()
    processes = sweep.cluster.nodes * sweep.cluster.processes
    rehearsals = Rehearsals(processes)
    names_by_cells: dict[tuple[str, ...], list[str]] = {}
    for config in runs:
        updates = "" if config.fake_score_updates is None else f" x{config.fake_score_updates}"
        names = names_by_cells.setdefault(_cells(config, rehearsals), [])
        names.append(f"{method_title(config, presets)}{updates}")
    first = runs[0]
    table = Table(
        title=f"{sweep.name}: {first.frames} frames of {first.height}x{first.width}, "
        f"batch {first.batch_size} on {processes} processes; "
        "GiB on each device by student / fake score (/ teacher)"
    )
    table.add_column("method, fake-score updates")
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    for cells, names in names_by_cells.items():
        table.add_row(", ".join(dict.fromkeys(names)), *cells)
    return table


class Rehearsals:
    """Rehearses each distinct training and sampling once."""

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self.trainings: dict[str, Prediction] = {}
        self.samplings: dict[tuple[object, ...], int] = {}

    def training(self, config: RunConfig) -> Prediction:
        """Prediction for a run, shared by runs that differ only in settings that take no memory."""
        update = {"student_lr": 1.0, "fake_score_lr": 1.0, "seed": 0}
        if config.fake_score_rollouts == "sequential":
            update["fake_score_updates"] = config.fake_score_updates and 1
        key = config.model_copy(update=update).model_dump_json()
        if key not in self.trainings:
            self.trainings[key] = predicted(config, self.processes)
        return self.trainings[key]

    def sampling(self, config: RunConfig) -> int:
        """Peak bytes while the clips and references of a run are sampled."""
        key = (
            protocol_hash(config),
            student_key(config),
            config.teacher_offload,
            config.guidance_forwards,
        )
        if key not in self.samplings:
            self.samplings[key] = sampling_peak(config)
        return self.samplings[key]


def _cells(config: RunConfig, rehearsals: Rehearsals) -> tuple[str, ...]:
    """The cells of a run, in the order of HEADINGS."""
    prediction = rehearsals.training(config)
    needed, recomputed = step_flops(prediction.flops, config)
    weights = f"{_by_role(prediction.weights)} / {_gib(prediction.weights['teacher'])}"
    if prediction.held_back:
        weights += f" (host: {_gib(prediction.held_back)})"
    activations = _by_role(prediction.activations)
    if "rollouts" in prediction.activations:
        activations += f" (rollouts: {_gib(prediction.activations['rollouts'])})"
    return (
        weights,
        _by_role(prediction.masters),
        _by_role(prediction.gradients),
        _by_role(prediction.moments),
        _gib(prediction.ema),
        _gib(prediction.other),
        activations,
        _gib(prediction.peak),
        _gib(rehearsals.sampling(config)),
        f"{needed / 1e15:.3g}",
        f"{recomputed / 1e15:.3g}",
    )


def _by_role(sizes: Mapping[str, float]) -> str:
    roles = ("student", "fake_score")
    return " / ".join(_gib(sizes[role]) if role in sizes else "-" for role in roles)


def _gib(size: float) -> str:
    return "0" if size == 0 else f"{size / 2**30:.3g}"
