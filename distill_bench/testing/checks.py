"""Conformance tests for any method, and the gradient of its loss at x0: importable, so that a stranger's file is checked too.

    from distill_bench.testing import check_methods

    def test_my_method_conforms(tmp_path):
        check_methods("path/to/my_method.py:MyMethod", folder=tmp_path)

Everything runs the real trainer on a pipeline of Wan's own classes with random weights, on the CPU, in seconds.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from distill_bench.config.errors import MissingPackage
from distill_bench.config.resolve import load_run, resolve
from distill_bench.method import Batch, Loss, Method, Passes
from distill_bench.plan.cost import declared
from distill_bench.registry import find_method
from distill_bench.testing.ranks import assert_same, check_two_ranks
from distill_bench.testing.runs import Runs, conformance
from distill_bench.train.loop import train
from distill_bench.train.trainer import Collapsed


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


@conformance
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


@conformance
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


@conformance
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


@conformance
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


@conformance
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


@conformance
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


@conformance
def check_resume(runs: Runs) -> None:
    """A run stopped after any update and resumed ends in the bits of one that was not."""
    whole, parts = (runs.make(student_updates=3) for _ in range(2))
    train(whole)
    statuses = [train(parts, stop=lambda: True)["status"] for _ in range(3)]
    assert statuses == ["stopped", "stopped", "done"], f"stopping after each update gave {statuses}"
    assert_same("a run stopped after each update", whole, parts, 0.0)


@conformance
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


@conformance
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
