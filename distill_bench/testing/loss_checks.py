"""Conformance checks that inspect a method's losses and their graphs, without training."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distill_bench.draws import Draws
from distill_bench.method import Batch, Loss, Nets
from distill_bench.networks.denoiser import Guided
from distill_bench.registry import find_method
from distill_bench.testing.runs import Runs, conformance
from distill_bench.train.run import Run


@conformance
def check_losses(runs: Runs) -> None:
    """Terms of both phases are finite scalars with a gradient, the student's through `Loss.x0`.

    Terms on a separate prediction of the student (a regression) need not depend on `Loss.x0`.
    """
    run = runs.untrained
    rollouts: list[Tensor] = []

    def rollout(batch: Batch) -> Tensor:
        rollouts.append(run.nets.rollout(batch))
        return rollouts[-1]

    run.student.only_trainable()
    batch = run.batch("student")
    loss = run.method.student_loss(dataclasses.replace(run.nets, rollout=rollout), batch)
    _check_terms("the student's", loss)
    if loss.x0 is None:
        assert not rollouts, (
            "the student's phase makes a rollout, but Loss.x0 is None; set it to the samples"
        )
    else:
        expected = (len(batch.text), *batch.latent_shape)
        assert loss.x0.shape == expected, (
            f"Loss.x0 is {tuple(loss.x0.shape)}, not samples of {expected}"
        )
        # samples that no term uses only train the fake score, and need no gradient
        for_fake_score = rollouts and not _reaches(loss.total, rollouts)
        assert _reaches(loss.total, [loss.x0]) or for_fake_score, (
            "no term has a gradient at Loss.x0; set it to the samples that the terms are computed "
            "from, without detaching them"
        )
    if run.fake_score is not None:
        _check_terms("the fake score's", fake_score_loss(run, run.nets))


def _check_terms(phase: str, loss: Loss) -> None:
    assert isinstance(loss, Loss), f"{phase} loss is a {type(loss).__name__}, not a Loss"
    assert loss.terms, f"{phase} loss has no terms"
    for name, term in loss.terms.items():
        scalar = isinstance(term, Tensor) and term.ndim == 0
        kind = getattr(term, "shape", type(term).__name__)
        assert scalar, f"{phase} loss: term {name!r} is not a scalar but {kind}"
        assert term.isfinite(), f"{phase} loss: term {name!r} is {term.item()}"
    assert loss.total.requires_grad, (
        f"{phase} loss has no gradient: no term of {list(loss.terms)} has a graph"
    )


def fake_score_loss(run: Run, nets: Nets) -> Loss:
    """The fake score's loss on a rollout, with only its phase trainable."""
    run.fake_score.only_trainable()
    batch = run.batch("fake_score/0")
    with torch.no_grad():
        x0 = run.nets.rollout(batch)
    return run.method.fake_score_loss(nets, batch, x0)


def _reaches(value: Tensor, tensors: Sequence[Tensor]) -> bool:
    """True if a backward from `value` passes one of the tensors."""
    tensors = [x for x in tensors if x.requires_grad]
    if not tensors:
        return False
    gradients = torch.autograd.grad(value, tensors, retain_graph=True, allow_unused=True)
    return any(gradient is not None for gradient in gradients)


@conformance
def check_detachment(runs: Runs) -> None:
    """Gradients pass through the inputs of `differentiated_roles` only, and reach no frozen weight.

    The check finds a prediction that is left attached by mistake, such as the x0_teacher of a
    normaliser. It cannot find mistakes outside networks, such as an attached x0 in a normaliser;
    for these, compare `student_gradient` with the formula.
    """
    run = runs.untrained
    run.student.only_trainable()
    watched = {
        role: Watched(network)
        for role in ("fake_score", "teacher", "unguided_teacher")
        if (network := getattr(run.nets, role)) is not None
    }
    nets = dataclasses.replace(run.nets, **watched)
    loss = run.method.student_loss(nets, run.batch("student"))
    _check_frozen(run, "the student's", loss, ("fake_score", "modules", "teacher"))
    for role, network in watched.items():
        reached = _reaches(loss.total, network.predictions)
        declared = role in run.method.differentiated_roles
        assert declared or not reached, (
            f"the student's loss reaches the input of {role}, which differentiated_roles lacks: "
            "detach normalisers and targets computed from the prediction, or add the role"
        )
        assert reached or not declared, (
            f"differentiated_roles has {role}, whose input the student's loss does not reach: "
            "remove the role, or use its prediction without detaching it"
        )
    if run.fake_score is not None:
        student = Watched(run.nets.student)
        loss = fake_score_loss(run, dataclasses.replace(run.nets, student=student))
        _check_frozen(run, "the fake score's", loss, ("student", "teacher"))
        assert not student.predictions, (
            "the fake score's loss runs the student; use the given samples x0"
        )


def _check_frozen(run: Run, phase: str, loss: Loss, frozen: Iterable[str]) -> None:
    """Assert that the loss has no graph to the weights of frozen roles."""
    nets = run.networks | {"teacher": run.nets.unguided_teacher.net}
    leaves = _leaves(loss.total)
    for role in frozen:
        weights = {id(p) for p in nets[role].parameters()} if role in nets else set()
        assert not weights & leaves, f"{phase} loss has a graph to weights of {role}"


class Watched:
    """A role that records its inputs and its predictions, velocities and features."""

    def __init__(self, role: Any) -> None:
        self.role = role
        self.inputs: list[tuple[Any, ...]] = []  # x_t, sigma, text, and of features the depth
        self.predictions: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.role, name)

    def __call__(self, *inputs: Any) -> Tensor:
        return self._record(self.role, *inputs)

    def velocity(self, *inputs: Any) -> Tensor:
        return self._record(self.role.velocity, *inputs)

    def features(self, *inputs: Any) -> Tensor:
        return self._record(self.role.features, *inputs)

    def sees_other(self, index: int, x_t: Tensor) -> bool:
        """True if the evaluation of this index saw something else than x_t."""
        return not torch.equal(self.inputs[index][0], x_t)

    def _record(self, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        x_t, sigma, *others = inputs
        self.inputs.append((x_t.detach(), sigma.detach(), *others))
        self.predictions.append(function(*inputs))
        return self.predictions[-1]


def watched(nets: Nets) -> dict[str, Watched]:
    """The roles of `nets`, each in a `Watched`."""
    roles = ("student", "fake_score", "teacher", "unguided_teacher", "target")
    return {role: Watched(net) for role in roles if (net := getattr(nets, role)) is not None}


def _leaves(value: Tensor) -> set[int]:
    """Ids of the leaf tensors that a backward from `value` would reach."""
    leaves: set[int] = set()
    seen: set[Any] = set()
    to_visit = [value.grad_fn]
    while to_visit:
        node = to_visit.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        to_visit += [parent for parent, _ in node.next_functions]
    return leaves


@conformance
def check_shared_graph(runs: Runs) -> None:
    """With a graph shared by both phases, each phase is trained by its own terms only."""
    if not find_method(runs.method["name"]).shares_graph:
        return
    fields = {"accumulation": 2, "grad_clip": 1e6}
    sharing = runs.build(**fields, reuse_rollout="graph")
    apart = runs.build(**fields, reuse_rollout=True)
    fake_score = sharing.networks["fake_score"]
    weights = list(fake_score.parameters())
    expected = _gradients_of_own_terms(sharing, weights)
    kept = sharing.update_student()
    apart.update_student()
    students = (run.networks["student"].parameters() for run in (sharing, apart))
    for p, q in zip(*students, strict=True):
        assert torch.equal(p, q), "a shared graph gives the student other weights"
    gradients: list[Tensor | None] = []
    sharing.optimisers["fake_score"].register_step_pre_hook(
        lambda *_: gradients.extend(p.grad for p in weights)
    )
    sharing.update_fake_score(0, kept)
    for weight, gradient, own in zip(weights, gradients, expected, strict=True):
        same = (
            gradient is None if own is None else torch.allclose(gradient, own, rtol=1e-4, atol=1e-7)
        )
        assert same, (
            f"with a shared graph, the fake score's gradient of shape {tuple(weight.shape)} "
            "is not that of its own terms"
        )


def _gradients_of_own_terms(run: Run, weights: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Gradients of the fake-score terms in the student's losses at the fake score's weights."""
    run.fake_score.only_trainable()
    accumulation = run.config.accumulation
    losses = [
        run.method.student_loss(run.nets, run.batch("student", micro))
        for micro in range(accumulation)
    ]
    total = sum(sum(loss.fake_score_terms.values()) for loss in losses) / accumulation
    return torch.autograd.grad(total, weights, allow_unused=True)


@conformance
def check_inputs(runs: Runs) -> None:
    """Roles get the texts of what they see, the fake score the run's levels, the loss its guidance.

    - A role that sees samples gets their prompts; one that sees extra data gets the data's texts.
      The null text may come besides, for guidance of the method's own, but not alone.
    - Every level of the fake score rises with score_shift and lies within the run's bounds.
    - If the teacher predicts in the student's phase, the loss depends on guidance_scale.
    """
    run = runs.untrained
    student = _Phase(run, "student")
    for phase in (student, _Phase(run, "fake_score/0")) if run.fake_score else (student,):
        _check_texts(phase)
        _check_levels(phase)
    _check_guidance(student)


class _Phase:
    """The loss of one phase on a fixed batch, whose samples and extra data have random texts."""

    def __init__(self, run: Run, name: str) -> None:
        self.run = run
        self.name = name
        self.batch = run.batch(name)
        draw = torch.Generator().manual_seed(0)
        self.texts = {
            what: torch.randn(self.batch.text.shape, generator=draw).to(self.batch.text)
            for what in ("samples", "extra data")
        }

    def loss(
        self, nets: Nets | None = None, scaled: str = "", **levels: float
    ) -> tuple[Loss, dict[str, Watched]]:
        """The loss and the watched roles.

        Args:
            nets: in place of the run's.
            scaled: "samples" or "extra data", which are multiplied by 1.5.
            levels: fields of the batch.
        """
        nets = nets or self.run.nets
        make_samples = nets.rollout
        roles = watched(nets)

        def rollout(batch: Batch) -> Tensor:
            x0 = make_samples(batch)
            return 1.5 * x0 if scaled == "samples" else x0

        def data(draws: Draws, rows: Callable[[Draws], dict[str, Tensor]]) -> dict[str, Tensor]:
            scale = 1.5 if scaled == "extra data" else 1.0
            own = {name: scale * value for name, value in rows(draws).items()}
            return own | {"text": self.texts["extra data"]}

        nets = dataclasses.replace(nets, **roles, rollout=rollout)
        extras = {need: partial(data, rows=rows) for need, rows in self.batch.extras.items()}
        given = levels | {"text": self.texts["samples"], "extras": extras}
        batch = dataclasses.replace(self.batch, **given)
        if self.name == "student":
            self.run.student.only_trainable()
            return self.run.method.student_loss(nets, batch), roles
        self.run.fake_score.only_trainable()
        with torch.no_grad():
            x0 = rollout(batch)
        return self.run.method.fake_score_loss(nets, batch, x0), roles

    def owners(self, text: Tensor) -> set[str]:
        """Owners of a text's rows: keys of `texts`, or "nothing" for the null text.

        A text of several times the batch's length repeats its samples in order.
        """
        texts = self.texts | {"nothing": self.run.nets.null_text.expand_as(self.batch.text)}
        size = len(self.batch.text)
        return {
            next((what for what, own in texts.items() if torch.equal(row, own[i % size])), "others")
            for i, row in enumerate(text)
        }


def _check_texts(phase: _Phase) -> None:
    _, roles = phase.loss()
    changed = {what: phase.loss(scaled=what)[1] for what in phase.texts}
    for name, role in roles.items():
        given: dict[tuple[str, ...], set[str]] = {}  # what the role sees -> owners of its texts
        for i, (x_t, _, text, *_) in enumerate(role.inputs):
            seen = tuple(w for w, others in changed.items() if others[name].sees_other(i, x_t))
            owners = phase.owners(text)
            wrong = owners - {"nothing", *(seen or phase.texts)}
            assert not wrong, (
                f"in the phase {phase.name}, {name} sees {' and '.join(seen) or 'noise'} with the "
                f"texts of {' and '.join(sorted(wrong))}"
            )
            given.setdefault(seen, set()).update(owners)
        for seen, owners in given.items():
            assert owners != {"nothing"}, (
                f"in the phase {phase.name}, {name} sees {' and '.join(seen) or 'noise'} with the "
                "null text alone"
            )


def _check_levels(phase: _Phase) -> None:
    wide, narrow = {"sigma_min": 1e-3, "sigma_max": 0.999}, {"sigma_min": 0.45, "sigma_max": 0.55}
    fields = [wide | {"score_shift": 0.5}, wide | {"score_shift": 2.0}, narrow]
    all_roles = [phase.loss(**levels)[1] for levels in fields]
    inputs = [roles["fake_score"].inputs if "fake_score" in roles else [] for roles in all_roles]
    for (_, low, *_), (_, high, *_), (_, bounded, *_) in zip(*inputs, strict=True):
        assert (low < high).all(), (
            f"in the phase {phase.name}, noise levels of the fake score do not rise with "
            "score_shift; draw them by Batch.sigma"
        )
        assert (abs(bounded - 0.5) < 0.0501).all(), (
            f"in the phase {phase.name}, noise levels of the fake score are not between sigma_min "
            "and sigma_max; draw them by Batch.sigma"
        )


def _check_guidance(student: _Phase) -> None:
    nets, totals = student.run.nets, []
    for scale in (2.0, 4.0):
        teacher = Guided(nets.unguided_teacher, nets.null_text, scale)
        loss, roles = student.loss(dataclasses.replace(nets, teacher=teacher, guidance_scale=scale))
        totals.append(loss.total.detach())
    predicts = any(
        prediction.shape == x_t.shape
        for role in ("teacher", "unguided_teacher")
        for prediction, (x_t, *_) in zip(roles[role].predictions, roles[role].inputs, strict=True)
    )
    assert not predicts or not torch.equal(*totals), (
        "the teacher predicts in the student's phase, but the loss does not depend on "
        "guidance_scale: use nets.teacher, or guide by nets.guidance_scale"
    )
