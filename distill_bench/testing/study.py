"""Effects of a method's fields: its losses, hook and rates with other values of a field."""

import dataclasses
import importlib.util
import itertools
from collections.abc import Iterable, Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from torch.nn.utils import vector_to_parameters

from distill_bench.config.errors import ConfigError
from distill_bench.config.resolve import build_method
from distill_bench.draws import Draws
from distill_bench.method import Loss, Method
from distill_bench.testing.loss_checks import Watched, watched
from distill_bench.train.run import Run

# Values of an effect that differ by rounding count as equal.
ROUNDING = 1e-9

Effects = Mapping[str, Tensor]  # name of a term, rate or hook -> its value and gradients


@dataclasses.dataclass(frozen=True)
class UpdateEffects:
    """One student update of a method on a fixed batch."""

    effects: Effects
    quantities: Mapping[str, float]  # by the names of `distill_bench.fields`
    read: set[str]  # names of the fields that were read


class FieldStudy:
    """Effects of a method with given fields, on one batch of one run, in float64."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.own = [run.method, *_of_presets(run.method)]
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
        self.known: dict[str, UpdateEffects] = {}

    def bases(self, field: str) -> Iterator[Method]:
        """Methods that read the field: the run's, those of presets, and each with one change."""
        changed = (
            other
            for base in self.own
            for name in (f.name for f in dataclasses.fields(base) if f.name != field)
            for other in itertools.islice(variants(base, name), 2)
        )
        for base in (*self.own, *changed):
            if is_installed(base) and field in self.measured(base).read:
                yield base

    def differ(self, first: Method, second: Method) -> bool:
        """True if two methods have different effects."""
        effects, others = self.measured(first).effects, self.measured(second).effects
        return effects.keys() != others.keys() or any(
            not is_close(value, others[name]) for name, value in effects.items()
        )

    def measured(self, method: Method) -> UpdateEffects:
        """Effects and quantities of a method, and the fields that it reads."""
        key = repr(method)
        if key not in self.known:
            read: set[str] = set()
            effects, quantities = self._measure(_traced(method, read))
            self.known[key] = UpdateEffects(effects, quantities, read)
        return self.known[key]

    def _measure(self, method: Method) -> tuple[Effects, dict[str, float]]:
        run = self.run
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            modules = torch.nn.ModuleDict(method.modules(self.width))
        modules = modules.to(run.nets.null_text.device, run.nets.null_text.dtype)
        buffers = _buffers(modules)
        roles = watched(run.nets)
        nets = dataclasses.replace(run.nets, modules=modules, **roles)
        effects = {
            f"rate/{k}": torch.tensor(v, dtype=torch.float64)
            for k, v in method.learning_rates().items()
        }

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
        quantities = dict.fromkeys((f"moves/{role}" for role in run.networks), 0.0)
        quantities |= _of_roles(roles) | _of_modules(modules, buffers)
        effects |= self._hook(method, {**run.networks, "modules": modules})
        return effects, quantities | _of_effects(effects)

    def _hook(self, method: Method, networks: Mapping[str, torch.nn.Module]) -> Effects:
        """Moves of the roles' weights by the method's hook, which is undone."""
        before = {role: _weights(net) for role, net in networks.items()}
        with torch.no_grad():
            method.after_student_update(networks)
            moves = {
                f"hook/{role}": move
                for role, net in networks.items()
                if (move := _weights(net) - before[role]).any()
            }
            for role, net in networks.items():
                vector_to_parameters(before[role], net.parameters())
        return moves


def _weights(net: torch.nn.Module) -> Tensor:
    return _vector(net.parameters())


def _vector(values: Iterable[Tensor]) -> Tensor:
    return torch.cat([torch.empty(0), *(value.detach().flatten() for value in values)])


def _of_roles(roles: Mapping[str, Watched]) -> dict[str, float]:
    """Mean noise level and number of the evaluations of each role, and mean depth of features."""
    quantities: dict[str, float] = {}
    for role, inputs in ((role, net.inputs) for role, net in roles.items() if net.inputs):
        quantities[f"level/{role}"] = float(torch.cat([sigma for _, sigma, *_ in inputs]).mean())
        quantities[f"evaluations/{role}"] = float(len(inputs))
    depths = [depth for net in roles.values() for _, _, _, *rest in net.inputs for depth in rest]
    return quantities | ({"depth": sum(depths) / len(depths)} if depths else {})


def _buffers(modules: torch.nn.ModuleDict) -> dict[str, Tensor]:
    """The buffers of each module that has some, as one vector."""
    values = {name: list(module.buffers()) for name, module in modules.items()}
    return {name: _vector(value) for name, value in values.items() if value}


def _of_modules(modules: torch.nn.ModuleDict, before: Mapping[str, Tensor]) -> dict[str, float]:
    quantities = {}
    for name, module in modules.items():
        values = [*module.parameters(), *module.buffers()]
        quantities[f"size/{name}"] = float(sum(value.numel() for value in values))
    for name, after in _buffers(modules).items():
        quantities[f"mean/{name}"] = float(after.mean())
        quantities[f"moves/{name}"] = float((after - before[name]).norm())
    return quantities


def _of_effects(effects: Effects) -> dict[str, float]:
    quantities = {}
    for name, value in effects.items():
        kind, _, rest = name.partition("/")
        if kind == "rate":
            quantities[name] = float(value)
        elif kind == "hook":
            quantities[f"moves/{rest}"] = float(value.norm())
        elif kind in ("student", "fake_score"):
            quantities[rest] = float(value[0])
            quantities[f"gradient/{rest}"] = float(value[1:].norm())
    return quantities


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


def is_close(first: Tensor, second: Tensor) -> bool:
    """True if two effects are equal up to rounding."""
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


def variants(method: Method, field: str) -> Iterator[Method]:
    """The method with each other value of a field that its type, and the method, allow."""
    value, seen = getattr(method, field), []
    for candidate in (*_stated(method, field), *_near(value)):
        if candidate != value and candidate not in seen:
            seen.append(candidate)
            changed = with_value(method, field, candidate)
            if changed is not None:
                yield changed


def _stated(method: Method, field: str) -> Iterator[Any]:
    """Values of a field in its type, the examples of its type, and the method's presets."""
    yield from _options(_hint(type(method), field))
    for mark in marks_of(type(method), field):
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
        yield from (2 * value, value / 2, 1.0, 100 * value, 0.5, 10 * value, value / 10)


def marks_of(method: type[Method], field: str) -> tuple[Any, ...]:
    """Annotations of a field's type."""
    return getattr(_hint(method, field), "__metadata__", ())


def is_number(method: type[Method], field: str) -> bool:
    """True if a field is a number by its type."""
    return bool({int, float} & {*_types(_hint(method, field))})


def _types(hint: Any) -> Iterator[Any]:
    """The types of which a field's value is one."""
    if get_origin(hint) is Annotated:
        yield from _types(get_args(hint)[0])
    elif get_origin(hint) in (Union, UnionType):
        for part in get_args(hint):
            yield from _types(part)
    else:
        yield hint


def _hint(method: type[Method], field: str) -> Any:
    return get_type_hints(method, include_extras=True)[field]


def _of_presets(method: Method) -> Iterator[Method]:
    for preset in method.presets.values():
        fields = {
            key.removeprefix("method."): value
            for key, value in preset.overrides.items()
            if key.startswith("method.")
        }
        yield build_method(type(method), dataclasses.asdict(method) | fields)


def with_value(method: Method, field: str, value: Any) -> Method | None:
    """The method with another value of a field; None if the value is not allowed."""
    try:
        return build_method(type(method), dataclasses.asdict(method) | {field: value})
    except ConfigError:
        return None


def is_installed(method: Method) -> bool:
    """True if the packages are installed that the method needs."""
    return all(importlib.util.find_spec(package) for package in method.packages)
