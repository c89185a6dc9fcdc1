"""The only training loop: one student update, then `fake_score_updates` fake-score updates, until `student_updates`.

`python -m distill_bench.train RUN_FOLDER` trains the run that RUN_FOLDER/run.yaml describes, from its newest checkpoint where
there is one. The loop knows no method: what a method wants is declared (`distill_bench.method`).

Gradients are averaged over processes once at the end of a phase and no role is wrapped: data-parallel wrappers are silently
wrong for two forwards before a backward, and accelerate's accumulation counter is shared by all optimisers.
"""

import argparse
import dataclasses
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from distill_bench import checkpoint
from distill_bench.config import RunConfig, evaluated_updates, load_run, method_of
from distill_bench.cost import Ledger
from distill_bench.draws import Draws
from distill_bench.extras import providers
from distill_bench.method import Batch, Loss, Nets
from distill_bench.models import Denoiser, Guided, forward_flops, load_pipeline, load_transformer
from distill_bench.noise import student_sigmas
from distill_bench.rollout import rollout
from distill_bench.store import append_jsonl, read_json, read_jsonl, write_bytes, write_json

COLLAPSED_STD, EXPLODED_STD = 0.02, 50.0  # of the student's latents, whose data have unit variance


class Collapsed(RuntimeError):
    """The run diverged: a data point, not a crash."""


def train(run_dir: Path, stop: Callable[[], bool] = lambda: False) -> dict:
    """Train the run in `run_dir` to its end, or until `stop()` is true at the end of an update, and return its summary.

    Writes train.jsonl, checkpoints/, students/ and train.json. The summary has `status` "done", "collapsed" (with `reason`) or
    "stopped" (checkpointed; train again to go on).
    """
    summary = read_json(run_dir / "train.json")
    if summary is not None and summary["status"] != "stopped":
        return summary
    trainer = Trainer(run_dir)
    trainer.resume()
    config, status, reason = trainer.config, "done", None
    evaluated = set(evaluated_updates(config))
    try:
        with _progress(trainer.accelerator.is_main_process) as report:
            while trainer.student_updates < config.student_updates:
                began = time.perf_counter()
                samples = trainer.update_student()
                for index in range(config.fake_score_updates * trainer.method.has_fake_score):
                    trainer.update_fake_score(index, samples if config.reuse_rollout and index == 0 else None)
                trainer.student_updates += 1
                trainer.seconds += time.perf_counter() - began

                at_end = trainer.student_updates == config.student_updates
                stopping = not at_end and stop()
                if at_end or trainer.student_updates % config.log_every == 0:
                    report(trainer.log(), config.student_updates)
                if trainer.student_updates in evaluated:
                    trainer.save_student()
                if at_end or stopping or trainer.student_updates % config.checkpoint_every == 0:
                    trainer.save()
                if stopping:
                    status = "stopped"
                    break
    except Collapsed as error:
        status, reason = "collapsed", f"{error} at student update {trainer.student_updates}"
        trainer.save()
    summary = trainer.summary() | {"status": status, "reason": reason}
    if trainer.accelerator.is_main_process:
        write_json(run_dir / "train.json", summary)
    trainer.accelerator.end_training()
    return summary


@dataclasses.dataclass(frozen=True)
class Samples:
    """One micro-batch of the student's samples, detached, with the prompts that made them."""

    x0: Tensor
    text: Tensor


class Trainer:
    """The roles, optimisers and clock of one run."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.config = run_dir, load_run(run_dir)
        config: RunConfig = self.config
        if config.threads:
            torch.set_num_threads(config.threads)
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(), log_with=list(config.trackers) or None, project_dir=run_dir / "tracking"
        )
        world, device = self.accelerator.num_processes, self.accelerator.device
        if config.batch_size % (world * config.accumulation):
            raise ValueError(
                f"batch_size {config.batch_size} must be a multiple of processes x accumulation = {world} x {config.accumulation}"
            )
        pipeline = load_pipeline(config.teacher, device)
        self.latent_shape = pipeline.latent_shape(config.frames, config.height, config.width)
        *self.texts, null_text = pipeline.encode_text([*pipeline.prompts(), ""]).unsqueeze(1)
        self.method = method_of(config)
        self.student, self.fake_score = (load_transformer(pipeline.folder).to(device) for _ in range(2))
        self.modules = nn.ModuleDict(self.method.modules(self.latent_shape)).to(device)
        self.roles = {"student": self.student, "fake_score": self.fake_score, "modules": self.modules}
        self.ema = {name: p.detach().clone() for name, p in self.student.named_parameters()}
        self.optimisers = {
            "student": self._adamw(self.student.parameters(), config.student_lr),
            "fake_score": self._adamw([*self.fake_score.parameters(), *self.modules.parameters()], config.fake_score_lr),
        }
        self.extras = providers(self.method.needs, config, pipeline, run_dir.parent.parent)
        self.ledger = Ledger(config.batch_size, self._flops(pipeline.transformer, null_text))
        autocast = torch.bfloat16 if config.precision == "bfloat16" else None
        teacher = Denoiser(pipeline.transformer, "teacher", self.ledger, autocast)
        self.nets = Nets(
            student=Denoiser(self.student, "student", self.ledger, autocast),
            fake_score=Denoiser(self.fake_score, "fake_score", self.ledger, autocast),
            teacher=Guided(teacher, null_text, config.guidance_scale),
            rollout=self._rollout,
            modules=self.modules,
        )
        self.sigmas = student_sigmas(config.nfe, config.shift).to(device)
        self.student_updates, self.seconds = 0, 0.0
        self.scalars: dict[str, float] = {}
        self.accelerator.init_trackers("train")

    # ---- one update of each role

    def update_student(self) -> list[Samples]:
        """One optimiser step of the student; returns its detached samples by micro-batch, for reuse."""
        samples: list[Samples] = []

        def loss_of(batch: Batch, _: int) -> Loss:
            loss = self.method.student_loss(self.nets, batch)
            if loss.x0 is not None:
                std = float(loss.x0.detach().std())
                self.scalars["x0_std"] = std
                if not COLLAPSED_STD < std < EXPLODED_STD:
                    raise Collapsed(f"the student's samples have standard deviation {std:.3g}")
                samples.append(Samples(loss.x0.detach(), batch.text))
            return loss

        self._update("student", "student", ("student",), loss_of)
        with torch.no_grad():
            self.method.after_student_update(self.student, self.fake_score)
            if self.config.ema is not None:
                for name, parameter in self.student.named_parameters():
                    self.ema[name].lerp_(parameter, 1 - self.config.ema)
        return samples

    def update_fake_score(self, index: int, reused: list[Samples] | None) -> None:
        """One optimiser step of the fake score, on reused samples or on a rollout of its own."""

        def loss_of(batch: Batch, micro: int) -> Loss:
            if reused is None:
                with torch.no_grad():
                    x0 = self._rollout(batch)
            else:
                x0, batch = reused[micro].x0, dataclasses.replace(batch, text=reused[micro].text)
            return self.method.fake_score_loss(self.nets, batch, x0)

        self._update("fake_score", f"fake_score/{index}", ("fake_score", "modules"), loss_of)

    def _update(self, group: str, phase: str, trainable: Iterable[str], loss_of: Callable[[Batch, int], Loss]) -> None:
        """Accumulate the gradients of a phase over its micro-batches, average over processes, clip, step."""
        for role, net in self.roles.items():
            net.requires_grad_(role in trainable)  # a backward through a frozen role reaches its input alone
        accumulation, scalars = self.config.accumulation, dict.fromkeys((f"{group}_loss",), 0.0)
        for micro in range(accumulation):
            loss = loss_of(self._batch(phase, micro), micro)
            (loss.total / accumulation).backward()
            scalars[f"{group}_loss"] += float(loss.total.detach()) / accumulation
            for name, part in loss.parts.items():
                scalars[name] = scalars.get(name, 0.0) + float(part) / accumulation
        parameters = [p for role in trainable for p in self.roles[role].parameters() if p.grad is not None]
        if self.accelerator.num_processes > 1:
            for p in parameters:
                p.grad = self.accelerator.reduce(p.grad, "mean")
        norm = float(nn.utils.clip_grad_norm_(parameters, self.config.grad_clip))
        if not math.isfinite(norm):
            raise Collapsed(f"the gradient of the {group} is {norm}")
        self.optimisers[group].step()
        self.optimisers[group].zero_grad(set_to_none=True)
        self.scalars |= scalars | {f"{group}_grad_norm": norm}

    def _batch(self, phase: str, micro: int) -> Batch:
        """This process's micro-batch of a phase: which prompts, and draws keyed by the global sample index."""
        config, world, rank = self.config, self.accelerator.num_processes, self.accelerator.process_index
        share = config.batch_size // (world * config.accumulation)
        first = (micro * world + rank) * share
        draws = Draws(config.seed, self.student_updates, phase, range(first, first + share), self.accelerator.device)
        text = torch.cat([self.texts[i] for i in draws.integers("prompt", len(self.texts))])
        extras = (
            {f"{need}/{key}": tensor for need, draw in self.extras.items() for key, tensor in draw(draws).items()}
            if phase == "student"
            else {}
        )
        return Batch(text, draws, self.latent_shape, config.score_shift, config.sigma_min, config.sigma_max, extras)

    def _rollout(self, batch: Batch) -> Tensor:
        nfe = self.config.nfe
        last = batch.draws.shared_integer("exit", nfe) if self.config.exit_step == "random" else nfe - 1
        noises = [batch.noise(f"rollout/{step}") for step in range(last + 1)]
        return rollout(self.nets.student, noises, self.sigmas, batch.text, self.config.stepping, torch.is_grad_enabled())

    # ---- records

    def log(self) -> dict:
        """Append the newest scalars to train.jsonl and to the trackers; returns the line."""
        line = {
            "student_updates": self.student_updates,
            "seconds": round(self.seconds, 3),
            "cost_forward_equivalents": self.ledger.forward_equivalents(),
            **self.scalars,
        }
        if self.accelerator.is_main_process:
            append_jsonl(self.run_dir / "train.jsonl", line)
        self.accelerator.log(self.scalars, step=self.student_updates)
        return line

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
        if self.accelerator.is_main_process:
            state = {"student_updates": self.student_updates, "seconds": self.seconds, "cost": self.ledger.counts}
            checkpoint.save(self.run_dir, self.student_updates, self.roles, self.ema, self.optimisers, state)
        self.accelerator.wait_for_everyone()

    def save_student(self) -> None:
        """Keep the student as it would be sampled now, in students/<student_updates>.safetensors."""
        if self.accelerator.is_main_process:
            weights = dict(self.student.named_parameters()) if self.config.ema is None else self.ema
            checkpoint.save_student(self.run_dir, self.student_updates, weights)

    def resume(self) -> None:
        """Go on from the newest sound checkpoint, if any, and cut train.jsonl back to it."""
        state = checkpoint.load(self.run_dir, self.roles, self.ema, self.optimisers)
        if state is not None:
            self.student_updates, self.seconds = state["student_updates"], state["seconds"]
            self.ledger.counts = state["cost"]
        path = self.run_dir / "train.jsonl"
        if path.exists() and self.accelerator.is_main_process:
            lines = [line for line in read_jsonl(path) if line["student_updates"] <= self.student_updates]
            write_bytes(path, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def _adamw(self, parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.AdamW:
        config = self.config
        return torch.optim.AdamW(
            parameters, lr=lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay, fused=True
        )

    def _flops(self, teacher: nn.Module, text: Tensor) -> dict[str, float]:
        nets = {"student": self.student, "fake_score": self.fake_score, "teacher": teacher}
        return {role: forward_flops(net, self.latent_shape, text) for role, net in nets.items()}


class _progress:
    """A rich bar in a terminal, a plain line a log elsewhere; nothing on other ranks."""

    def __init__(self, main: bool) -> None:
        self.main, self.bar = main, None
        if main and sys.stderr.isatty():
            self.bar = Progress(
                TextColumn("student updates"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), transient=True
            )

    def __enter__(self) -> Callable[[dict, int], None]:
        if self.bar:
            self.bar.start()
            self.task = self.bar.add_task("train", total=None)
        return self

    def __call__(self, line: dict, total: int) -> None:
        if self.bar:
            self.bar.update(self.task, completed=line["student_updates"], total=total)
        elif self.main:
            shown = "  ".join(f"{k} {v:.4g}" for k, v in line.items() if k != "student_updates")
            print(f"student update {line['student_updates']}/{total}  {shown}", flush=True)

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()


def main(argv: list[str] | None = None) -> int:
    """Command line: train one run folder."""
    parser = argparse.ArgumentParser(prog="distill_bench.train", description=train.__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run folder with run.yaml")
    summary = train(parser.parse_args(argv).run)
    print(f"{summary['status']} after {summary['student_updates']} student updates")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
