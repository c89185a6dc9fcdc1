"""Assembles a run: each choice of its config becomes one object, so that updates branch on nothing.

Imports no diffusers: costs are counted on stand-in networks before anything is loaded.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from distill_bench.config.resolve import method_of
from distill_bench.config.schema import RunConfig
from distill_bench.draws import Draws, generator
from distill_bench.method import Method, Nets
from distill_bench.networks.denoiser import Denoiser, Guided
from distill_bench.networks.ledger import Ledger
from distill_bench.networks.precision import in_precision
from distill_bench.networks.roles import RoleNetworks, build_networks
from distill_bench.networks.sharding import all_ranks, is_sharded
from distill_bench.noise import student_sigmas
from distill_bench.teachers.embeddings import Texts
from distill_bench.teachers.kinds import Pipeline
from distill_bench.train.average import Average, MovingAverage, NoAverage
from distill_bench.train.inputs import (
    Batches,
    ExitStep,
    NoisedData,
    OwnRollout,
    Provider,
    StudentInput,
    exits,
)
from distill_bench.train.phase import Phase
from distill_bench.train.processes import Processes
from distill_bench.train.reuse import reuse_of
from distill_bench.train.run import Run


def assemble(
    config: RunConfig,
    pipeline: Pipeline,
    processes: Processes,
    extras: Mapping[str, Provider],
    method: Method | None = None,
    draws: type[Draws] = Draws,
) -> Run:
    """The run that `config` describes, at its start.

    Args:
        config: a resolved run.
        pipeline: the loaded teacher.
        processes: the processes that train the run.
        extras: a provider for each of `needs_of(config)`.
        method: the objective; None: the config's.
        draws: kind of the draws of a batch.

    Raises:
        ValueError: if so many processes cannot share the batch, or nothing would train the method's
            modules.
    """
    check_batch_size(config, processes.world)
    device = processes.device
    dtype = torch.float64 if config.precision == "float64" else torch.float32
    autocast = torch.bfloat16 if config.precision == "bfloat16" else None
    latent_shape = pipeline.latent_shape(config.frames, config.height, config.width)
    texts = pipeline.texts(pipeline.prompts(), dtype)
    method = method or method_of(config)
    # one process holds everything anyway, with the same numbers
    mesh = all_ranks(device) if config.sharding and processes.world > 1 else None
    held = build_networks(config, pipeline, mesh)
    average = _average(config, held)

    # each rank counts its share in units of its share, which is the whole in global batches
    ledger = Ledger(config.batch_size // processes.world)
    teacher = Denoiser(held.teacher, "teacher", ledger, autocast)
    student = Denoiser(held.student, "student", ledger, autocast)
    sigmas = student_sigmas(config.nfe, config.shift).to(device, dtype)
    exact_fake_score = pipeline.exact_fake_score(
        held.student, sigmas, config.stepping, exits(config)
    )
    fake_score = exact_fake_score if config.fake_score == "exact" else None
    if held.fake_score is not None:
        fake_score = Denoiser(held.fake_score, "fake_score", ledger, autocast)
    modules = _modules(config, method, teacher, latent_shape, texts.null_text)
    modules = in_precision(modules, config.precision).to(device)
    if held.fake_score is None and len(modules):
        raise ValueError(
            f"{config.method['name']} has modules of its own, which are trained in the fake score's "
            "updates, and the run trains no fake score"
        )
    networks = {"student": held.student, "modules": modules}
    if held.fake_score is not None:
        networks["fake_score"] = held.fake_score
    trained = {**held.trained, "modules": modules}
    optimisers = _optimisers(config, trained, method.learning_rates())
    by_role = {"student": held.student, "fake_score": held.fake_score, "teacher": held.teacher}
    by_role = {role: net for role, net in by_role.items() if net is not None}
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        ledger.counts.clear()  # of a forward for the width of the modules
        ledger.flops |= _flops(
            by_role, lambda net: pipeline.flops(net, latent_shape, texts.null_text)
        )
    if config.compile:
        for net in by_role.values():
            net.compile_repeated_blocks()

    exit_step = ExitStep(sigmas, exits(config))
    student_input = _student_input(config, student, exit_step, texts, extras)
    nets = Nets(
        student=student,
        fake_score=fake_score,
        teacher=Guided(
            teacher, texts.null_text, config.guidance_scale, config.guidance_forwards == "batched"
        ),
        rollout=student_input.samples,
        exit_sigma=exit_step.sigma,
        target=Denoiser(average.net, "target", ledger, autocast, average.laid_over),
        unguided_teacher=teacher,
        null_text=texts.null_text,
        guidance_scale=config.guidance_scale,
        decode=pipeline.decode_video,
        modules=modules,
        mean_over_ranks=processes.mean,
    )
    reuse = reuse_of(config, method, nets, held.fake_score)

    def phase(name: str, roles: Iterable[str], keeps_graph: bool) -> Phase:
        roles = tuple(roles)
        parameters = [p for role in roles for p in networks[role].parameters()]
        own = {key: o for key, o in optimisers.items() if (key == "student") == (name == "student")}
        backward = reuse.backward(parameters, keeps_graph)
        return Phase(name, roles, networks, trained, own, backward, processes, config)

    return Run(
        config=config,
        method=method,
        pipeline=pipeline,
        processes=processes,
        ledger=ledger,
        nets=nets,
        networks=networks,
        trained=trained,
        optimisers=optimisers,
        batches=Batches(config, processes, student_input.text, latent_shape, dtype, extras, draws),
        student_input=student_input,
        reuse=reuse,
        average=average,
        student=phase("student", ["student"], keeps_graph=True),
        fake_score=None
        if held.fake_score is None
        else phase("fake_score", ["fake_score", "modules"], keeps_graph=False),
        exact_fake_score=exact_fake_score,
    )


def check_batch_size(config: RunConfig, world: int) -> None:
    """Raise ValueError unless `world` processes can share a batch equally."""
    if config.batch_size % (world * config.accumulation):
        raise ValueError(
            f"batch_size {config.batch_size} must be a multiple of processes x accumulation = "
            f"{world} x {config.accumulation}"
        )


def _average(config: RunConfig, held: RoleNetworks) -> Average:
    student = held.trained["student"]
    if config.ema is None:
        return NoAverage(student, held.student)
    if held.target is None:
        return MovingAverage(student, held.student, config.ema, own_network=False)
    return MovingAverage(student, held.target, config.ema, own_network=True)


def _student_input(
    config: RunConfig,
    student: Denoiser,
    exit_step: ExitStep,
    texts: Texts,
    extras: Mapping[str, Provider],
) -> StudentInput:
    if config.student_input == "real_data":
        return NoisedData(student, exit_step, extras["real_latents"])
    return OwnRollout(student, exit_step, config.stepping, texts)


def _modules(
    config: RunConfig,
    method: Method,
    teacher: Denoiser,
    latent_shape: tuple[int, ...],
    null_text: Tensor,
) -> nn.ModuleDict:
    """The method's own modules: the same on every rank and in every run of a seed."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(config.seed, "modules").initial_seed())
        x = torch.zeros(1, *latent_shape, device=null_text.device, dtype=null_text.dtype)
        tokens = teacher.features(x, x.new_full((1,), 0.5), null_text, 0.0)
        return nn.ModuleDict(method.modules(tokens.shape[-1]))


def _optimisers(
    config: RunConfig, trained: Mapping[str, nn.Module], own_rates: Mapping[str, float]
) -> dict[str, torch.optim.AdamW]:
    """By name: student, fake score with the modules that share its rate, each module with its own rate."""

    def adamw(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.AdamW:
        parameters = list(parameters)
        sharded = [p for p in parameters if is_sharded(p)]
        replicated = [p for p in parameters if not is_sharded(p)]
        return torch.optim.AdamW(
            [{"params": group} for group in (sharded, replicated) if group],
            lr=lr,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )

    modules = trained["modules"]
    optimisers = {"student": adamw(trained["student"].parameters(), config.student_lr)}
    if "fake_score" in trained:
        sharing = [net for name, net in modules.items() if name not in own_rates]
        parameters = [p for net in [trained["fake_score"], *sharing] for p in net.parameters()]
        optimisers["fake_score"] = adamw(parameters, config.fake_score_lr)
    for name, rate in own_rates.items():
        optimisers[name] = adamw(modules[name].parameters(), rate)
    return optimisers


def _flops(
    nets: Mapping[str, nn.Module], flops_of: Callable[[nn.Module], float]
) -> dict[str, float]:
    """FLOPs of a forward of one sample, by role; networks of one architecture are counted once."""
    counted: dict[str, float] = {}
    flops: dict[str, float] = {}
    for role, net in nets.items():
        architecture = f"{type(net)} {getattr(net, 'config', role)}"
        if architecture not in counted:
            counted[architecture] = flops_of(net)
        flops[role] = counted[architecture]
    return flops
