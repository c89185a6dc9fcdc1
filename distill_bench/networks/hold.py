"""How a run holds the roles' networks: their precision, whole or as adapters of one base, checkpointed, sharded, offloaded."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from distill_bench.config.schema import RunConfig
from distill_bench.networks.adapters import Adapted, add_adapter
from distill_bench.networks.masters import Masters, cast
from distill_bench.networks.offload import offloaded
from distill_bench.networks.recompute import checkpointed
from distill_bench.networks.sharding import shard
from distill_bench.teachers.kinds import Pipeline


@dataclass(frozen=True)
class Networks:
    """The networks of a run by role."""

    student: nn.Module
    fake_score: nn.Module | None
    teacher: nn.Module
    # the student's average as a network of its own, where it cannot be laid over the student's
    target: nn.Module | None
    # by role what optimisers, average and checkpoints see: the network itself or its float32 masters
    trained: Mapping[str, nn.Module]


def build(config: RunConfig, pipeline: Pipeline, mesh: DeviceMesh | None = None) -> Networks:
    """The networks of a run, where they begin; what is sharded or offloaded is never whole on a device.

    Args:
        mesh: the processes that share the weights of each role, where the run is sharded.
    """

    def placed(net: nn.Module) -> nn.Module:
        return in_dtype(net, config).to(pipeline.device)

    has_fake_score, low = config.fake_score_updates is not None, config.weights == "bfloat16"
    teacher = cast(pipeline.transformer, torch.bfloat16) if low else pipeline.transformer
    if config.adapter is not None:
        base = placed(teacher)
        roles = ["student", "target", *(["fake_score"] if has_fake_score else [])]
        views = {role: add_adapter(base, role, config.adapter, config.seed) for role in roles}
        views["target"].load_state_dict(views["student"].state_dict())
        networks = Networks(
            views["student"],
            views.get("fake_score"),
            Adapted(base, None),
            views["target"],
            {role: views[role] for role in roles if role != "target"},
        )
    elif mesh is not None:
        compute = torch.bfloat16 if low else None
        nets = {"student": pipeline.student, "target": pipeline.student}
        if has_fake_score:
            nets["fake_score"] = pipeline.fake_score
        if config.ema is None:
            del nets["target"]
        teacher = shard(in_dtype(teacher, config), mesh, compute, config.teacher_offload)
        sharded = {
            role: shard(in_dtype(net(), config), mesh, compute) for role, net in nets.items()
        }
        networks = Networks(
            sharded["student"],
            sharded.get("fake_score"),
            teacher,
            sharded.get("target"),
            {role: net for role, net in sharded.items() if role != "target"},
        )
        if networks.target is not None:
            networks.target.requires_grad_(False)
    else:
        nets = {"student": placed(pipeline.student())}
        if has_fake_score:
            nets["fake_score"] = placed(pipeline.fake_score())
        trained = {role: Masters(net) for role, net in nets.items()} if low else nets
        teacher = (
            offloaded(in_dtype(teacher, config), pipeline.device)
            if config.teacher_offload
            else placed(teacher)
        )
        networks = Networks(nets["student"], nets.get("fake_score"), teacher, None, trained)
    if config.gradient_checkpointing:
        for net in (networks.student, networks.fake_score, networks.teacher):
            if net is not None:
                getattr(net, "net", net).enable_gradient_checkpointing(checkpointed)
    return networks


def in_dtype(net: nn.Module, config: RunConfig) -> nn.Module:
    """The network in the run's precision, where that is a higher one than networks are loaded in."""
    return net.double() if config.precision == "float64" else net
