"""Checks of what follows training, made before the first run: evaluators, batches, disk, scores.

The evaluators see stand-in clips with the size, rate and prompts of the clips that they will score.
"""

import functools
import json
import math
import operator
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill_bench.config.checks import check_initial
from distill_bench.config.errors import ConfigError, hint
from distill_bench.config.protocol import protocol_hash
from distill_bench.config.resolve import evaluated_updates, stored_config
from distill_bench.config.schema import RunConfig
from distill_bench.config.sweep_file import SweepConfig
from distill_bench.evaluator import Clips
from distill_bench.networks.pipeline import pipeline_of
from distill_bench.networks.role_networks import check_compiler
from distill_bench.noise import student_sigmas
from distill_bench.registry import find_evaluator, usual_evaluators
from distill_bench.sample.references import folder_names
from distill_bench.sample.released_weights import check_released
from distill_bench.sample.sampler import protocol_clips
from distill_bench.sample.write_folder import is_written
from distill_bench.store.failures import first_line
from distill_bench.store.files import existing_folder, read_jsonl
from distill_bench.store.nested import describe_differences
from distill_bench.store.runs import read_result, run_state, unsampled
from distill_bench.sweep.manifest import OpenSweep, check_writable
from distill_bench.sweep.status import ENDED
from distill_bench.teachers.contents import weight_shapes
from distill_bench.teachers.folder import TeacherError, teacher_folder
from distill_bench.teachers.kinds import find_teacher
from distill_bench.teachers.prompts import read_prompts
from distill_bench.train.assemble import check_batch_size
from distill_bench.train.checkpoint import KEPT


def check_sweep(sweep: OpenSweep, processes: int) -> list[str]:
    """Check a sweep before its first run; returns warnings, one line each.

    Args:
        processes: processes that train each run together.

    Raises:
        ConfigError: if the runs would fail after their start, or their scores or results could not
            be written.
    """
    for run, config in sweep.runs.items():
        try:
            check_batch_size(config, processes)
        except ValueError as error:
            raise ConfigError(f"{run}: {error}; set cluster.tasks") from error
    if (folder := sweep.out / sweep.config.name).exists() and not folder.is_dir():
        raise ConfigError(f"results go to {folder}, which is not a folder; remove it, or set --out")
    check_writable(folder, folder / "figures")
    check_rows(sweep)
    check_initial_runs(sweep)
    if any(config.compile for config in sweep.runs.values()) and not torch.cuda.is_available():
        check_compiler()
    config = next(iter(sweep.runs.values()))  # all runs share a protocol
    clips = stand_in_clips(config)
    warnings = [*check_evaluators(config, clips), *_unscored_prompts(config, clips)]
    warnings += check_contrast_scores(sweep.config, config, clips)
    _check_space(sweep, clips.frames.size)
    return warnings


def _unscored_prompts(config: RunConfig, clips: Clips) -> list[str]:
    """Tell how many prompts of a user's file have no clip."""
    known = set() if config.prompts is None else set(read_prompts(Path(config.prompts)))
    if not (unscored := known - set(clips.prompts)):
        return []
    count = f"{len(unscored)} of {len(known)} prompts in {config.prompts}"
    more = "raise protocol.clips, or lower protocol.clips_per_prompt"
    return [f"{count} are trained on, but not scored: {more}"]


def check_rows(sweep: OpenSweep) -> None:
    """Check the files of networks that were trained elsewhere.

    Raises:
        ConfigError: if the weights of one do not fit the teacher's transformer.
    """
    for row, config in sweep.rows.values():
        if row.network_hash:
            try:
                check_released(Path(row.network), teacher_folder(config.teacher))
            except TeacherError as error:
                raise ConfigError(f"rows: {row.label}: {error}") from error


def check_initial_runs(sweep: OpenSweep) -> None:
    """Check that students can start from those of their initial runs.

    Raises:
        ConfigError: if two runs do not fit, or an initial run outside the sweep is not done.
    """
    for run, config in sweep.runs.items():
        if config.init_run is None or read_result(sweep.store / run) is not None:
            continue
        initial = sweep.runs.get(config.init_run)
        if initial is None:
            initial = stored_config(sweep.store / config.init_run)
            state = run_state(sweep.store / config.init_run)
            if state != "done":
                raise ConfigError(
                    f"init {config.init}: this run is {state}, and not part of the sweep; do it "
                    f"first: distill-bench job {shlex.quote(str(sweep.store / config.init_run))}"
                )
        check_initial(config, initial)


def check_evaluators(config: RunConfig, clips: Clips) -> list[str]:
    """Check that the evaluators of a run can score such clips; returns those left out.

    Raises:
        ConfigError: if an evaluator that the protocol names cannot, or its weights do not load.
    """
    named = config.protocol.evaluators
    left_out = []
    for name in evaluators_of(config):
        try:
            evaluator = find_evaluator(name)()
            reason = evaluator.reason_to_skip(clips)
        except (ValueError, OSError) as error:
            raise ConfigError(f"evaluator {name}: {first_line(error)}") from error
        absent = sorted(set(evaluator.needs_facts) - clips.facts.keys())
        if reason is None and absent and named is not None:
            reason = f"the clips of teacher {config.teacher} come without {', '.join(absent)}"
        if reason is None:
            continue
        if named is not None:
            raise ConfigError(f"protocol.evaluators: {name} cannot score the clips: {reason}")
        left_out.append(f"evaluator {name} is left out: {reason}")
    return left_out


def evaluators_of(config: RunConfig) -> Sequence[str]:
    """Names of the evaluators that score a run."""
    named = config.protocol.evaluators
    return usual_evaluators() if named is None else named


def check_contrast_scores(sweep: SweepConfig, config: RunConfig, clips: Clips) -> list[str]:
    """Check that an evaluator has each score of a declared contrast; returns warnings.

    Raises:
        ConfigError: for a score that no evaluator has, if all state their columns.
    """
    if not sweep.contrasts:
        return []
    from distill_bench.report.results import COSTS  # pandas takes a second

    known, unstated = [cost.name for cost in COSTS], []
    for name in evaluators_of(config):
        evaluator = find_evaluator(name)()
        if set(evaluator.needs_facts) - clips.facts.keys() or evaluator.reason_to_skip(clips):
            continue
        known += evaluator.columns or []
        unstated += [name] if evaluator.columns is None else []
    warnings = []
    for contrast, declared in sweep.contrasts.items():
        for score in declared.scores:
            place = f"contrasts.{contrast}: no evaluator states the score {score!r}"
            if score not in known and unstated:
                warnings.append(f"{place}; it may come from {', '.join(unstated)}")
            elif score not in known:
                raise ConfigError(f"{sweep.name}: {place}{hint(score, known)}")
    return warnings


def stand_in_clips(config: RunConfig) -> Clips:
    """Black clips with the size, rate, prompts, seeds and facts of a run's clips.

    Raises:
        ConfigError: if the prompts cannot be read, or the protocol has too few clips.
    """
    try:
        return _black_clips(config)
    except ValueError as error:
        raise ConfigError(f"protocol: {first_line(error)}") from error


def _black_clips(config: RunConfig) -> Clips:
    teacher = find_teacher(config.teacher)
    facts: dict[str, Any] = {}
    shape: tuple[int, ...]
    if teacher.has_networks:
        path = teacher.folder / "prompts.txt" if config.prompts is None else Path(config.prompts)
        known = read_prompts(path)
        shape = (config.frames, 3, config.height, config.width)
    else:
        pipeline = pipeline_of(config, torch.device("cpu"))
        known = pipeline.prompts()
        latents = pipeline.latent_shape(config.frames, config.height, config.width)
        shape = tuple(pipeline.decode(torch.zeros(1, *latents)).shape[1:])
        sigmas = student_sigmas(config.nfe, config.shift)
        guidance = config.protocol.teacher_guidance
        facts = pipeline.facts(pipeline.student(), sigmas, config.stepping, guidance)
    prompts, seeds = protocol_clips(config, known)
    frames = np.broadcast_to(np.uint8(0), (len(prompts), *shape))
    return Clips(frames, prompts, seeds, config.protocol.fps, facts)


def _check_space(sweep: OpenSweep, bytes_of_clips: int) -> None:
    """Raise ConfigError if the store cannot hold what the runs without clips will write.

    Counts clips, kept students, and the checkpoints of one run, which are removed at its end;
    adapters and extra data of methods come on top.

    Args:
        bytes_of_clips: of one evaluation of a run.
    """
    runs = [c for run, c in sweep.runs.items() if not (sweep.store / run / "samples").exists()]
    evaluations = [len(evaluated_updates(config)) for config in runs]
    sets = sum(evaluations)
    sets += len([row for row in sweep.rows if not (sweep.store / row / "samples").exists()])
    for run, further in sweep.samplings.items():
        sets += len(unsampled(sweep.store / run, (way.name for way in further)))
    of_student = functools.cache(_bytes_of_student)  # equal for most runs
    students = [of_student(c.student or c.teacher, c.adapter is not None, c.weights) for c in runs]
    needed = {
        "clips": bytes_of_clips * sets,
        "reference rows": bytes_of_clips * len(missing_references(sweep)),
        "kept students": sum(map(operator.mul, evaluations, students)),
        "checkpoints": max(map(_bytes_of_checkpoints, runs, students), default=0),
    }
    free = shutil.disk_usage(existing_folder(sweep.store)).free
    if sum(needed.values()) > free:
        parts = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in needed.items() if size)
        raise ConfigError(
            f"{sweep.store} has {free / 1e9:.3g} GB free; {len(runs)} runs take at least "
            f"{sum(needed.values()) / 1e9:.3g} GB ({parts}): free space, or reduce protocol.clips, "
            "evaluations or seeds"
        )


def missing_references(sweep: OpenSweep) -> set[Path]:
    """Folders of reference rows that are not made yet, without real clips, which may not exist."""
    first, *others = sweep.runs.values()
    root = sweep.store / "references" / protocol_hash(first)  # all runs share a protocol
    names = {
        name
        for config in (first, *others)
        for kind, name in folder_names(config).items()
        if kind not in ("data", "data_other")
    }
    return {root / name for name in names if not is_written(root / name)}


def _bytes_of_student(student: str, adapted: bool, weights: str) -> int:
    """Bytes of all weights of a student; 0 if only adapters are kept, or if unknown.

    Args:
        student: folder or name of the network.
        adapted: True if only adapters are trained.
        weights: dtype of the run's weights.
    """
    teacher = find_teacher(student)
    if adapted or not teacher.has_networks:
        return 0
    shapes = weight_shapes(teacher.folder / "transformer").values()
    return sum(map(math.prod, shapes)) * (2 if weights == "bfloat16" else 4)


def _bytes_of_checkpoints(config: RunConfig, bytes_of_student: int) -> int:
    """Bytes of the kept checkpoints: weights and AdamW's two moments of each trained network."""
    networks = 1 if config.fake_score_updates is None else 2
    return min(KEPT, -(-config.student_updates // config.checkpoint_every)) * (
        3 * networks * bytes_of_student
    )


def check_stored_scores(sweep: OpenSweep, states: Mapping[str, str]) -> list[str]:
    """Compare the scores of ended runs with today's evaluators; returns warnings.

    Args:
        states: of the runs, by id.

    Raises:
        ConfigError: if the version or an extractor of an evaluator differs: a table has one.
    """
    config = next(iter(sweep.runs.values()))
    today = {name: find_evaluator(name)() for name in evaluators_of(config)}
    ended = (run for run, state in states.items() if state in ENDED)
    stored = {run: read_jsonl(sweep.store / run / "metrics.jsonl") for run in ended}
    scored = {line["metric"] for lines in stored.values() for line in lines} & today.keys()
    if not scored:
        return []
    clips = stand_in_clips(config)
    extractors = {name: today[name].extractors(clips) for name in scored}
    settings = {n: json.loads(json.dumps(asdict(today[n]), default=str)) for n in scored}
    warnings: dict[str, str] = {}
    for run, lines in stored.items():
        for line in lines:
            name, extractor = line["metric"], line.get("extractor")
            if name not in scored:
                continue
            if line["version"] != today[name].version:
                raise ConfigError(
                    f"{run} was scored by version {line['version']} of {name}, new runs by version "
                    f"{today[name].version}, which no table can hold: remove {sweep.store / run}"
                )
            known = extractors[name]
            if known is not None and extractor is not None and extractor not in known:
                raise ConfigError(
                    f"{line['column']} of {run} is by {extractor}, new runs would have "
                    f"{' or '.join(sorted(known))}, which no table can hold: restore the weights "
                    f"and settings of {name}, or remove {sweep.store / run}"
                )
            if differing := describe_differences(line["settings"], settings[name]):
                warnings[name] = f"{run} was scored by {name} with other settings: {differing}"
    return list(warnings.values())
