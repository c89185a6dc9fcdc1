"""Networks of a run by role: where they start, which are frozen, and what an adapter adds."""

from copy import deepcopy

import pytest
import torch
from network_variants import ADAPTER
from torch import nn

from distill_bench.config.schema import AdapterConfig
from distill_bench.networks.adapters import activate, add_adapter
from distill_bench.networks.denoiser import Denoiser, Guided
from distill_bench.networks.ledger import Ledger
from distill_bench.networks.pipeline import load_transformer
from distill_bench.train.setup import build_from


class Block(nn.Module):
    """A transformer's shape: named linear layers in blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_v = nn.Linear(3, 4), nn.Linear(3, 4)


def test_an_adapter_adds_alpha_over_rank_times_b_a_to_its_layers_alone():
    net = Block()
    plain, x = deepcopy(net), torch.randn(5, 3)
    view = add_adapter(net, "student", AdapterConfig(rank=2, alpha=6.0, targets=("to_q",)), seed=0)
    parameters = dict(view.named_parameters())
    assert parameters.keys() == {"to_q.lora_A.weight", "to_q.lora_B.weight"}
    a, b = parameters.values()
    activate(net, ["student"])
    torch.testing.assert_close(net.to_q(x), plain.to_q(x))  # B is zero at first
    with torch.no_grad():
        b.normal_()
    torch.testing.assert_close(net.to_q(x), plain.to_q(x) + 6 / 2 * (x @ a.T @ b.T))
    torch.testing.assert_close(net.to_v(x), plain.to_v(x))
    activate(net, [])
    torch.testing.assert_close(net.to_q(x), plain.to_q(x))
    assert [name for name, p in net.named_parameters() if p.requires_grad] == []


def test_adapters_start_from_their_seed_and_role():
    def first(name: str, seed: int) -> torch.Tensor:
        torch.seed()  # the global generator must not matter
        view = add_adapter(Block(), name, AdapterConfig(rank=2, targets=("to_q",)), seed)
        return next(iter(view.parameters())).detach()

    start = first("student", 0)
    assert torch.equal(start, first("student", 0))
    assert not torch.equal(start, first("student", 1))
    assert not torch.equal(start, first("fake_score", 0))


def test_each_view_of_a_shared_network_runs_its_own_adapter():
    net, x = nn.Sequential(nn.Linear(3, 3)), torch.randn(2, 3)
    plain = deepcopy(net)
    adapter = AdapterConfig(rank=1, alpha=1.0, targets=("0",))
    views = {name: add_adapter(net, name, adapter, 0) for name in ("student", "fake_score")}
    with torch.no_grad():
        for scale, view in enumerate(views.values(), start=1):
            for parameter in view.parameters():
                parameter.fill_(float(scale))
    for name, addition in (("student", 3.0), ("fake_score", 12.0), ("student", 3.0)):
        added = (views[name](x) - plain(x)).detach()
        expected = addition * x.mean(1, keepdim=True).expand(2, 3)
        torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapter", [None, ADAPTER])
def test_every_role_starts_as_the_teacher_and_only_two_are_trained(adapter, make_run, tiny_wan):
    run = build_from(make_run("run", adapter=adapter, method="sgmd"))
    batch = run.batch("student")
    inputs = batch.noise("x"), batch.sigma("s"), batch.text
    with torch.no_grad():
        expected = Denoiser(load_transformer(tiny_wan), "teacher", Ledger(1))(*inputs)
        for role in ("student", "fake_score", "target", "unguided_teacher"):
            torch.testing.assert_close(getattr(run.nets, role)(*inputs), expected)
        guided = Guided(run.nets.unguided_teacher, run.nets.null_text, run.config.guidance_scale)
        torch.testing.assert_close(run.nets.teacher(*inputs), guided(*inputs))
        assert not torch.allclose(run.nets.teacher(*inputs), expected)
    trained = {id(p) for net in run.networks.values() for p in net.parameters()}
    own = [{id(p) for p in run.networks[role].parameters()} for role in ("student", "fake_score")]
    assert not own[0] & own[1]
    assert trained == own[0] | own[1]
    for phase, index in ((run.student, 0), (run.fake_score, 1)):
        phase.only_trainable()
        teacher = run.nets.unguided_teacher.net
        networks = [*run.networks.values(), teacher]
        required = {id(p) for net in networks for p in net.parameters() if p.requires_grad}
        assert required == own[index]


def test_an_adapters_average_starts_at_the_student_and_its_draws_at_the_runs_seed(make_run):
    runs = [build_from(make_run(f"{seed}", adapter=ADAPTER, seed=seed)) for seed in (1, 2)]
    for run in runs:
        student = dict(run.networks["student"].named_parameters())
        assert student.keys() == run.average.weights.keys()
        for name, average in run.average.weights.items():
            assert torch.equal(average, student[name])
            assert average.data_ptr() != student[name].data_ptr()
    first, second = (next(iter(run.networks["student"].parameters())) for run in runs)
    assert not torch.equal(first, second)
