"""The only training loop: one student update, then `fake_score_updates` fake-score updates, until `student_updates`.

`python -m distill_bench.train RUN_FOLDER` trains the run that RUN_FOLDER/run.yaml describes, from its newest checkpoint where
there is one. The loop knows no method: what a method wants is declared (`distill_bench.method`).

Gradients are averaged over processes once at the end of a phase and no role is wrapped: data-parallel wrappers are silently
wrong for two forwards before a backward, and accelerate's accumulation counter is shared by all optimisers.
"""

import dataclasses
import functools
import json
import math
import resource
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from distill_bench.config.resolve import load_run, method_of
from distill_bench.config.schema import RunConfig
from distill_bench.draws import Draws, generator
from distill_bench.method import Batch, Loss, Nets
from distill_bench.networks.denoiser import Denoiser, Guided
from distill_bench.networks.ledger import Ledger
from distill_bench.networks.pipeline import pipeline_of
from distill_bench.networks.precision import Masters, in_precision
from distill_bench.networks.roles import build_networks
from distill_bench.networks.sharding import all_ranks, clip_gradients, is_sharded, local, whole
from distill_bench.noise import add_noise, student_sigmas
from distill_bench.rollout import rollout
from distill_bench.store.files import append_jsonl, read_jsonl, write_bytes
from distill_bench.teachers.kinds import Pipeline
from distill_bench.train import checkpoint
from distill_bench.train.extras import Provider, needs_of, providers
from distill_bench.train.signals import SIGNAL_SAMPLES, signals

COLLAPSED_STD, EXPLODED_STD = 0.02, 50.0  # of the student's latents, whose data have unit variance


class Collapsed(RuntimeError):
    """The run diverged: a data point, not a crash."""


@dataclasses.dataclass(frozen=True)
class Samples:
    """One micro-batch of the student's samples, detached, with the prompts that made them.

    `fake_score_terms` are the fake score's loss on them where the run reuses the whole graph, else empty.
    """

    x0: Tensor
    text: Tensor
    fake_score_terms: Mapping[str, Tensor]


class Trainer:
    """The roles, optimisers and clock of one run."""

    def __init__(self, run_dir: Path, config: RunConfig | None = None) -> None:
        self.run_dir, self.config = run_dir, load_run(run_dir) if config is None else config
        config = self.config
        if config.threads:
            torch.set_num_threads(config.threads)
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            log_with=list(config.trackers) or None,
            project_dir=run_dir / "tracking",
        )
        self.world, self.rank, self.device = self._place()
        world, device = self.world, self.device
        if config.batch_size % (world * config.accumulation):
            raise ValueError(
                f"batch_size {config.batch_size} must be a multiple of processes x accumulation = {world} x {config.accumulation}"
            )
        self.dtype = torch.float64 if config.precision == "float64" else torch.float32
        autocast = torch.bfloat16 if config.precision == "bfloat16" else None
        pipeline = self._pipeline()
        self.latent_shape = pipeline.latent_shape(config.frames, config.height, config.width)
        self.extras = self._extras(pipeline)
        self.texts = pipeline.texts(pipeline.prompts(), self.dtype)
        null_text = self.texts.null_text
        self.method = method_of(config)
        self.sigmas = student_sigmas(config.nfe, config.shift).to(device, self.dtype)
        sharded = config.sharding and world > 1  # one process has it all, and the same numbers
        nets = build_networks(config, pipeline, all_ranks(device) if sharded else None)
        self.student, self.fake_score = nets.student, nets.fake_score
        trains_fake_score = self.fake_score is not None
        self.ema: dict[str, Tensor] = {}
        if config.ema is not None:
            average = nets.trained["student"] if nets.target is None else nets.target
            self.ema = {name: p.detach() for name, p in average.named_parameters()}
            if nets.target is None:
                self.ema = {name: value.clone() for name, value in self.ema.items()}

        self.ledger = Ledger(
            config.batch_size // world
        )  # each rank counts its share: in global batches it is the whole
        teacher = Denoiser(nets.teacher, "teacher", self.ledger, autocast)
        student = Denoiser(self.student, "student", self.ledger, autocast)
        laid_over = self.ema if config.ema is not None and nets.target is None else None
        average = (
            nets.target if config.ema is not None and nets.target is not None else self.student
        )
        target = Denoiser(average, "target", self.ledger, autocast, laid_over)
        self.exact_fake_score = pipeline.exact_fake_score(
            self.student, self.sigmas, config.stepping, self._exits()
        )
        fake_score = None
        if trains_fake_score:
            fake_score = Denoiser(self.fake_score, "fake_score", self.ledger, autocast)
        elif config.fake_score == "exact":
            fake_score = self.exact_fake_score
        self.modules = in_precision(self._modules(teacher, null_text), config.precision).to(device)
        self.roles = {"student": self.student, "modules": self.modules}
        if trains_fake_score:
            self.roles["fake_score"] = self.fake_score
        self.trained = {
            **nets.trained,
            "modules": self.modules,
        }  # by role: what is stepped, averaged and saved
        if not trains_fake_score and len(self.modules):
            raise ValueError(
                f"{config.method['name']} has modules of its own: they are trained with a fake score, and there is none"
            )
        self.optimisers = self._optimisers()
        flops: dict[str, float] = {}  # by architecture: roles that began as copies are counted once
        for role, net in (
            {"student": self.student, "fake_score": self.fake_score, "teacher": nets.teacher}
        ).items():
            key = f"{type(net)} {getattr(net, 'config', role)}"
            if key not in flops and net is not None:
                with torch.autocast(device.type, autocast, enabled=autocast is not None):
                    flops[key] = pipeline.flops(net, self.latent_shape, null_text)
            if net is not None:
                self.ledger.flops[role] = flops[key]
        if config.compile:
            for net in filter(None, (self.student, self.fake_score, nets.teacher)):
                net.compile_repeated_blocks()
        self.nets = Nets(
            student=student,
            fake_score=fake_score,
            teacher=Guided(
                teacher, null_text, config.guidance_scale, config.guidance_forwards == "batched"
            ),
            rollout=self._rollout,
            exit_sigma=self._exit_sigma,
            target=target,
            unguided_teacher=teacher,
            null_text=null_text,
            guidance_scale=config.guidance_scale,
            decode=pipeline.decode_video,
            modules=self.modules,
            mean_over_ranks=lambda x: self.accelerator.reduce(x, "mean"),
        )
        self.student_updates, self.seconds = 0, 0.0
        self.scalars: dict[str, Tensor | float] = {}
        self.accelerator.init_trackers("train")

    def _place(self) -> tuple[int, int, torch.device]:
        """How many processes train the run together, which of them this is, and its device."""
        return (
            self.accelerator.num_processes,
            self.accelerator.process_index,
            self.accelerator.device,
        )

    def _pipeline(self) -> Pipeline:
        return pipeline_of(self.config, self.device, self.run_dir.parent)

    def _extras(self, pipeline: Pipeline) -> dict[str, Provider]:
        return providers(needs_of(self.config), self.config, pipeline, self.run_dir.parent)

    # ---- one update of each role

    def update_student(self) -> list[Samples]:
        """One optimiser step of the student; returns its detached samples by micro-batch, for reuse."""
        samples: list[Samples] = []

        def loss_of(batch: Batch, _: int) -> Loss:
            loss = self.method.student_loss(self.nets, batch)
            if loss.x0 is not None:
                kept = loss.fake_score_terms if self.config.reuse_rollout == "graph" else {}
                samples.append(Samples(loss.x0.detach(), batch.text, kept))
            elif self.config.reuse_rollout and self.fake_score is not None:
                raise ValueError(
                    f"{self.config.method['name']}: its student's phase makes no samples to reuse: `reuse_rollout: false`"
                )
            return loss

        self._update("student", "student", loss_of)
        return samples

    @torch.no_grad()
    def after_student_update(self) -> None:
        """The method's hook, and the student's moving average."""
        self.method.after_student_update(self.trained)
        # the graph of both phases is still to be gone through backwards, with the fake score as it was
        self._publish(["student"] if self.config.reuse_rollout == "graph" else self.trained)
        if self.config.ema is not None:
            newest = [local(p) for p in self.trained["student"].parameters()]
            torch._foreach_lerp_(
                [local(value) for value in self.ema.values()], newest, 1 - self.config.ema
            )

    def update_fake_score(self, index: int, reused: list[Samples] | None) -> None:
        """One optimiser step of the fake score and the method's modules, on reused samples or on a rollout of its own."""

        def loss_of(batch: Batch, micro: int) -> Loss:
            if reused is None:
                with torch.no_grad():
                    x0 = self._rollout(batch)
            elif reused[micro].fake_score_terms:
                return Loss(reused[micro].fake_score_terms)
            else:
                x0, batch = reused[micro].x0, dataclasses.replace(batch, text=reused[micro].text)
            return self.method.fake_score_loss(self.nets, batch, x0)

        self._update("fake_score", f"fake_score/{index}", loss_of)

    def _update(self, role: str, phase: str, loss_of: Callable[[Batch, int], Loss]) -> None:
        """Accumulate the gradients of a phase, average over processes, clip, step."""
        scalars = self._over_ranks(self._backward(role, phase, loss_of))
        if "x0_std" in scalars:  # of the whole batch, so that all ranks collapse together
            std = scalars["x0_std"] = (scalars["x0_std"] - scalars.pop("x0_mean") ** 2).abs().sqrt()
            if not COLLAPSED_STD < float(std) < EXPLODED_STD:
                raise Collapsed(f"the student's samples have standard deviation {float(std):.3g}")
        groups = {name: self.optimisers[name] for name in self.optimisers if trained_in(role, name)}
        for name, optimiser in groups.items():
            parameters = [
                p for group in optimiser.param_groups for p in group["params"] if p.grad is not None
            ]
            if self.accelerator.num_processes > 1:
                for p in parameters:
                    if not is_sharded(
                        p
                    ):  # a sharded role has averaged its gradients in the backward
                        p.grad = self.accelerator.reduce(p.grad, "mean")
            norm = clip_gradients(parameters, self.config.grad_clip)
            if not math.isfinite(norm):
                bad = [term for term, value in scalars.items() if not value.isfinite()]
                named = f" (not finite: {', '.join(bad)})" if bad else ""
                raise Collapsed(f"the gradient of the {name} is {norm}{named}")
            scalars[f"{name}_grad_norm"] = norm
        for optimiser in groups.values():
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self._publish(name for name in self.trained if trained_in(role, name))
        self.scalars |= scalars

    def _backward(
        self, role: str, phase: str, loss_of: Callable[[Batch, int], Loss]
    ) -> dict[str, Tensor]:
        """Accumulate the gradients of a phase over its micro-batches; returns what is logged of them."""
        accumulation, scalars = self.config.accumulation, {}
        shared, inputs = self.config.reuse_rollout == "graph" and self.fake_score is not None, None
        if shared:  # a backward through a graph of both phases must reach this phase's roles alone
            inputs = [
                p
                for name, net in self.roles.items()
                if trained_in(role, name)
                for p in net.parameters()
            ]
        for micro in range(accumulation):
            self._freeze_all_but(role)
            if shared:
                self.fake_score.requires_grad_(True)
            loss = loss_of(self._batch(phase, micro), micro)
            if shared:
                self._freeze_all_but(role)
            total = loss.total
            if not loss.terms or not total.requires_grad:
                raise ValueError(
                    f"{self.config.method['name']}: the {role} loss ({', '.join(loss.terms)}) has no gradient"
                )
            (total / accumulation).backward(
                inputs=inputs, retain_graph=shared and role == "student"
            )
            logs = {f"{role}_loss": total, **loss.terms, **loss.logs}
            if loss.x0 is not None:
                x0 = loss.x0.detach().double()
                logs |= {"x0_mean": x0.mean(), "x0_std": x0.square().mean()}
            for name, value in logs.items():
                scalars[name] = scalars.get(name, 0.0) + value.detach() / accumulation
        return scalars

    def _publish(self, roles: Iterable[str]) -> None:
        """Masters that were moved are rounded into their networks."""
        for trained in map(self.trained.get, roles):
            if isinstance(trained, Masters):
                trained.publish()

    def _freeze_all_but(self, role: str) -> None:
        """A backward through a frozen role reaches its input alone. The modules are trained where the fake score is."""
        for name, net in self.roles.items():
            net.requires_grad_(trained_in(role, name))

    def _batch(self, phase: str, micro: int) -> Batch:
        """This process's micro-batch of a phase: which prompts, and draws keyed by the global sample index."""
        config, world, rank = self.config, self.world, self.rank
        share = config.batch_size // (world * config.accumulation)
        first = (micro * world + rank) * share
        draws = Draws(
            config.seed,
            self.student_updates,
            phase,
            range(first, first + share),
            self.device,
            self.dtype,
        )
        return self._batch_of(draws)

    def _batch_of(self, draws: Draws) -> Batch:
        config = self.config
        if config.student_input == "real_data":
            text = self.extras["real_latents"](draws)["text"]
        else:
            text = self.texts.rows(draws.integers("prompt", len(self.texts)))
        return Batch(
            text,
            draws,
            self.latent_shape,
            config.score_shift,
            config.sigma_min,
            config.sigma_max,
            self.extras,
        )

    def _rollout(self, batch: Batch, exit_step: int | None = None) -> Tensor:
        exit_step = self._exit_step(batch) if exit_step is None else exit_step
        if self.config.student_input == "real_data":
            real, sigma = batch.extra("real_latents")["x0"], self._exit_sigma(batch, exit_step)
            return self.nets.student(
                add_noise(real, batch.noise("rollout/0"), sigma), sigma, batch.text
            )
        noises = [batch.noise(f"rollout/{step}") for step in range(exit_step + 1)]
        return rollout(
            self.nets.student,
            noises,
            self.sigmas,
            batch.text,
            self.config.stepping,
            torch.is_grad_enabled(),
        )

    def _exits(self) -> list[int]:
        nfe = self.config.nfe
        return list(range(nfe)) if self.config.exit_step == "random" else [nfe - 1]

    def _exit_step(self, batch: Batch) -> int:
        exits = self._exits()
        return exits[batch.draws.shared_integer("exit", len(exits))]

    def _exit_sigma(self, batch: Batch, exit_step: int | None = None) -> Tensor:
        """The noise level (B,) at which a batch's rollout ends."""
        return self.sigmas[self._exit_step(batch) if exit_step is None else exit_step].expand(
            len(batch.text)
        )

    # ---- ranks

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank: all must leave the loop at the same update."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(
            self.accelerator.reduce(
                torch.tensor(float(flag), device=self.accelerator.device), "sum"
            )
        )

    def check_ranks(self) -> None:
        """Every rank must hold the same weights of every role and stand at the same update.

        Raises:
            RuntimeError: if they differ: a run that went on would be nobody's.
        """
        if self.accelerator.num_processes == 1:
            return
        sums = [
            sum(float(whole(p.detach()).double().sum()) for p in net.parameters())
            for net in self.trained.values()
        ]
        mine = torch.tensor(
            [self.student_updates, *sums], dtype=torch.float64, device=self.accelerator.device
        )
        ranks = self.accelerator.gather(mine).reshape(-1, len(mine))
        same = (ranks == ranks[0]).all(0) | ranks.isnan().all(
            0
        )  # a collapsed run may hold NaN, on every rank
        unlike = [
            name
            for name, alike in zip(["student_updates", *self.trained], same.tolist(), strict=True)
            if not alike
        ]
        if unlike:
            raise RuntimeError(f"the ranks differ in: {', '.join(unlike)}")

    def _over_ranks(self, scalars: dict[str, Tensor]) -> dict[str, Tensor]:
        """Means over the ranks: what one process with the whole batch would see."""
        if self.accelerator.num_processes == 1:
            return scalars
        means = self.accelerator.reduce(
            torch.stack([value.double() for value in scalars.values()]), "mean"
        )
        return dict(zip(scalars, means, strict=True))

    # ---- records

    def log(self) -> dict:
        """Append the newest scalars to train.jsonl and to the trackers; returns the line."""
        config = self.config
        signals = {}
        if config.signals_every and self.student_updates % config.signals_every == 0:
            signals = self.signals()
        scalars = {name: float(value) for name, value in self.scalars.items()}
        if config.fake_score_updates is not None:
            # under Adam a step moves weights by about lr: the two time scales differ by this, not by the count alone
            scalars["rho"] = config.fake_score_updates * config.fake_score_lr / config.student_lr
        line = {
            "student_updates": self.student_updates,
            "seconds": round(self.seconds, 3),
            "cost_forward_equivalents": self.ledger.forward_equivalents(),
            **scalars,
            **signals,
        }
        if self.accelerator.is_main_process:
            append_jsonl(self.run_dir / "train.jsonl", line)
        self.accelerator.log(scalars | signals, step=self.student_updates)
        return line

    def signals(self) -> dict[str, float]:
        """What the losses cannot say (`distill_bench.train.signals`), outside the run's clock, ledger and state."""
        kept = {key: value.clone() for key, value in self.modules.state_dict().items()}
        self.ledger.enabled = False
        self._freeze_all_but("student")
        draws = Draws(
            self.config.seed,
            0,
            "signals",
            range(SIGNAL_SAMPLES),
            self.accelerator.device,
            self.dtype,
        )
        last = {"exit_step": self._exits()[-1]}  # one for all seeds
        rollout, exit_sigma = (
            functools.partial(self._rollout, **last),
            functools.partial(self._exit_sigma, **last),
        )
        nets = dataclasses.replace(self.nets, rollout=rollout, exit_sigma=exit_sigma)
        try:
            return signals(self.method, nets, self._batch_of(draws), self.exact_fake_score)
        finally:
            self.ledger.enabled = True
            self.modules.load_state_dict(kept)

    def summary(self) -> dict:
        """What a table needs of a training: clock, cost by role, peak memory."""
        if self.accelerator.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**30
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return {
            "student_updates": self.student_updates,
            "train_seconds": round(self.seconds, 3),
            "cost_forward_equivalents": self.ledger.forward_equivalents(),
            "cost": self.ledger.counts,
            "peak_memory_gib": round(peak, 3),
            "samples_seen": self.student_updates * self.config.batch_size,
        }

    def save(self) -> None:
        """Write checkpoints/<student_updates>/ atomically; older ones but the last two are pruned."""
        self.check_ranks()
        state = {
            "student_updates": self.student_updates,
            "seconds": self.seconds,
            "cost": self.ledger.counts,
        }
        writes = self.accelerator.is_main_process
        checkpoint.save(
            self.run_dir,
            self.student_updates,
            self.trained,
            self.ema,
            self.optimisers,
            state,
            writes,
        )
        self.accelerator.wait_for_everyone()

    def save_student(self) -> None:
        """Keep the student as it would be sampled now, in students/<student_updates>.safetensors."""
        weights = (
            dict(self.trained["student"].named_parameters())
            if self.config.ema is None
            else self.ema
        )
        checkpoint.save_student(
            self.run_dir, self.student_updates, weights, writes=self.accelerator.is_main_process
        )

    def resume(self) -> None:
        """Go on from the newest sound checkpoint, if any, and cut train.jsonl back to it."""
        state = checkpoint.load(self.run_dir, self.trained, self.ema, self.optimisers)
        if state is not None:
            self.student_updates, self.seconds = state["student_updates"], state["seconds"]
            self.ledger.counts = state["cost"]
        self.check_ranks()
        path = self.run_dir / "train.jsonl"
        if path.exists() and self.accelerator.is_main_process:
            lines = [
                line for line in read_jsonl(path) if line["student_updates"] <= self.student_updates
            ]
            write_bytes(path, "".join(json.dumps(line) + "\n" for line in lines).encode())

    # ---- parts

    def _modules(self, teacher: Denoiser, null_text: Tensor) -> nn.ModuleDict:
        """The method's own modules, alike on every rank and in every run of a seed."""
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(self.config.seed, "modules").initial_seed())
            x = torch.zeros(1, *self.latent_shape, device=null_text.device, dtype=self.dtype)
            tokens = teacher.features(
                x, torch.full((1,), 0.5, device=x.device, dtype=x.dtype), null_text, 0.0
            )
            modules = self.method.modules(tokens.shape[-1])
        self.ledger.counts.clear()
        return nn.ModuleDict(modules)

    def _optimisers(self) -> dict[str, torch.optim.AdamW]:
        """One for the student, one for the fake score and the modules that share it, one for each module with its own rate."""
        config, own = self.config, self.method.learning_rates()
        optimisers = {
            "student": self._adamw(self.trained["student"].parameters(), config.student_lr)
        }
        if self.fake_score is not None:
            shared = [
                p
                for name, module in self.modules.items()
                if name not in own
                for p in module.parameters()
            ]
            optimisers["fake_score"] = self._adamw(
                [*self.trained["fake_score"].parameters(), *shared], config.fake_score_lr
            )
        return optimisers | {
            name: self._adamw(self.modules[name].parameters(), lr) for name, lr in own.items()
        }

    def _adamw(self, parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.AdamW:
        config, parameters = self.config, list(parameters)
        groups = [
            [p for p in parameters if is_sharded(p)],
            [p for p in parameters if not is_sharded(p)],
        ]
        return torch.optim.AdamW(
            [{"params": group} for group in groups if group],
            lr=lr,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )


def trained_in(phase: str, role: str) -> bool:
    """The student is trained in its phase; the fake score and the modules in the fake score's."""
    return (role == "student") == (phase == "student")
