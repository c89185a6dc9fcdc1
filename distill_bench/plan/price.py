"""Predict the device-hours of runs by stage: from similar finished runs, or from FLOPs and an MFU.

Stages: `train`; `sample`, the student's clips at every evaluation; `evaluate`, their scores; and
`references`, the teacher's clips of the protocol, which all runs of a sweep share. FLOPs of
evaluators are unknown, so only finished runs with the same evaluators tell the cost of `evaluate`.
Costs of clips are proportional to their number; further ways of sampling and rows that train
nothing (`sampling`, `rows`) cost as much more than a run's own clips as their FLOPs are more.
"""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from rich.table import Table

from distill_bench.config.cluster import ClusterConfig
from distill_bench.config.errors import ConfigError
from distill_bench.config.identity import cost_key, group_id, method_title
from distill_bench.config.overrides import run_value
from distill_bench.config.protocol import protocol, protocol_hash
from distill_bench.config.resolve import evaluated_updates, stored_config
from distill_bench.config.rows.row import UNTRAINED
from distill_bench.config.rows.sampling import Sampling, further_samplings, own_sampling
from distill_bench.config.schema import ProtocolConfig, RunConfig
from distill_bench.config.sweep_file import SweepConfig
from distill_bench.plan.cost import passes, step_flops
from distill_bench.store.files import read_record
from distill_bench.store.runs import read_result
from distill_bench.teachers.folder import TeacherError
from distill_bench.teachers.kinds import find_teacher

STAGES = ("train", "sample", "evaluate", "references")
# of a protocol, without effect on the cost of a reference clip
FREE = ("clips", "seed", "prompts", "negative_prompt", "clips_per_prompt")

Seconds = Mapping[str, float]  # stage -> seconds of one job, or of one device; unknown ones absent


@dataclass(frozen=True)
class Measured:
    """Seconds of one finished run."""

    folder: Path
    per_update: float
    sample: float | None  # None: `evaluate` includes it, as in results of older versions
    evaluate: float

    @property
    def protocol(self) -> ProtocolConfig | None:
        """Protocol of the run; None if its run.yaml cannot be read."""
        try:
            return stored_config(self.folder).protocol
        except ConfigError:  # of another version
            return None


@dataclass(frozen=True)
class Similar:
    """Finished runs with student updates of equal cost; medians are taken once, for many plans."""

    runs: list[Measured] = field(default_factory=list)

    @cached_property
    def per_update(self) -> float:
        """Seconds of a student update."""
        return statistics.median(run.per_update for run in self.runs)

    @cached_property
    def sample(self) -> float | None:
        """Seconds of sampling a clip."""
        known = [(run.sample, its) for run, its in self._drawn if run.sample is not None]
        return statistics.median(seconds / its.clips for seconds, its in known) if known else None

    @cached_property
    def evaluate(self) -> dict[tuple[str, ...] | None, float]:
        """Evaluators -> seconds of scoring a clip with them."""
        seconds: dict[tuple[str, ...] | None, list[float]] = {}
        for run, its in self._drawn:
            seconds.setdefault(its.evaluators, []).append(run.evaluate / its.clips)
        return {evaluators: statistics.median(values) for evaluators, values in seconds.items()}

    @cached_property
    def _drawn(self) -> list[tuple[Measured, ProtocolConfig]]:
        """The runs whose protocol is known."""
        return [(run, its) for run in self.runs if (its := run.protocol)]


def history(store: Path) -> dict[str, Similar]:
    """Finished runs of a store by `cost_key`."""
    runs: dict[str, Similar] = {}
    for path in sorted(store.glob("*/result.json")):
        result = read_result(path.parent) or {}
        if result.get("student_updates") and {"cost_key", "evaluate_seconds"} <= result.keys():
            sample = result.get("sample_seconds")
            measured = Measured(
                path.parent,
                result["train_seconds"] / result["student_updates"],
                sample,
                result["evaluate_seconds"] - (sample or 0.0),
            )
            runs.setdefault(result["cost_key"], Similar()).runs.append(measured)
    return runs


def measured_seconds(
    config: RunConfig, runs: Mapping[str, Similar], updates: int
) -> tuple[Seconds, int]:
    """Seconds of a run by stage, medians over similar runs, and their number (0: none is known).

    Similar runs have student updates of equal cost. Of these, only runs with the evaluators of
    `config` tell `evaluate`.

    Args:
        runs: from `history`.
        updates: student updates that are left to do.
    """
    similar = runs.get(cost_key(config)) if runs else None
    if similar is None:
        return {}, 0
    per_clip = {
        "sample": similar.sample,
        "evaluate": similar.evaluate.get(config.protocol.evaluators),
    }
    seconds = {stage: s * config.protocol.clips for stage, s in per_clip.items() if s is not None}
    return {"train": similar.per_update * updates} | seconds, len(similar.runs)


def further_seconds(
    config: RunConfig,
    runs: Mapping[str, Similar],
    ways: Iterable[Sampling],
    network: str = UNTRAINED,
) -> Seconds:
    """Seconds of sampling a network in further ways, and of scoring these clips, by stage.

    Args:
        config: a run, whose similar runs tell the seconds of its own clips.
        runs: from `history`.
        ways: ways of sampling; each makes one set of clips.
        network: as `RowConfig.network`; the default stands for any student.
    """
    ways = list(ways)
    seconds, _ = measured_seconds(config, runs, 0)
    per_set = {stage: value / len(evaluated_updates(config)) for stage, value in seconds.items()}
    further: dict[str, float] = {}
    if ways and "sample" in per_set:
        own = _flops_of_clip(config, own_sampling(config))
        more = sum(_flops_of_clip(config, way, network) for way in ways)
        further["sample"] = per_set["sample"] * more / own
    if ways and "evaluate" in per_set:
        further["evaluate"] = per_set["evaluate"] * len(ways)
    return further


def summed(first: Seconds, second: Seconds) -> Seconds:
    """Sum by stage; a stage is known if it is in either."""
    stages = {**first, **second}
    return {stage: first.get(stage, 0.0) + second.get(stage, 0.0) for stage in stages}


def _flops_of_clip(config: RunConfig, way: Sampling, network: str = UNTRAINED) -> float:
    """FLOPs of one clip; of a teacher in closed form, the number of its forwards."""
    forwards = way.nfe * (1 if way.guidance_scale == 1 else 2)
    if not find_teacher(config.teacher).has_networks:
        return float(forwards)
    # rehearses on fake tensors, for which it imports diffusers: that takes seconds
    from distill_bench.plan.sampling import clip_flops

    clip = clip_flops(config)
    # weights from elsewhere fit the teacher's network
    forward = clip.student if network == UNTRAINED else clip.teacher
    return forwards * forward + clip.decoding


def reference_seconds(config: RunConfig, store: Path) -> float | None:
    """Seconds of making and scoring the reference rows, from like rows of other clips; else None.

    Rows that exist already cost nothing.
    """
    like, own = [], protocol(config)
    for root in (store / "references").glob("*"):
        ready = [read_record(path, seconds=(int, float)) for path in root.glob("ready-*.json")]
        seconds = [record["seconds"] for record in ready if record is not None]
        if seconds and root.name == protocol_hash(config):
            return 0.0
        other = read_record(root / "protocol.json", clips=int) or {}
        if seconds and all(other.get(key) == own[key] for key in own if key not in FREE):
            like.append(max(seconds) * own["clips"] / other["clips"])
    return statistics.median(like) if like else None


def stage_flops(config: RunConfig) -> dict[str, float]:
    """FLOPs of a run by stage, and those of its sweep's references; without evaluators.

    Forwards that gradient checkpointing runs again count, because they take time.

    Raises:
        TeacherError: if the teacher has no networks.
    """
    if not find_teacher(config.teacher).has_networks:
        raise TeacherError(
            f"teacher {config.teacher!r} has no networks: its runs have no price in FLOPs"
        )
    # rehearses on fake tensors, for which it imports diffusers: that takes seconds
    from distill_bench.plan.sampling import clip_flops

    clip, drawn = clip_flops(config), config.protocol
    sampled = _flops_of_clip(config, own_sampling(config))
    guided = clip.teacher * (1 if drawn.teacher_guidance == 1 else 2)
    # rows: teacher, teacher_other, teacher_few and untrained; the others need no network
    row = (2 * drawn.teacher_steps + config.nfe) * guided + 3 * clip.decoding + sampled
    forwards = dict.fromkeys(passes(config), clip.student) | {"teacher": clip.teacher}
    return {
        "train": sum(step_flops(forwards, config)) * config.student_updates,
        "sample": drawn.clips * len(evaluated_updates(config)) * sampled,
        "references": drawn.clips * row,
    }


@dataclass(frozen=True)
class Device:
    """Speed of one device, as its user states it."""

    tflops: float  # peak, 1e12 FLOPs per second
    mfu: float  # model FLOPs utilisation: the share of the peak that is reached

    def __str__(self) -> str:
        return f"{self.mfu:.0%} of {self.tflops:g} TFLOP/s"

    def seconds(self, flops: float) -> float:
        """Seconds of one device for so many FLOPs."""
        return flops / (self.tflops * 1e12 * self.mfu)


def devices(cluster: ClusterConfig) -> tuple[float, str]:
    """GPUs that a run occupies, or cores if it has no GPU, and the unit of their hours."""
    if cluster.gpus:
        return cluster.nodes * cluster.gpus / cluster.runs_per_job, "GPU-hours"
    return cluster.nodes * cluster.processes * cluster.cpus, "core-hours"


def price_table(sweep: SweepConfig, store: Path, device: Device | None) -> Table:
    """Device-hours by stage of the seeds of every cell, of rows, of references, and of the sweep.

    Args:
        store: run folders, among which similar finished runs are looked up.
        device: prices the cells without a similar run by their FLOPs; None: these are unknown.

    Raises:
        ValueError: if the price of no stage of any cell is known.
    """
    runs, presets = sweep.expand(), sweep.presets()
    seeds = Counter(group_id(config) for config in runs)
    cells = {group_id(config): config for config in runs}
    count, unit = devices(sweep.cluster)
    finished = history(store)
    axes = [key for key in sweep.axes(list(cells.values())) if key != "method"]
    table = Table(title=f"{unit} of {sweep.name}, if nothing is done yet")
    for heading in ("method", *axes):
        table.add_column(heading)
    for heading in ("runs", *STAGES[:-1], "sum"):
        table.add_column(heading, justify="right")
    table.add_column("from")
    totals: Seconds = {}
    complete = True

    def add(title: str, values: Iterable[str], number: str, hours: Seconds, source: str) -> None:
        nonlocal totals, complete
        totals = summed(totals, hours)
        complete = complete and "evaluate" in hours
        sums = [_hours(hours.get(stage)) for stage in STAGES[:-1]]
        total = _hours(sum(hours.values()) if hours else None)
        table.add_row(title, *values, number, *sums, total, source if hours else "unknown")

    for cell, config in cells.items():
        ways = further_samplings(sweep.sampling, config)
        measured, similar = measured_seconds(config, finished, config.student_updates)
        seconds = summed(measured, further_seconds(config, finished, ways))
        used, source = count, f"{similar} similar runs"
        if not similar and device is not None:
            flops = stage_flops(config)
            more = sum(_flops_of_clip(config, way) for way in ways) * config.protocol.clips
            flops["sample"] += more
            seconds = {stage: device.seconds(flops[stage]) for stage in ("train", "sample")}
            used, source = 1, f"FLOPs at {device}"
        hours = {stage: seeds[cell] * used * v / 3600 for stage, v in seconds.items()}
        values = [str(run_value(config, key)) for key in axes]
        add(method_title(config, presets), values, str(seeds[cell]), hours, source)
    for row, config in sweep.untrained_rows(runs).values():
        seconds = further_seconds(config, finished, [row.sampling], row.network)
        used, source = count, "similar runs"
        if not seconds and device is not None:
            flops_of_clip = _flops_of_clip(config, row.sampling, row.network)
            seconds = {"sample": device.seconds(flops_of_clip * config.protocol.clips)}
            used, source = 1, f"FLOPs at {device}"
        hours = {stage: used * v / 3600 for stage, v in seconds.items()}
        add(row.label, [""] * len(axes), "", hours, source)
    if not totals:
        raise ValueError(
            f"no run in {store} is similar; to price the sweep by its FLOPs, state the peak of a "
            "device and the share of it that training reaches, e.g. --tflops 989 --mfu 0.4"
        )
    first = next(iter(cells.values()))
    shared, source = reference_seconds(first, store), "like rows"
    if shared is not None:
        shared *= count / 3600
    elif device is not None:
        source = f"FLOPs at {device}"
        shared = device.seconds(stage_flops(first)["references"]) / 3600
    blank = [""] * len(axes)
    table.add_section()
    stages = [""] * len(STAGES[:-1])
    known = source if shared is not None else "unknown"
    table.add_row("references", *blank, "", *stages, _hours(shared), known)
    total = sum(totals.values()) + (shared or 0.0)
    sums = [_hours(totals.get(stage)) for stage in STAGES[:-1]]
    note = "" if complete and shared is not None else "without what is unknown"
    table.add_row("total", *blank, str(len(runs)), *sums, _hours(total), note)
    return table


def _hours(hours: float | None) -> str:
    if hours is None:
        return "-"
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"
