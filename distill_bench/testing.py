"""Conformance tests for any method, and the gradient of its loss at x0: importable, so that a stranger's file is checked too.

    from distill_bench.testing import check_methods

    def test_my_method_conforms(tmp_path):
        check_methods("path/to/my_method.py:MyMethod", folder=tmp_path)

Everything runs the real trainer on a pipeline of Wan's own classes with random weights, on the CPU, in seconds.
"""

import dataclasses
import functools
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from distill_bench import checkpoint
from distill_bench.config import MissingPackage, load_run, resolve
from distill_bench.cost import declared
from distill_bench.method import Batch, Denoise, Loss, Method, Nets, Passes
from distill_bench.models import Guided
from distill_bench.registry import find_method
from distill_bench.store import read_json
from distill_bench.train import Collapsed, Trainer, train

# --- the gradient of a loss at x0 ---


def student_gradient(
    method: Method,
    student_x0: Tensor,
    noise: Tensor,
    sigma: Tensor,
    fake_score: Denoise,
    teacher: Denoise,
    text: Tensor | None = None,
    null_text: Tensor | None = None,
    *,
    guidance_scale: float = 1.0,
    student: Denoise | None = None,
    extras: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Tensor:
    """The gradient of a method's student loss at x0, (B, C, T, H, W), for given denoisers and draws.

    Every draw of noise is `noise`, every draw of a noise level `sigma`, every draw of an integer 0, whatever its purpose, so that
    nothing is random. All is in the dtype of the inputs. Heads have random weights of a fixed seed, on `features` of the
    denoisers where these have them, else on their predictions as tokens. A method that makes its samples itself (`Loss.x0` is
    not the rollout's) is differentiated there.

    Args:
        student_x0: the student's samples (B, C, T, H, W).
        noise: (B, C, T, H, W).
        sigma: in (0, 1], (B,).
        fake_score: (x_t, sigma, text) -> x0_hat; closures of any kind.
        teacher: likewise, unguided.
        text: (B, L, D); None is zeros (B, 1, 1).
        null_text: (1, L, D), for methods that look at guidance themselves and for a guidance_scale other than 1.
        guidance_scale: of the teacher, uncond + g (cond - uncond).
        student: predicts for terms that run the student directly; by default it gives student_x0 whatever it sees.
        extras: real_latents and ode_pairs as `Batch.extra` gives them; by default student_x0 stands for data.
    """
    x0 = student_x0.detach().clone().requires_grad_()
    text = noise.new_zeros(len(noise), 1, 1) if text is None else text
    null_text = torch.zeros_like(text[:1]) if null_text is None else null_text
    direct = student_x0.detach().clone().requires_grad_()
    given = {"x0": student_x0.detach(), "noise": noise, "text": text}
    extras = {"real_latents": given, "ode_pairs": given} | dict(extras or {})
    batch = Batch(
        text,
        _GivenDraws(noise, sigma),
        tuple(noise.shape[1:]),
        1.0,
        0.0,
        1.0,
        {k: (lambda _, v=v: v) for k, v in extras.items()},
    )
    role = _WithFeatures(teacher)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        modules = method.modules(role.features(noise, sigma, text, 1.0).shape[-1])
    nets = Nets(
        student=_WithFeatures(student or (lambda x_t, sigma, text: direct)),
        fake_score=_WithFeatures(fake_score),
        teacher=Guided(role, null_text, guidance_scale),
        rollout=lambda _: x0,
        exit_sigma=lambda _: torch.zeros_like(sigma),
        target=teacher,
        unguided_teacher=role,
        null_text=null_text,
        guidance_scale=guidance_scale,
        modules={
            name: module.to(noise.dtype).requires_grad_(False) for name, module in modules.items()
        },
    )
    loss = method.student_loss(nets, batch)
    if loss.x0 is None:
        raise ValueError(
            f"{type(method).__name__} makes no samples of the student: its loss has no gradient at x0"
        )
    (gradient,) = torch.autograd.grad(loss.total, loss.x0, allow_unused=True)
    return torch.zeros_like(x0) if gradient is None else gradient.detach()


@dataclasses.dataclass(frozen=True)
class _GivenDraws:
    """Draws that are what they are told to be."""

    given_noise: Tensor
    given_sigma: Tensor

    def noise(self, *_: object) -> Tensor:
        return self.given_noise

    def sigma(self, *_: object) -> Tensor:
        return self.given_sigma

    def uniform(self, *_: object) -> Tensor:
        return self.given_sigma

    def integers(self, *_: object) -> list[int]:
        return [0] * len(self.given_sigma)

    def shared_integer(self, *_: object) -> int:
        return 0


@dataclasses.dataclass(frozen=True)
class _WithFeatures:
    """A denoiser whose features, where it has none, are its prediction as tokens (B, T H W, C)."""

    denoise: Denoise

    def __call__(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        return self.denoise(x_t, sigma, text)

    def features(self, x_t: Tensor, sigma: Tensor, text: Tensor, depth: float) -> Tensor:
        if hasattr(self.denoise, "features"):
            return self.denoise.features(x_t, sigma, text, depth)
        return self.denoise(x_t, sigma, text).flatten(2).transpose(1, 2)


# --- conformance ---

BASE = {
    "student_updates": 1,
    "fake_score_updates": 2,
    "batch_size": 4,
    "nfe": 2,
    "frames": 5,
    "height": 16,
    "width": 16,
    "checkpoint_every": 1,
    "log_every": 1,
    "signals_every": 1,
    "trackers": [],
    "evaluations": 1,
    "protocol": {"clips": 2, "teacher_steps": 2},
}


def check_methods(
    *methods: str | type[Method] | Mapping[str, Any], folder: Path, ranks: bool = True
) -> None:
    """Every conformance test for each method: a name as in a sweep, a class, or a run's `method` with its fields.

    Without `ranks` no processes are launched; `check_two_ranks` does that for many methods in one launch.

    Raises:
        AssertionError: at the first that fails, naming the method, the check and what is wrong; whatever a method itself raises
            is its cause.
    """
    for at, method in enumerate(methods):
        runs = Runs(method, folder, f"{at}")
        for check in CHECKS:
            check(runs)
    if ranks:
        check_two_ranks(*methods, folder=folder)


class Runs:
    """Makes run folders of one method on a tiny pipeline in `folder`; all with `fields`, for instance an adapter."""

    def __init__(
        self,
        method: str | type[Method] | Mapping[str, Any],
        folder: Path,
        prefix: str = "0",
        fields: Mapping[str, Any] = {},
    ) -> None:  # noqa: B006 - never changed
        if isinstance(method, type):
            method = f"{method.__module__}:{method.__qualname__}"
        self.method = {"name": method} if isinstance(method, str) else dict(method)
        self.folder, self.prefix, self.fields, self.made = folder, prefix, fields, 0
        self.name = ", ".join(str(value) for value in self.method.values())

    def make(self, **fields: Any) -> Path:
        """A run folder with the given fields over BASE."""
        teacher, data = self.folder / "tiny-wan", self.folder / "clips"
        if not teacher.is_dir():
            tiny_pipeline(teacher)
            tiny_clips(data)
        self.made += 1
        run = self.folder / "runs" / f"conformance-{self.prefix}-{self.made}"
        run.mkdir(parents=True)
        config = resolve(
            BASE
            | {"teacher": str(teacher), "data": str(data), "method": self.method}
            | dict(self.fields)
            | fields
        )
        (run / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
        return run

    def trainer(self, **fields: Any) -> Trainer:
        """The trainer of such a run."""
        return Trainer(self.make(**fields))

    @functools.cached_property
    def untrained(self) -> Trainer:
        """One that stays as it began, for checks that only look at losses."""
        return self.trainer()


@contextmanager
def _named(method: str, check: str) -> Iterator[None]:
    """Whatever goes wrong inside is an AssertionError that names the method and the check."""
    try:
        yield
    except Exception as error:
        said = str(error).strip() or "no message"
        if not isinstance(error, AssertionError):
            said = f"{type(error).__name__}: {said.splitlines()[0]}"
        raise AssertionError(f"{method}: {check}: {said}") from error


def _check(check: Callable[[Runs], None]) -> Callable[[Runs], None]:
    """A conformance test, all of whose failures are `_named`."""

    @functools.wraps(check)
    def checked(runs: Runs) -> None:
        with _named(runs.name, check.__name__):
            check(runs)

    return checked


@_check
def check_losses(runs: Runs) -> None:
    """The terms of each phase are finite scalars with a gradient, and those that move the student's samples pass `Loss.x0`.

    Terms that do not (a regression on a prediction of the student's beside its samples) are free not to.
    """
    trainer = runs.untrained

    def check(phase: str, loss: Loss) -> None:
        assert isinstance(loss, Loss), f"{phase} loss is a {type(loss).__name__}, not a Loss"
        assert loss.terms, f"{phase} loss has no terms"
        for name, term in loss.terms.items():
            scalar = isinstance(term, Tensor) and term.ndim == 0
            assert scalar, (
                f"{phase} loss: term {name!r} is no scalar but {getattr(term, 'shape', type(term).__name__)}"
            )
            assert term.isfinite(), f"{phase} loss: term {name!r} is {term.item()}"
        assert loss.total.requires_grad, (
            f"{phase} loss has no gradient: no term of {list(loss.terms)} has a graph"
        )

    trainer._freeze_all_but("student")
    rollouts: list[Tensor] = []

    def rollout(batch: Batch) -> Tensor:
        rollouts.append(trainer.nets.rollout(batch))
        return rollouts[-1]

    batch = trainer._batch("student", 0)
    loss = trainer.method.student_loss(dataclasses.replace(trainer.nets, rollout=rollout), batch)
    check("the student's", loss)
    if loss.x0 is None:
        assert not rollouts, (
            "the student's phase makes a rollout, and Loss.x0 is None: give the samples"
        )
    else:
        expected = (len(batch.text), *batch.latent_shape)
        assert loss.x0.shape == expected, (
            f"Loss.x0 is {tuple(loss.x0.shape)}, not samples of {expected}"
        )
        # samples for the fake score alone need no gradient
        passes = _reached(loss.total, [loss.x0]) or (
            rollouts and not _reached(loss.total, rollouts)
        )
        assert passes, (
            "no term has a gradient at Loss.x0: give the samples that the terms are made of, with their graph"
        )
    if trainer.fake_score is not None:
        trainer._freeze_all_but("fake_score")
        batch = trainer._batch("fake_score/0", 0)
        with torch.no_grad():
            x0 = trainer.nets.rollout(batch)
        check("the fake score's", trainer.method.fake_score_loss(trainer.nets, batch, x0))


def _reached(value: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Whether a backward from `value` passes any of the tensors."""
    tensors = [x for x in tensors if x.requires_grad]
    if not tensors:
        return False
    return any(
        g is not None
        for g in torch.autograd.grad(value, tensors, retain_graph=True, allow_unused=True)
    )


@_check
def check_routing(runs: Runs) -> None:
    """A phase moves its own roles, leaves a gradient on none, and never touches the teacher."""
    trainer = runs.trainer()
    nets = trainer.roles | {"teacher": trainer.nets.unguided_teacher.net}

    def moved(phase: str, update: Callable[[], Any]) -> set[str]:
        before = {
            role: [p.detach().clone() for p in net.parameters()] for role, net in nets.items()
        }
        update()
        for role, net in nets.items():
            assert all(p.grad is None for p in net.parameters()), (
                f"{phase} phase leaves a gradient on {role}"
            )
        return {
            role
            for role, net in nets.items()
            if any(
                not torch.equal(p, q) for p, q in zip(net.parameters(), before[role], strict=True)
            )
        }

    found = moved("the student's", trainer.update_student)
    assert found == {"student"}, f"the student's phase moved {sorted(found)}"
    if trainer.fake_score is not None:
        own = {"fake_score"} | (
            {"modules"} if any(True for _ in trainer.modules.parameters()) else set()
        )
        found = moved("the fake score's", lambda: trainer.update_fake_score(0, None))
        assert found == own, f"the fake score's phase moved {sorted(found)}, not {sorted(own)}"


@_check
def check_detachment(runs: Runs) -> None:
    """Backward reaches frozen roles by their input alone, and by that only where the method's cost declares it.

    None of their weights is ever part of a graph, and a prediction left attached (the x0_teacher of a normaliser) is found. What
    stays outside of networks is not: a normaliser of an x0 that is not detached changes the objective and nothing else, which
    `student_gradient` held against the formula shows.
    """
    trainer = runs.untrained
    nets = trainer.roles | {"teacher": trainer.nets.unguided_teacher.net}

    def check(phase: str, loss: Loss, frozen: tuple[str, ...]) -> None:
        leaves = _leaves(loss.total)
        for role in frozen:
            weights = {id(p) for p in nets[role].parameters()} if role in nets else set()
            assert not weights & leaves, f"{phase} loss has a graph to weights of {role}"

    trainer._freeze_all_but("student")
    given = {
        role: getattr(trainer.nets, role) for role in ("fake_score", "teacher", "unguided_teacher")
    }
    watched = {role: _Watched(network) for role, network in given.items() if network is not None}
    loss = trainer.method.student_loss(
        dataclasses.replace(trainer.nets, **watched), trainer._batch("student", 0)
    )
    check("the student's", loss, ("fake_score", "modules", "teacher"))
    declared_passes = trainer.method.cost().student
    for role, network in watched.items():
        names = (role, "guidance") if role == "unguided_teacher" else (role,)
        passes = [declared_passes.get(name, Passes()) for name in names]
        assert any(p.input_backward or p.full_backward for p in passes) or not _reached(
            loss.total, network.made
        ), (
            f"the student's loss reaches the input of {role}, where its cost declares no backward: "
            "detach what is made of the prediction (a normaliser, a target), or declare the backward"
        )
    if trainer.fake_score is not None:
        trainer._freeze_all_but("fake_score")
        batch = trainer._batch("fake_score/0", 0)
        with torch.no_grad():
            x0 = trainer.nets.rollout(batch)
        check(
            "the fake score's",
            trainer.method.fake_score_loss(trainer.nets, batch, x0),
            ("student", "teacher"),
        )


class _Watched:
    """A role that keeps what it predicted."""

    def __init__(self, role: Any) -> None:
        self.role, self.made = role, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.role, name)

    def __call__(self, *inputs: Any) -> Tensor:
        self.made.append(self.role(*inputs))
        return self.made[-1]

    def features(self, *inputs: Any) -> Tensor:
        self.made.append(self.role.features(*inputs))
        return self.made[-1]


def _leaves(value: Tensor) -> set[int]:
    """Ids of the leaf tensors that a backward from `value` would reach."""
    found, seen, todo = set(), set(), [value.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        todo += [each for each, _ in node.next_functions]
    return found


@_check
def check_cost(runs: Runs) -> None:
    """The passes that the ledger counted are those that the method declares."""
    trainer = runs.untrained
    trainer._freeze_all_but("student")
    reuses = trainer.method.student_loss(trainer.nets, trainer._batch("student", 0)).x0 is not None
    cases = [
        {},
        {"reuse_rollout": reuses, "accumulation": 2},
        {"guidance_scale": 1.0, "fake_score_updates": 3},
    ]
    if find_method(runs.method["name"]).shares_graph:
        cases.append({"reuse_rollout": "graph", "accumulation": 2})
    for fields in cases:
        run = runs.make(exit_step="last", **fields)
        summary, said = train(run), declared(load_run(run))
        assert summary["status"] == "done", f"with {fields or 'the base'}: {summary['reason']}"
        counted = summary["cost"]
        for role in sorted({*counted, *said}):
            one, other = (counts.get(role, {}) for counts in (counted, said))
            same = all(abs(one.get(kind, 0) - other.get(kind, 0)) < 1e-9 for kind in {*one, *other})
            assert same, (
                f"with {fields or 'the base'}: declares {other} of {role}, the ledger counted {one}"
            )


@_check
def check_shared_graph(runs: Runs) -> None:
    """A graph that both phases share moves the student as one of its own does, and the fake score by its own terms alone."""
    if not find_method(runs.method["name"]).shares_graph:
        return
    fields = {"accumulation": 2, "grad_clip": 1e6}
    sharing, apart = (runs.trainer(**fields, reuse_rollout=reuse) for reuse in ("graph", True))
    weights = list(sharing.fake_score.parameters())
    sharing._freeze_all_but("fake_score")
    losses = [
        sharing.method.student_loss(sharing.nets, sharing._batch("student", micro))
        for micro in range(2)
    ]
    total = sum(sum(loss.fake_score_terms.values()) for loss in losses) / 2
    expected = torch.autograd.grad(total, weights, allow_unused=True)
    samples = sharing.update_student()
    apart.update_student()
    for p, q in zip(sharing.student.parameters(), apart.student.parameters(), strict=True):
        assert torch.equal(p, q), "a shared graph moves the student elsewhere"
    found: list[Tensor | None] = []
    sharing.optimisers["fake_score"].register_step_pre_hook(
        lambda *_: found.extend(p.grad for p in weights)
    )
    sharing.update_fake_score(0, samples)
    for p, g, e in zip(weights, found, expected, strict=True):
        same = torch.allclose(g, e, rtol=1e-4, atol=1e-7) if e is not None else g is None
        assert same, (
            f"the fake score's gradient of a shared graph, {tuple(p.shape)}, is not that of its own terms"
        )


@_check
def check_optimiser_steps(runs: Runs) -> None:
    """The student steps once an update, everything else `fake_score_updates` times, whatever the accumulation."""
    for accumulation in (1, 4):
        trainer = runs.trainer(accumulation=accumulation)
        for updates in (1, 3):
            steps = Counter()
            hooks = [
                optimiser.register_step_post_hook(
                    lambda *_, name=name, steps=steps: steps.update([name])
                )
                for name, optimiser in trainer.optimisers.items()
            ]
            samples = trainer.update_student()
            for index in range(updates if trainer.fake_score is not None else 0):
                trainer.update_fake_score(index, samples or None if index == 0 else None)
            expected = {name: 1 if name == "student" else updates for name in trainer.optimisers}
            assert steps == expected, (
                f"optimiser steps {dict(steps)}, not {expected}, at accumulation {accumulation}"
            )
            for hook in hooks:
                hook.remove()


@_check
def check_resume(runs: Runs) -> None:
    """A run stopped after any update and resumed ends in the bits of one that was not."""
    whole, parts = (runs.make(student_updates=3) for _ in range(2))
    train(whole)
    statuses = [train(parts, stop=lambda: True)["status"] for _ in range(3)]
    assert statuses == ["stopped", "stopped", "done"], f"stopping after each update gave {statuses}"
    _assert_same("a run stopped after each update", whole, parts, 0.0)


@_check
def check_guard(runs: Runs) -> None:
    """A term of either phase that is not finite stops the run, names itself, and leaves every weight as it was."""
    trainer = runs.trainer()
    method = trainer.method
    samples = trainer.update_student()
    phases = {"student": trainer.update_student}
    if trainer.fake_score is not None:
        phases["fake_score"] = lambda: trainer.update_fake_score(0, samples or None)
    for role, update in phases.items():
        before = [p.detach().clone() for net in trainer.roles.values() for p in net.parameters()]
        trainer.method = poisoned = _Poisoned(method, f"{role}_loss")
        try:
            update()
        except Collapsed as error:
            said = f"the reason {str(error)!r} does not name the term {poisoned.term!r}"
            assert poisoned.term in str(error), said
        else:
            raise AssertionError(f"a term of {role}_loss that is NaN was not noticed")
        after = [p for net in trainer.roles.values() for p in net.parameters()]
        same = all(torch.equal(p, q) for p, q in zip(after, before, strict=True))
        assert same, f"a term of {role}_loss that is NaN moved weights"
        for p in after:
            p.grad = None


class _Poisoned:
    """A method of which one loss has a NaN for its first term."""

    def __init__(self, method: Method, loss: str) -> None:
        self.method, self.loss, self.term = method, loss, ""

    def __getattr__(self, name: str) -> Any:
        given = getattr(self.method, name)
        if name != self.loss:
            return given

        def poisoned(*arguments: Any) -> Loss:
            loss = given(*arguments)
            self.term = next(iter(loss.terms))
            return dataclasses.replace(
                loss, terms={**loss.terms, self.term: loss.terms[self.term] * float("nan")}
            )

        return poisoned


@_check
def check_presets(runs: Runs) -> None:
    """Every preset resolves, to a run that says all of it and survives its own YAML."""
    for preset in find_method(runs.method["name"]).presets:
        try:
            config = resolve({"method": {"name": runs.method["name"], "preset": preset}})
        except MissingPackage:
            continue  # said at the border, to whoever asks for it
        assert "preset" not in config.method
        assert resolve(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config, (
            f"preset {preset}"
        )


CHECKS = (
    check_presets,
    check_losses,
    check_routing,
    check_detachment,
    check_cost,
    check_shared_graph,
    check_optimiser_steps,
    check_resume,
    check_guard,
)


def check_two_ranks(
    *methods: str | type[Method] | Mapping[str, Any],
    folder: Path,
    fields: Mapping[str, Any] = {},
    tolerance: float = 1e-7,
    timeout: float | None = None,
) -> None:  # noqa: B006 - never changed
    """Two processes end where one does with their batches together, in float64; with `fields` of a run, for instance sharded.

    Args:
        tolerance: how far a weight may be off after two updates, by default a thousandth of a step (Adam moves a weight by about
            its learning rate, 1e-4, whatever the size of its gradient). Networks compute their norms in float32 whatever the
            precision, and Adam turns the rounding of a tiny gradient into 1e-9 of weight; one that a rank changes moves by steps.
        timeout: seconds for each of the two launches; None: 600 and 60 a method, for machines that do other things.

    Raises:
        AssertionError: naming the method that did not train, or which weight is off.
    """
    pairs: dict[str, tuple[Path, Path]] = {}
    for at, method in enumerate(methods):
        runs = Runs(method, folder, f"ranks-{at}")
        given = {
            "student_updates": 2,
            "precision": "float64",
            "exit_step": "last",
            "signals_every": None,
        } | fields
        with _named(runs.name, "check_two_ranks"):
            pairs[runs.name] = (runs.make(**given), runs.make(**given))
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    for which, command in enumerate(([*launch, "-m", __name__], [sys.executable, "-m", __name__])):
        _train_all(
            {name: pair[which] for name, pair in pairs.items()},
            command,
            timeout or 600 + 60 * len(pairs),
        )
    for name, (two, one) in pairs.items():
        with _named(name, "check_two_ranks"):
            _assert_same("two ranks", one, two, tolerance)


def _train_all(runs: Mapping[str, Path], command: Sequence[str], timeout: float) -> None:
    """Train run folders by the name of their method in other processes: AssertionError where one is not trained."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        [*command, *map(str, runs.values())], env=environment, **streams
    ) as process:
        why = ""
        try:
            _, said = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # the launcher ends its processes, which a kill would leave
            _, said = process.communicate()
            why = f"not done after {timeout:g} s"
    left = [name for name, run in runs.items() if not (run / "train.json").is_file()]
    if why or process.returncode:
        errors = [line for line in said.splitlines() if "Error" in line]
        why = why or f"training failed: {' | '.join(errors) or said[-2000:]}"
        raise AssertionError(f"{left[0] if left else ', '.join(runs)}: check_two_ranks: {why}")


def _assert_same(what: str, one: Path, other: Path, tolerance: float) -> None:
    for run in (one, other):
        assert read_json(run / "train.json")["status"] == "done", read_json(run / "train.json")[
            "reason"
        ]
    a, b = (load_file(checkpoint.found(run)[-1] / "weights.safetensors") for run in (one, other))
    assert a.keys() == b.keys(), f"{what}: other tensors, {sorted(a.keys() ^ b.keys())}"
    errors = {
        key: float((a[key] - b[key]).abs().nan_to_num(nan=torch.inf).max())
        for key in a
        if a[key].numel()
    }
    worst = max(errors, key=errors.get)
    assert errors[worst] <= tolerance, f"{what}, {worst} is off by {errors[worst]:.3g}"


# --- what the tests run on ---


def tiny_pipeline(folder: Path) -> None:
    """Write a pipeline folder of Wan's own classes and configuration keys with random weights, for 5 frames of 16x16."""
    from diffusers import (
        AutoencoderKLWan,
        FlowMatchEulerDiscreteScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    words = ["<pad>", "<unk>", "a", "red", "blue", "circle", "square", "moving", "left", "right"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", model_max_length=8
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text_encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(words), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2
            )
        )
        vae = AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.1, -0.1, 0.2, 0.0],
            latents_std=[1.0, 2.0, 0.5, 1.5],
        )
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        )
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipeline.save_pretrained(folder)
    (folder / "prompts.txt").write_text("a red circle moving left\na blue square moving right\n")


def tiny_clips(folder: Path) -> None:
    """Write a folder of eight clips of noise, to stand for real data of `tiny_pipeline`."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(
        folder / "clips.npy",
        np.random.default_rng(0).integers(0, 256, (8, 5, 3, 16, 16), dtype=np.uint8),
    )
    (folder / "manifest.jsonl").write_text(
        "".join(f'{{"index": {i}, "prompt": "a red circle"}}\n' for i in range(8))
    )


def main(argv: list[str] | None = None) -> int:
    """Train each run folder given: what the processes of `check_two_ranks` do."""
    torch.set_num_threads(1)
    # the end of a training destroys the process group, and ranks that meet again at once may miss each other: one for all runs
    with mock.patch("torch.distributed.destroy_process_group"):
        for run in sys.argv[1:] if argv is None else argv:
            train(Path(run))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
