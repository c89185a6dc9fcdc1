"""Conformance check that every hyper-parameter of a method has an effect, and the stated one."""

import dataclasses
import importlib.util
import itertools
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from distill_bench.config.errors import ConfigError
from distill_bench.config.resolve import build_method
from distill_bench.draws import Draws
from distill_bench.method import Loss, Method, Scales
from distill_bench.testing.runs import Runs, conformance
from distill_bench.train.run import Run

# Values of an effect that differ by rounding count as equal.
ROUNDING = 1e-9

Effects = Mapping[str, Tensor]  # name of a term, rate or hook -> its value and gradients


@conformance
def check_hyperparameters(runs: Runs) -> None:
    """Each field changes a term, a gradient, a learning rate or the hook of the method.

    A field may matter only beside others (R1's perturbation only with its weight above 0), so the
    method is tried with its own fields, with those of each preset, and with one other field of each
    of these changed. Other values of a field come from its type, its presets and the examples in
    `Annotated[..., Field(examples=[...])]`. A field marked by `Scales` must be the weight of its
    terms.
    """
    study = _Study(runs.build(precision="float64"))
    method = study.run.method
    for field in dataclasses.fields(method):
        others = list(_others(method, field.name))
        assert others, (
            f"no other value of the field {field.name} is known; name some in its type: "
            "Annotated[..., Field(examples=[...])]"
        )
        installed = [other for other in others if _installed(other)]
        if not installed:
            continue
        assert any(
            study.differ(base, other)
            for base in study.bases(field.name)
            for other in _others(base, field.name)
            if _installed(other)
        ), (
            f"the field {field.name} changes no loss, gradient, learning rate or hook, with "
            "the method's own fields or those of a preset; use it, or remove it"
        )
        for mark in _metadata(method, field.name):
            if isinstance(mark, Scales):
                _check_weight(study, field.name, mark.terms)


def _check_weight(study: "_Study", field: str, terms: tuple[str, ...]) -> None:
    """Assert that doubling a field doubles its terms, and changes no other of their phases."""
    for base in study.bases(field):
        once = _changed(base, field, getattr(base, field) or 1.0)
        twice = once and _changed(once, field, 2 * getattr(once, field))
        if not twice or not {term for _, _, term in map(_parts, study.effects(once))} >= {*terms}:
            continue
        before, after = study.effects(once), study.effects(twice)
        assert before.keys() == after.keys(), f"doubling {field} adds or removes terms"
        phases = {_parts(name)[0] for name in before if _parts(name)[2] in terms}
        for name, value in before.items():
            if _parts(name)[0] not in phases:
                continue
            factor = 2.0 if _parts(name)[2] in terms else 1.0
            assert _close(after[name], factor * value), (
                f"{field} scales {', '.join(terms)}, but doubling it does not multiply "
                f"{name} by {factor:g}"
            )
        return
    raise AssertionError(f"{field} scales {', '.join(terms)}, but no loss has all of these terms")


def _parts(name: str) -> tuple[str, str, str]:
    return name.partition("/")


class _Study:
    """Effects of a method with given fields, on one batch of one run, in float64."""

    def __init__(self, run: Run) -> None:
        self.run = run
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():  # roles start equal, which would hide differences between them
            for net in (run.networks["student"], run.networks.get("fake_score")):
                for p in net.parameters() if net is not None else ():
                    p.add_(0.05 * torch.randn(p.shape, generator=draw, dtype=p.dtype).to(p.device))
        x = run.batch("student").noise("testing/width")[:1]
        tokens = run.nets.unguided_teacher.features(
            x, x.new_full((1,), 0.5), run.nets.null_text, 0.0
        )
        self.width = tokens.shape[-1]
        self.known: dict[str, tuple[Effects, set[str]]] = {}

    def bases(self, field: str) -> Iterator[Method]:
        """Methods that read the field: the run's, those of presets, and each with one change."""
        method = self.run.method
        own = [method, *_of_presets(method)]
        changed = (
            other
            for base in own
            for name in (f.name for f in dataclasses.fields(method) if f.name != field)
            for other in itertools.islice(_others(base, name), 2)
        )
        for base in (*own, *changed):
            if _installed(base) and field in self._measured(base)[1]:
                yield base

    def differ(self, first: Method, second: Method) -> bool:
        """True if two methods have different effects."""
        effects, others = self.effects(first), self.effects(second)
        return effects.keys() != others.keys() or any(
            not _close(value, others[name]) for name, value in effects.items()
        )

    def effects(self, method: Method) -> Effects:
        return self._measured(method)[0]

    def _measured(self, method: Method) -> tuple[Effects, set[str]]:
        """The effects of a method, and the names of the fields that it reads."""
        key = repr(method)
        if key not in self.known:
            read: set[str] = set()
            self.known[key] = self._measure(_traced(method, read)), read
        return self.known[key]

    def _measure(self, method: Method) -> Effects:
        run = self.run
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            modules = torch.nn.ModuleDict(method.modules(self.width))
        modules = modules.to(run.nets.null_text.device, run.nets.null_text.dtype)
        nets = dataclasses.replace(run.nets, modules=modules)
        effects = {f"rate/{k}": torch.tensor(v) for k, v in method.learning_rates().items()}

        def batch(phase: str) -> Any:
            batch = run.batch(phase)

            def data(draws: Draws) -> dict[str, Tensor]:
                x0, noise = (draws.noise(f"data/{k}", batch.latent_shape) for k in ("x0", "noise"))
                return {"x0": x0, "noise": noise, "text": batch.text}

            extras = dict.fromkeys(("real_latents", "ode_pairs"), data)
            return dataclasses.replace(batch, extras={**batch.extras, **extras})

        run.student.only_trainable()
        modules.requires_grad_(False)
        student = list(run.networks["student"].parameters())
        loss = method.student_loss(nets, batch("student"))
        effects |= _terms("student", loss, student)
        effects |= {f"shared/{k}": v.detach() for k, v in loss.fake_score_terms.items()}
        if run.fake_score is not None:
            run.fake_score.only_trainable()
            modules.requires_grad_(True)
            trained = [*run.networks["fake_score"].parameters(), *modules.parameters()]
            given = batch("fake_score/0")
            with torch.no_grad():
                x0 = nets.rollout(given)
            effects |= _terms("fake_score", method.fake_score_loss(nets, given, x0), trained)
        return effects | self._hook(method, {**run.networks, "modules": modules})

    def _hook(self, method: Method, networks: Mapping[str, torch.nn.Module]) -> Effects:
        """Weights of the roles after the method's hook, which is undone."""
        parameters = [p for net in networks.values() for p in net.parameters()]
        before = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            method.after_student_update(networks)
            moves = {
                f"hook/{index}": p - first
                for index, (p, first) in enumerate(zip(parameters, before, strict=True))
                if not torch.equal(p, first)
            }
            for p, first in zip(parameters, before, strict=True):
                p.copy_(first)
        return moves


def _terms(phase: str, loss: Loss, trained: list[Tensor]) -> dict[str, Tensor]:
    """Value of each term, followed by its gradient at the trained weights."""
    effects = {}
    for name, term in loss.terms.items():
        gradients: tuple[Tensor | None, ...] = (None,) * len(trained)
        if term.requires_grad:
            gradients = torch.autograd.grad(term, trained, retain_graph=True, allow_unused=True)
        parts = [term.detach(), *(g for g in gradients if g is not None)]
        effects[f"{phase}/{name}"] = torch.cat([part.flatten() for part in parts])
    return effects


def _close(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape:
        return False
    scale = max(float(first.abs().max()), float(second.abs().max())) if first.numel() else 0.0
    return bool(((first - second).abs() <= ROUNDING * scale).all())


def _traced(method: Method, read: set[str]) -> Method:
    """A copy of a method that notes the names of the fields that are read."""
    fields = {field.name for field in dataclasses.fields(method)}

    def getattribute(self: Any, name: str) -> Any:
        if name in fields:
            read.add(name)
        return object.__getattribute__(self, name)

    kind = type(method)
    traced = object.__new__(type(kind.__name__, (kind,), {"__getattribute__": getattribute}))
    traced.__dict__.update(method.__dict__)
    return traced


# ---- other values of a field


def _others(method: Method, field: str) -> Iterator[Method]:
    """The method with each other value of a field that its type, and the method, allow."""
    value, seen = getattr(method, field), []
    for candidate in (*_stated(method, field), *_near(value)):
        if candidate != value and candidate not in seen:
            seen.append(candidate)
            changed = _changed(method, field, candidate)
            if changed is not None:
                yield changed


def _stated(method: Method, field: str) -> Iterator[Any]:
    """Values of a field in its type, the examples of its type, and the method's presets."""
    yield from _options(get_type_hints(type(method), include_extras=True)[field])
    for mark in _metadata(method, field):
        yield from getattr(mark, "examples", None) or ()
    for preset in method.presets.values():
        if f"method.{field}" in preset.overrides:
            yield preset.overrides[f"method.{field}"]


def _options(hint: Any) -> Iterator[Any]:
    if get_origin(hint) is Literal:
        yield from get_args(hint)
    elif hint is bool:
        yield from (True, False)
    elif get_origin(hint) is not None:
        for part in get_args(hint)[: 1 if get_origin(hint) is Annotated else None]:
            yield from _options(part)


def _near(value: Any) -> Iterator[Any]:
    """Numbers around a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        yield from (0.01, 2) if value is None else ()
        return
    if isinstance(value, int):
        yield from (2 * value, value // 2, 1, value + 1, 10 * value)
    else:
        yield from (2 * value, value / 2, 1.0, 0.5, 10 * value, value / 10, 100 * value)


def _metadata(method: Method, field: str) -> tuple[Any, ...]:
    hint = get_type_hints(type(method), include_extras=True)[field]
    return getattr(hint, "__metadata__", ())


def _of_presets(method: Method) -> Iterator[Method]:
    for preset in method.presets.values():
        fields = {
            key.removeprefix("method."): value
            for key, value in preset.overrides.items()
            if key.startswith("method.")
        }
        yield build_method(type(method), dataclasses.asdict(method) | fields)


def _changed(method: Method, field: str, value: Any) -> Method | None:
    """The method with another value of a field; None if the value is not allowed."""
    try:
        return build_method(type(method), dataclasses.asdict(method) | {field: value})
    except ConfigError:
        return None


def _installed(method: Method) -> bool:
    return all(importlib.util.find_spec(package) for package in method.packages)
