"""Conformance checks that update or train a run."""

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill_bench.config.resolve import load_run, method_of
from distill_bench.method import Loss, Method
from distill_bench.plan.cost import passes
from distill_bench.registry import find_method
from distill_bench.testing.ranks import assert_same
from distill_bench.testing.runs import Runs, conformance
from distill_bench.train.loop import finish, train
from distill_bench.train.phase import Collapsed
from distill_bench.train.records import Records
from distill_bench.train.run import Run
from distill_bench.train.setup import build, build_from


@conformance
def check_routing(runs: Runs) -> None:
    """Each phase updates only its own roles, and leaves no gradient on any role."""
    run = runs.build()
    nets = run.networks | {"teacher": run.nets.unguided_teacher.net}

    def moved(phase: str, update: Callable[[], Any]) -> set[str]:
        before = {role: _weights(net) for role, net in nets.items()}
        update()
        for role, net in nets.items():
            assert all(p.grad is None for p in net.parameters()), (
                f"{phase} phase leaves a gradient on {role}"
            )
        return {role for role, net in nets.items() if not _same(_weights(net), before[role])}

    roles = moved("the student's", run.update_student)
    assert roles == {"student"}, f"the student's phase moved {sorted(roles)}"
    if run.fake_score is not None:
        own = {"fake_score"}
        if list(run.networks["modules"].parameters()):
            own.add("modules")
        roles = moved("the fake score's", lambda: run.update_fake_score(0))
        assert roles == own, f"the fake score's phase moved {sorted(roles)}, not {sorted(own)}"


def _weights(*nets: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for net in nets for p in net.parameters()]


def _same(weights: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(weights, others, strict=True))


@conformance
def check_cost(runs: Runs) -> None:
    """The ledger of a trained run has the passes that `plan.cost` counts on stand-in networks."""
    run = runs.untrained
    run.student.only_trainable()
    makes_samples = run.method.student_loss(run.nets, run.batch("student")).x0 is not None
    cases: list[dict[str, Any]] = [
        {},
        {"reuse_rollout": makes_samples, "accumulation": 2},
        {"guidance_scale": 1.0, "fake_score_updates": 3, "fake_score_rollouts": "batched"},
    ]
    if find_method(runs.method["name"]).shares_graph:
        cases.append({"reuse_rollout": "graph", "accumulation": 2})
    for fields in cases:
        case = f"with {fields or 'the base'}"
        run_dir = runs.make(exit_step="last", **fields)
        summary = train(run_dir)
        assert summary["status"] == "done", f"{case}: {summary['reason']}"
        counted, expected = summary["cost"], passes(load_run(run_dir))
        for role in sorted({*counted, *expected}):
            ledger, rehearsed = counted.get(role, {}), expected.get(role, {})
            same = all(
                abs(ledger.get(kind, 0) - rehearsed.get(kind, 0)) < 1e-9
                for kind in {*ledger, *rehearsed}
            )
            assert same, f"{case}: rehearsed {rehearsed} of {role}, the ledger counted {ledger}"


@conformance
def check_optimiser_steps(runs: Runs) -> None:
    """Each update makes one step of each of its optimisers, at any accumulation."""
    for accumulation in (1, 4):
        run = runs.build(accumulation=accumulation)
        for updates in (1, 3):
            steps = Counter()
            hooks = [
                optimiser.register_step_post_hook(
                    lambda *_, name=name, steps=steps: steps.update([name])
                )
                for name, optimiser in run.optimisers.items()
            ]
            run.update_student()
            for index in range(updates if run.fake_score is not None else 0):
                run.update_fake_score(index)
            expected = {name: 1 if name == "student" else updates for name in run.optimisers}
            assert steps == expected, (
                f"optimiser steps {dict(steps)}, not {expected}, at accumulation {accumulation}"
            )
            for hook in hooks:
                hook.remove()


@conformance
def check_resume(runs: Runs) -> None:
    """A run stopped and resumed after every update has the bits of an uninterrupted run."""
    whole, parts = runs.make(student_updates=3), runs.make(student_updates=3)
    _check_buffers(whole)
    statuses = [train(parts, stop=lambda: True)["status"] for _ in range(3)]
    assert statuses == ["stopped", "stopped", "done"], f"stopping after each update gave {statuses}"
    lost = "a run stopped after each update (state belongs into buffers, not into attributes)"
    assert_same(lost, whole, parts, 0.0)


def _check_buffers(run_dir: Path) -> None:
    """Train a run, and assert that its checkpoint has the buffers that it ended with."""
    trained = build_from(run_dir)
    finish(trained, Records(trained, run_dir))
    resumed = build_from(run_dir)
    Records(resumed, run_dir).resume()
    for role, net in trained.networks.items():
        restored = dict(resumed.networks[role].named_buffers())
        for name, buffer in net.named_buffers():
            assert torch.equal(buffer, restored[name]), (
                f"the buffer {name} of {role} is lost when a run is resumed; register it with "
                "persistent=True"
            )


@conformance
def check_hook(runs: Runs) -> None:
    """The hook after a student update averages weights of roles iff `mixes_weights` says so."""
    run = runs.build()
    roles = {role: net for role, net in run.trained.items() if role != "modules"}
    plain = _after_hook(run)
    mixed = [
        f"{role} with {other}"
        for other in roles
        for role, weights in _after_hook(run, changed=other).items()
        if role in roles and role != other and not _same(weights, plain[role])
    ]
    declared = run.method.mixes_weights
    assert declared or not mixed, (
        f"after_student_update mixes the weights of {' and of '.join(mixed)}; set mixes_weights, "
        "which keeps the method from low-rank adapters"
    )
    assert mixed or not declared, (
        "mixes_weights is set, but after_student_update mixes no weights; leave it out"
    )


@torch.no_grad()
def _after_hook(run: Run, changed: str | None = None) -> dict[str, list[Tensor]]:
    """Weights of copies of the roles after the hook; those of one role are changed before it."""
    networks = {role: copy.deepcopy(net) for role, net in run.trained.items()}
    if changed is not None:
        for parameter in networks[changed].parameters():
            parameter.add_(torch.linspace(0.1, 0.2, parameter.numel()).reshape(parameter.shape))
    method_of(run.config).after_student_update(networks)  # a new method, without earlier state
    return {role: _weights(net) for role, net in networks.items()}


@conformance
def check_guard(runs: Runs) -> None:
    """A NaN term of either phase stops the run with an error that names it; no weight changes."""
    updates = {"student_loss": Run.update_student}
    if runs.untrained.fake_score is not None:
        updates["fake_score_loss"] = lambda run: run.update_fake_score(0)
    for loss, update in updates.items():
        run_dir = runs.make()
        config = load_run(run_dir)
        method = Poisoned(method_of(config), loss)
        run = build(config, run_dir.parent, method=method)
        before = _weights(*run.networks.values())
        try:
            update(run)
        except Collapsed as error:
            message = f"the reason {str(error)!r} does not name the term {method.term!r}"
            assert method.term in str(error), message
        else:
            raise AssertionError(f"a NaN term of {loss} did not stop the run")
        after = _weights(*run.networks.values())
        assert _same(after, before), f"a NaN term of {loss} changed weights"


class Poisoned:
    """Wrapper of a method that makes the first term of one loss NaN."""

    def __init__(self, method: Method, loss: str) -> None:
        self.method = method
        self.loss = loss
        self.term = ""

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.method, name)
        if name != self.loss:
            return attribute

        def poisoned(*arguments: Any) -> Loss:
            loss = attribute(*arguments)
            self.term = next(iter(loss.terms))
            terms = {**loss.terms, self.term: loss.terms[self.term] * float("nan")}
            return dataclasses.replace(loss, terms=terms)

        return poisoned
