"""Checks of a resolved run: an impossible run fails at once, and not hours later in a job."""

import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from distill_bench.config.errors import ConfigError, MissingPackage
from distill_bench.config.schema import AdapterConfig, RunConfig
from distill_bench.registry import RegistryError, find_evaluator
from distill_bench.teachers.contents import read_config, weight_shapes
from distill_bench.teachers.diffusers_folder import expert_folder
from distill_bench.teachers.folder import is_outline
from distill_bench.teachers.kinds import Teacher
from distill_bench.teachers.prompts import read_entries, read_prompts

if TYPE_CHECKING:
    from distill_bench.method import Method

WIDTH = 8  # any feature width, to test if a method builds modules


@dataclass(frozen=True)
class Candidate:
    """A run whose keys are each valid, with the method and the folders that they name."""

    config: RunConfig
    method: "Method"
    teacher: Teacher
    student: Path | None  # folder of another pipeline that the student starts from

    @property
    def method_name(self) -> str:
        return self.config.method["name"]


def check_run(run: Candidate) -> None:
    """Check that a run's keys fit each other, its method, its teacher and this machine.

    Raises:
        ConfigError: for the first problem.
        MissingPackage: if the method needs a package that is not installed.
    """
    check_fake_score(run)
    check_packages(run)
    check_plugins(run.config)
    check_pipelines(run)
    check_numbers(run.config)
    scales = {
        "guidance_scale": run.config.guidance_scale,
        "protocol.teacher_guidance": run.config.protocol.teacher_guidance,
    }
    check_guidance(scales, run.teacher, run.config.teacher)
    check_steps(run)
    check_memory_settings(run)


def check_fake_score(run: Candidate) -> None:
    """Check `fake_score`, its updates and `reuse_rollout` against the method and the teacher."""
    config, method = run.config, run.method
    if config.fake_score_updates is None:
        if method.has_fake_score and config.fake_score == "trained":
            raise ConfigError(
                "fake_score_updates is null: give a number, or set `fake_score: exact` if the "
                "teacher offers it"
            )
        if len(method.modules(WIDTH)):
            raise ConfigError(
                f"fake_score {config.fake_score!r}: {run.method_name} has modules of its own, "
                "which are trained in the fake score's updates; write `fake_score: trained`"
            )
    if config.reuse_rollout == "graph" and not method.shares_graph:
        raise ConfigError(
            f"reuse_rollout 'graph': {run.method_name} needs a separate forward pass for the "
            "fake score; allowed: true, false"
        )
    exact = config.fake_score == "exact" and method.has_fake_score
    if exact and not run.teacher.has_exact_fake_score:
        raise ConfigError(
            f"fake_score 'exact': teacher {config.teacher!r} has no closed form of its student's "
            "density; write `fake_score: trained`, or `teacher: gaussian`"
        )


def check_packages(run: Candidate) -> None:
    """Check that the optional packages of the method are installed."""
    for package in sorted(run.method.packages):
        if importlib.util.find_spec(package) is None:
            raise MissingPackage(
                f"method {run.method_name} needs the package {package!r}: pip install {package}"
            )


def check_plugins(config: RunConfig) -> None:
    """Check that the evaluators and trackers exist and are installed."""
    try:
        for name in config.protocol.evaluators or ():
            find_evaluator(name)
    except RegistryError as error:
        raise ConfigError(f"protocol.evaluators: {error}") from error
    if set(config.trackers) <= {"tensorboard"}:
        return
    from accelerate.tracking import (  # takes seconds, and few runs need it
        LOGGER_TYPE_TO_CLASS,
        get_available_trackers,
    )

    installed = [str(tracker) for tracker in get_available_trackers()]
    for name in config.trackers:
        if name not in installed:
            known = name in LOGGER_TYPE_TO_CLASS
            problem = "is not installed" if known else "is not a tracker of accelerate"
            raise ConfigError(f"trackers: {name!r} {problem}; installed: {', '.join(installed)}")


def check_pipelines(run: Candidate) -> None:
    """Check the files of teacher and student, the size of the clips, and the prompts."""
    config, teacher, student = run.config, run.teacher, run.student
    try:
        expert_folder(student or teacher.folder, config.student_expert)
        teacher.check_parts(student)
        reason = teacher.unfit(config.frames, config.height, config.width, student)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if reason is not None:
        raise ConfigError(reason)
    if student is not None and len(run.method.modules(WIDTH)):
        widths = [_feature_width(folder) for folder in (teacher.folder, student)]
        if widths[0] != widths[1]:
            raise ConfigError(
                f"student {config.student}: {run.method_name} has heads on features of the "
                f"teacher's width {widths[0]}, but the student's features have width {widths[1]}"
            )
    if config.prompts is None and not is_outline(teacher.folder):
        check_prompts(config.teacher, teacher.folder / "prompts.txt")
    if config.prompts is not None:
        check_seeds(config, Path(config.prompts))
    negatives = {
        "negative_prompt": config.negative_prompt_hash,
        "protocol.negative_prompt": config.protocol.negative_prompt_hash,
    }
    for key, text in negatives.items():
        if text and not teacher.has_networks:
            raise ConfigError(
                f"{key}: a {teacher.kind} teacher knows only its own prompts and the empty one; "
                f"leave `{key}` out"
            )
    if config.data is not None and not teacher.has_networks:
        raise ConfigError(
            f"data {config.data}: a {teacher.kind} teacher draws its own real latents; leave "
            "`data` out"
        )


def check_prompts(teacher: str, path: Path) -> None:
    """Check the prompts.txt in a teacher's folder."""
    if not path.is_file():
        raise ConfigError(
            f"teacher {teacher} has no prompts.txt: name a file of prompts in the key `prompts`"
        )
    try:
        read_prompts(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_seeds(config: RunConfig, path: Path) -> None:
    """Check that the seeds of a file of prompts give no clip of the protocol twice."""
    entries = read_entries(path)
    least = max(config.protocol.clips_per_prompt, -(-config.protocol.clips // len(entries)))
    pairs = sorted((entry.prompt, entry.seed) for entry in entries if entry.seed is not None)
    for (prompt, seed), (next_prompt, next_seed) in pairwise(pairs):
        if prompt == next_prompt and next_seed - seed < least:
            raise ConfigError(
                f"prompts {path}: {prompt!r} has the seeds {seed} and {next_seed}, but gives "
                f"{least} clips, with consecutive seeds, per entry; write seeds {least} or more "
                "apart, or lower protocol.clips_per_prompt and protocol.clips"
            )


def check_guidance(
    scales: Mapping[str, float | Mapping[str, float]], teacher: Teacher, name: str
) -> None:
    """Check that only the scale of a teacher with two experts names experts.

    Args:
        scales: by the key that states one.
        name: of the teacher.
    """
    for key, scale in scales.items():
        if isinstance(scale, Mapping) and teacher.boundary is None:
            raise ConfigError(
                f"{key}: a scale per expert needs a teacher with two experts, and {name} has one "
                "network; write a number"
            )


def check_numbers(config: RunConfig) -> None:
    """Check numbers that limit each other."""
    if config.sigma_min >= config.sigma_max:
        raise ConfigError(
            f"sigma_min {config.sigma_min} must be below sigma_max {config.sigma_max}"
        )
    if config.batch_size % config.accumulation:
        raise ConfigError(
            f"batch_size {config.batch_size} must be a multiple of accumulation "
            f"{config.accumulation}"
        )


def check_steps(run: Candidate) -> None:
    """Check that the student has the steps at which the method's rollouts exit."""
    fewest = run.method.first_exit + 1
    if run.config.nfe < fewest:
        raise ConfigError(
            f"nfe {run.config.nfe}: {run.method_name} trains the student from step {fewest} on; "
            f"write `nfe: {fewest}` or more"
        )


def check_memory_settings(run: Candidate) -> None:
    """Check the memory and precision settings, and which of them exclude each other."""
    config, teacher = run.config, run.teacher
    if config.weights == "bfloat16" and config.precision != "bfloat16":
        raise ConfigError(
            f"weights 'bfloat16' needs precision 'bfloat16', not {config.precision!r}"
        )
    needs_transformer = next(_needs_transformer(config), None)
    if needs_transformer and not teacher.has_networks:
        raise ConfigError(
            f"{needs_transformer} needs a transformer, which the teacher {config.teacher!r} does "
            "not have; leave it out"
        )
    if run.method.mixes_weights and not teacher.shares_architecture:
        raise ConfigError(
            f"teacher {config.teacher!r}: {run.method_name} averages weights of two roles, but "
            "this teacher's student and fake score differ in architecture; name another teacher"
        )
    if run.method.mixes_weights and config.adapter:
        raise ConfigError(
            f"adapter: {run.method_name} averages weights of two roles, and low-rank factors "
            "cannot be averaged; leave adapter out"
        )
    if config.adapter:
        check_targets(config.adapter, teacher.folder)
    graph = config.reuse_rollout == "graph"
    recompiled = "the blocks change between forwards, so each forward would compile them again"
    one_base = "all roles share one copy of the base weights"
    for conflict, keys, reason in (
        (config.sharding and config.adapter, "sharding with adapter", one_base),
        (config.teacher_offload and config.adapter, "teacher_offload with adapter", one_base),
        (config.student and config.adapter, "student with adapter", one_base),
        (config.compile and config.adapter, "compile with adapter", recompiled),
        (config.compile and config.sharding, "compile with sharding", recompiled),
        (config.compile and config.teacher_offload, "compile with teacher_offload", recompiled),
        (
            config.compile == "network" and config.gradient_checkpointing,
            "compile 'network' with gradient_checkpointing",
            "a graph of the whole network stores what its backward needs",
        ),
        (
            config.compile and graph,
            "compile with reuse_rollout 'graph'",
            "a compiled forward allows only one backward",
        ),
        (
            config.sharding and graph,
            "sharding with reuse_rollout 'graph'",
            "shards are gathered for one phase at a time",
        ),
    ):
        if conflict:
            raise ConfigError(f"{keys}: {reason}; use one of the two")


def check_initial(config: RunConfig, initial: RunConfig) -> None:
    """Check that a run's student can start from the student of its initial run.

    Raises:
        ConfigError: if teacher, student or sizes differ, or adapters do not fit.
    """
    where = f"init {config.init}"
    names = {"teacher": "teacher", "student": "pipeline of `student`"}
    for key, title in names.items():
        hashes = [getattr(run, f"{key}_hash") for run in (initial, config)]
        if hashes[0] != hashes[1]:
            theirs, own = (getattr(run, key) or "the teacher" for run in (initial, config))
            raise ConfigError(
                f"{where}: its {title} is {theirs} (content {hashes[0] or '-'}), this run's is "
                f"{own} (content {hashes[1] or '-'}); both need the same"
            )
    if config.student_expert != initial.student_expert:
        raise ConfigError(
            f"{where}: its student_expert is {initial.student_expert}, this run's "
            f"{config.student_expert}; both need the same"
        )
    theirs, own = (f"{c.frames} x {c.height} x {c.width}" for c in (initial, config))
    if theirs != own:
        raise ConfigError(
            f"{where}: its clips are {theirs} (frames x height x width), this run's {own}, so "
            "their training costs have no common unit; train both on one size"
        )
    if config.adapter is not None and config.adapter != initial.adapter:
        raise ConfigError(
            f"{where}: with `adapter`, all roles share the teacher's weights, so the student can "
            "start only from a run with the same adapter; give both the same, or leave `adapter` "
            "out of this run"
        )


def _needs_transformer(config: RunConfig) -> Iterator[str]:
    for name in ("adapter", "gradient_checkpointing", "sharding", "teacher_offload", "compile"):
        if getattr(config, name):
            yield name
    if config.weights != "float32":
        yield "weights"
    if config.protocol.precision != "float32":
        yield "protocol.precision"


def check_targets(adapter: AdapterConfig, teacher: Path) -> None:
    """Check that each target of an adapter names a linear layer.

    peft ignores a target without a match if another target has one.
    """
    layers = [
        name.removesuffix(".weight")
        for name, shape in weight_shapes(teacher / "transformer").items()
        if name.endswith(".weight") and len(shape) > 1
    ]
    if not layers:  # an outline, or weights without headers
        return
    for target in adapter.targets:
        if not any(f".{layer}".endswith(f".{target}") for layer in layers):
            # names without the block's index
            suffixes = sorted({re.sub(r"^\w+\.\d+\.", "", layer) for layer in layers})
            raise ConfigError(
                f"adapter.targets: no linear layer matches {target!r}; "
                f"available suffixes: {', '.join(suffixes)}"
            )


def _feature_width(pipeline: Path) -> int:
    """Width of the tokens in a pipeline's transformer."""
    config = read_config(pipeline / "transformer")
    return config["num_attention_heads"] * config["attention_head_dim"]
