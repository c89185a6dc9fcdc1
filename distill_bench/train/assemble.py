"""Assembles a run: each option of its config becomes one object, so that updates need no branches.

Imports no diffusers, because `distill_bench.plan` assembles runs on stand-in networks.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from distill_bench.config.resolve import method_of
from distill_bench.config.schema import RunConfig
from distill_bench.draws import Draws, generator
from distill_bench.method import Method, Nets
from distill_bench.networks.denoiser import Denoiser, Guided
from distill_bench.networks.ledger import Ledger
from distill_bench.networks.precision import in_precision
from distill_bench.networks.role_networks import (
    RoleNetworks,
    Start,
    build_networks,
    compile_networks,
)
from distill_bench.networks.sharding import all_ranks, is_sharded
from distill_bench.noise import student_sigmas
from distill_bench.teachers.embeddings import Texts
from distill_bench.teachers.experts import guidance_of
from distill_bench.teachers.kinds import Pipeline
from distill_bench.train.average import Average, MovingAverage, NoAverage
from distill_bench.train.inputs import (
    Batches,
    ExitStep,
    NoisedData,
    OwnRollout,
    Rows,
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
    extras: Mapping[str, Rows],
    method: Method | None = None,
    draws: type[Draws] = Draws,
    start: Start | None = None,
) -> Run:
    """Assemble the run that `config` describes, at its start.

    Args:
        config: a resolved run.
        pipeline: the loaded teacher.
        processes: the processes that train the run.
        extras: the rows of each of `needs_of(config)`.
        method: the objective; None: the config's.
        draws: class that makes the draws of a batch.
        start: copies initial weights into the student; None: it starts as the pipeline's.

    Raises:
        ValueError: if the processes cannot share the batch equally, or no phase would train the
            method's modules.
    """
    check_batch_size(config, processes.world)
    method = method or method_of(config)
    dtype = torch.float64 if config.precision == "float64" else torch.float32
    latent_shape = pipeline.latent_shape(config.frames, config.height, config.width)
    texts = pipeline.texts(pipeline.prompts(), dtype, config.negative_prompt)
    # sharding one process changes nothing
    shards = config.sharding and processes.world > 1
    role_networks = build_networks(
        config, pipeline, all_ranks(processes.device) if shards else None, start
    )
    average = _average(config, role_networks)
    # a rank counts its own samples in units of its share of a batch, which gives global batches
    ledger = Ledger(config.batch_size // processes.world)
    denoisers = _denoisers(config, role_networks, average, ledger)
    teacher = denoisers["teacher"]
    modules = _modules(config, method, teacher, latent_shape, texts.null_text)
    _weigh(ledger, config, pipeline, role_networks, latent_shape, texts.null_text)
    if config.compile:  # after the FLOPs are counted: the counter cannot see into compiled blocks
        compile_networks(role_networks, whole=config.compile == "network")
    networks = {"student": role_networks.student, "modules": modules}
    if role_networks.fake_score is not None:
        networks["fake_score"] = role_networks.fake_score
    trained = {**role_networks.trained, "modules": modules}
    optimisers = _optimisers(config, trained, method.learning_rates())

    sigmas = student_sigmas(config.nfe, config.shift).to(processes.device, dtype)
    exit_step = ExitStep(sigmas, exits(config), method.first_exit)
    student_input = _student_input(config, denoisers["student"], exit_step, texts, extras)
    exact_fake_score = pipeline.exact_fake_score(
        role_networks.student, sigmas, config.stepping, exits(config), student_input.data
    )
    exact = exact_fake_score if config.fake_score == "exact" else None
    guidance_scale = guidance_of(config.guidance_scale, config.teacher)
    nets = Nets(
        student=denoisers["student"],
        fake_score=denoisers.get("fake_score", exact),
        teacher=Guided(
            teacher, texts.null_text, guidance_scale, config.guidance_forwards == "batched"
        ),
        rollout=student_input.samples,
        exit_sigma=exit_step.sigma,
        target=denoisers["target"],
        unguided_teacher=teacher,
        null_text=texts.null_text,
        guidance_scale=guidance_scale,
        decode=pipeline.decode_video,
        modules=modules,
        mean_over_ranks=processes.mean,
    )
    reuse = reuse_of(config, method, nets, role_networks.fake_score)

    def phase(name: str, roles: tuple[str, ...], keeps_graph: bool) -> Phase:
        parameters = [p for role in roles for p in networks[role].parameters()]
        is_student = name == "student"
        stepped = {key: o for key, o in optimisers.items() if (key == "student") == is_student}
        backward = reuse.backward(parameters, keeps_graph)
        return Phase(name, roles, networks, trained, stepped, backward, processes, config)

    fake_score_phase = None
    if role_networks.fake_score is not None:
        fake_score_phase = phase("fake_score", ("fake_score", "modules"), keeps_graph=False)
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
        student=phase("student", ("student",), keeps_graph=True),
        fake_score=fake_score_phase,
        exact_fake_score=exact_fake_score,
    )


def check_batch_size(config: RunConfig, world: int) -> None:
    """Raise ValueError unless `world` processes can share a batch equally."""
    if config.batch_size % (world * config.accumulation):
        raise ValueError(
            f"batch_size {config.batch_size} must be a multiple of processes x accumulation = "
            f"{world} x {config.accumulation}"
        )


def _average(config: RunConfig, role_networks: RoleNetworks) -> Average:
    student = role_networks.trained["student"]
    if config.ema is None:
        return NoAverage(student, role_networks.student)
    if role_networks.target is None:
        return MovingAverage(student, role_networks.student, config.ema, own_network=False)
    return MovingAverage(student, role_networks.target, config.ema, own_network=True)


def _denoisers(
    config: RunConfig, role_networks: RoleNetworks, average: Average, ledger: Ledger
) -> dict[str, Denoiser]:
    """Denoisers of the roles; they count their passes in the ledger."""
    autocast = torch.bfloat16 if config.precision == "bfloat16" else None
    denoisers = {
        "teacher": Denoiser(role_networks.teacher, "teacher", ledger, autocast),
        "student": Denoiser(role_networks.student, "student", ledger, autocast),
        "target": Denoiser(average.net, "target", ledger, autocast, average.laid_over),
    }
    if role_networks.fake_score is not None:
        fake_score = Denoiser(role_networks.fake_score, "fake_score", ledger, autocast)
        denoisers["fake_score"] = fake_score
    return denoisers


def _student_input(
    config: RunConfig,
    student: Denoiser,
    exit_step: ExitStep,
    texts: Texts,
    extras: Mapping[str, Rows],
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
    """The method's own modules, initialised equally on every rank and in every run with one seed.

    Raises:
        ValueError: if the method has modules, but the run trains no fake score.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(config.seed, "modules").initial_seed())
        x = torch.zeros(1, *latent_shape, device=null_text.device, dtype=null_text.dtype)
        tokens = teacher.features(x, x.new_full((1,), 0.5), null_text, 0.0)
        modules = nn.ModuleDict(method.modules(tokens.shape[-1]))
    teacher.ledger.counts.clear()
    if len(modules) and config.fake_score_updates is None:
        raise ValueError(
            f"{config.method['name']} has modules of its own, which are trained in the fake "
            "score's updates, but the run trains no fake score; set `fake_score: trained`"
        )
    return in_precision(modules, config.precision).to(null_text.device)


def _optimisers(
    config: RunConfig, trained: Mapping[str, nn.Module], own_rates: Mapping[str, float]
) -> dict[str, torch.optim.AdamW]:
    """Optimisers of the student, the fake score, and each module with its own learning rate.

    All other modules share the fake score's optimiser.
    """

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


def _weigh(
    ledger: Ledger,
    config: RunConfig,
    pipeline: Pipeline,
    role_networks: RoleNetworks,
    latent_shape: tuple[int, ...],
    null_text: Tensor,
) -> None:
    """Give the ledger the FLOPs of each role; networks of one architecture are counted once."""
    nets = {
        "student": role_networks.student,
        "fake_score": role_networks.fake_score,
        "teacher": role_networks.teacher,
    }
    counted: dict[str, float] = {}
    autocast = config.precision == "bfloat16"
    for role, net in nets.items():
        if net is None:
            continue
        architecture = f"{type(net)} {getattr(net, 'config', role)}"
        if architecture not in counted:
            with torch.autocast(null_text.device.type, torch.bfloat16, enabled=autocast):
                counted[architecture] = pipeline.flops(net, latent_shape, null_text)
        ledger.flops[role] = counted[architecture]
