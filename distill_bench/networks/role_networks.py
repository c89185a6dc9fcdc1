"""Builds the networks of a run by role: whole, sharded, offloaded, or adapters of one base."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from distill_bench.config.errors import ConfigError
from distill_bench.config.schema import AdapterConfig, RunConfig
from distill_bench.networks.adapters import Adapted, add_adapter
from distill_bench.networks.offload import place
from distill_bench.networks.precision import Masters, cast, in_precision
from distill_bench.networks.recompute import checkpointed
from distill_bench.networks.sharding import shard
from distill_bench.teachers.experts import Experts, networks_in
from distill_bench.teachers.kinds import Pipeline

Start = Callable[[nn.Module], None]  # copies initial weights into a new student, in place


@dataclass(frozen=True)
class RoleNetworks:
    """The networks of a run by role."""

    student: nn.Module
    fake_score: nn.Module | None  # None: the run trains none
    teacher: nn.Module  # frozen
    # The student's moving average as a separate network; None: the average is a set of weights that
    # replaces the student's during a forward.
    target: nn.Module | None
    # Student and fake score for optimisers, average and checkpoints: networks or float32 masters.
    trained: Mapping[str, nn.Module]


def build_networks(
    config: RunConfig,
    pipeline: Pipeline,
    mesh: DeviceMesh | None = None,
    start: Start | None = None,
) -> RoleNetworks:
    """Build the networks of a run with their initial weights, on the pipeline's device.

    A sharded or offloaded network is never whole on a device.

    Args:
        config: a resolved run.
        pipeline: the run's pipeline, whose transformer is in host memory.
        mesh: the ranks that share the weights of each role; None: every rank holds all weights.
        start: for the student and its average; the fake score starts as without it, because it must
            denoise at every level. None: the pipeline's student.

    Raises:
        ConfigError: if no linear layer matches one of the adapter's targets.
        ValueError: if the installed torch cannot shard the run's precision.
    """
    teacher = pipeline.transformer
    if config.weights == "bfloat16":
        teacher = cast(teacher, torch.bfloat16)
    teacher = in_precision(teacher, config.precision)
    if config.adapter is not None:
        teacher = teacher.to(pipeline.device)
        networks = _adapters_of_one_base(config, config.adapter, teacher, start)
    elif mesh is not None:
        networks = _sharded(config, pipeline, teacher, mesh, start)
    else:
        networks = _whole(config, pipeline, teacher, start)
    if config.gradient_checkpointing:
        for net in (networks.student, networks.fake_score, networks.teacher):
            for transformer in () if net is None else networks_in(net):
                inner: Any = getattr(transformer, "net", transformer)  # of a view of an adapter
                inner.enable_gradient_checkpointing(checkpointed)
    return networks


def _adapters_of_one_base(
    config: RunConfig, adapter: AdapterConfig, teacher: nn.Module, start: Start | None
) -> RoleNetworks:
    base = teacher
    if isinstance(teacher, Experts):
        base = getattr(teacher, config.student_expert)
        setattr(teacher, config.student_expert, Adapted(base, None))
    else:
        teacher = Adapted(base, None)
    roles = ["student", "target"]
    if config.fake_score_updates is not None:
        roles.append("fake_score")
    views = {role: add_adapter(base, role, adapter, config.seed) for role in roles}
    if start is not None:
        start(views["student"])
    views["target"].load_state_dict(views["student"].state_dict())
    return _by_role(views, teacher)


def _sharded(
    config: RunConfig,
    pipeline: Pipeline,
    teacher: nn.Module,
    mesh: DeviceMesh,
    start: Start | None,
) -> RoleNetworks:
    """Shard the roles one by one, so that host memory holds only one whole network at a time."""
    compute = torch.bfloat16 if config.weights == "bfloat16" else None
    load: dict[str, Callable[[], nn.Module]] = {"student": lambda: _new_student(pipeline, start)}
    if config.ema is not None:
        # all forwards share the gathered weights, so an average cannot replace them
        load["target"] = load["student"]
    if config.fake_score_updates is not None:
        load["fake_score"] = pipeline.fake_score
    teacher = shard(teacher, mesh, compute, config.teacher_offload)
    nets = {
        role: shard(in_precision(load_net(), config.precision), mesh, compute)
        for role, load_net in load.items()
    }
    if "target" in nets:
        nets["target"].requires_grad_(False)
    return _by_role(nets, teacher)


def _whole(
    config: RunConfig, pipeline: Pipeline, teacher: nn.Module, start: Start | None
) -> RoleNetworks:
    device = pipeline.device
    student = _new_student(pipeline, start)
    nets = {"student": in_precision(student, config.precision).to(device)}
    if config.fake_score_updates is not None:
        nets["fake_score"] = in_precision(pipeline.fake_score(), config.precision).to(device)
    masters = None
    if config.weights == "bfloat16":
        masters = {role: Masters(net) for role, net in nets.items()}
    return _by_role(nets, place(teacher, device, config.teacher_offload), masters)


def _new_student(pipeline: Pipeline, start: Start | None) -> nn.Module:
    student = pipeline.student()
    if start is not None:
        start(student)
    return student


def _by_role(
    nets: Mapping[str, nn.Module],
    teacher: nn.Module,
    masters: Mapping[str, nn.Module] | None = None,
) -> RoleNetworks:
    trained = masters or {role: net for role, net in nets.items() if role != "target"}
    return RoleNetworks(
        student=nets["student"],
        fake_score=nets.get("fake_score"),
        teacher=teacher,
        target=nets.get("target"),
        trained=trained,
    )


def check_compiler() -> None:
    """Check that `torch.compile` finds the C++ compiler that it needs on a processor.

    Raises:
        ConfigError: if there is none.
    """
    from torch._inductor import config, cpp_builder, exc  # takes seconds

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise ConfigError(
            f"compile: the C++ compiler {config.cpp.cxx[-1]!r} does not run; install one (Debian: "
            "apt install g++), name another in the environment variable CXX, or leave `compile` out"
        ) from error


def compile_networks(networks: RoleNetworks, whole: bool) -> None:
    """Compile the networks of every role in place; all roles share what is compiled.

    Args:
        networks: of a run.
        whole: one graph per kind of pass (gradients of weights, of the input or none; batch size)
            instead of one per kind of block.
    """
    torch._functorch.config.donated_buffer = False  # signals differentiate a graph several times
    if whole:
        torch._dynamo.config.recompile_limit = max(128, torch._dynamo.config.recompile_limit)
    for net in (networks.student, networks.fake_score, networks.teacher):
        for transformer in () if net is None else networks_in(net):
            if whole:
                transformer.compile(fullgraph=True, dynamic=False)
            else:
                transformer.compile_repeated_blocks()  # type: ignore[operator]  # of diffusers
