"""Settings that save memory: checkpointing, sequential guidance, offload; refused combinations."""

import weakref

import pytest
import torch
from network_variants import ON_FEATURES, SHARED_GRAPH, largest_difference
from runs import OLD_RUN, OLD_RUN_ID
from torch import nn

from distill_bench.config.errors import ConfigError
from distill_bench.config.identity import run_id
from distill_bench.config.resolve import resolve
from distill_bench.networks.denoiser import Denoiser
from distill_bench.networks.ledger import Ledger
from distill_bench.networks.offload import Streamed, place
from distill_bench.networks.pipeline import load_transformer
from distill_bench.networks.recompute import checkpointed
from distill_bench.train.loop import train
from distill_bench.train.setup import build_from


@pytest.mark.parametrize(
    "setting",
    [
        {"gradient_checkpointing": True},
        {"guidance_forwards": "sequential"},
        {"teacher_offload": True},
        {"sharding": True},
    ],
)
def test_settings_that_change_no_number_are_not_in_the_id(setting):
    """The expected id is older than these settings."""
    assert run_id(resolve({"method": "dmd2"} | setting).model_copy(update=OLD_RUN)) == OLD_RUN_ID


def test_settings_that_change_numbers_give_different_ids():
    settings = [
        {},
        {"adapter": {}},
        {"adapter": {"rank": 4}},
        {"precision": "bfloat16"},
        {"precision": "bfloat16", "weights": "bfloat16"},
        {"compile": True},
        {"compile": "network"},
    ]
    ids = {run_id(resolve({"method": "dmd2"} | setting)) for setting in settings}
    assert len(ids) == len(settings)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": "bfloat16"}, "weights 'bfloat16' needs precision 'bfloat16', not 'float32'"),
        ({"adapter": {"rank": 0}}, "adapter.rank = 0"),
        ({"adapter": {"ranks": 4}}, "unknown key 'adapter.ranks' .did you mean 'rank'"),
        ({"adapter": {}, "sharding": True}, "sharding with adapter"),
        ({"adapter": {}, "teacher_offload": True}, "teacher_offload with adapter"),
        ({"compile": True, "sharding": True}, "compile with sharding"),
        ({"compile": True, "method": SHARED_GRAPH}, "compile with reuse_rollout 'graph'"),
        ({"compile": "network", "gradient_checkpointing": True}, "compile 'network' with gradient"),
        ({"adapter": {}, "method": "ida"}, "adapter: ida averages weights"),
        (
            {"adapter": {}, "teacher": "gaussian"},
            "adapter needs a transformer, which the teacher 'gaussian' does not have",
        ),
        ({"sharding": True, "method": SHARED_GRAPH}, "sharding with reuse_rollout 'graph'"),
    ],
)
def test_impossible_combinations_are_refused_in_one_line(fields, message):
    with pytest.raises(ConfigError, match=message) as error:
        resolve({"method": "dmd2"} | fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ema", [None, 0.5])
def test_the_average_is_of_the_masters_and_predicts_by_the_network_in_bfloat16(ema, make_run):
    fields = {"precision": "bfloat16", "weights": "bfloat16"}
    run = build_from(make_run("low", ema=ema, **fields))
    assert run.average.net is run.networks["student"] is run.nets.target.net
    masters = dict(run.trained["student"].named_parameters())
    sampled = run.average.sampled()
    assert sampled.keys() == masters.keys()
    assert {p.dtype for p in sampled.values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dmd2", ON_FEATURES, SHARED_GRAPH, "sid"], ids=str)
def test_gradient_checkpointing_changes_neither_numbers_nor_the_ledger(method, make_run):
    """The ledger does not count recomputed forwards, which are a cost of the memory setting."""
    plain = make_run("plain", method=method)
    saving = make_run("saving", method=method, gradient_checkpointing=True)
    assert train(plain)["cost"] == train(saving)["cost"]
    assert largest_difference(plain, saving) == 0


def test_gradient_checkpointing_runs_each_block_once_more_per_backward(make_run):
    """One more forward per network backward."""
    counts = {}
    for on in (False, True):
        run = make_run(f"{on}", gradient_checkpointing=on, exit_step="last", guidance_scale=1.0)
        trainer = build_from(run)
        calls = []
        for role in ("student", "fake_score"):
            trainer.networks[role].blocks[0].register_forward_pre_hook(
                lambda *_, role=role, calls=calls: calls.append(role)
            )
        trainer.update_student()
        trainer.update_fake_score(0)
        counts[on] = {role: calls.count(role) for role in ("student", "fake_score")}
    assert counts[False] == {"student": 4, "fake_score": 2}
    assert counts[True] == {"student": 5, "fake_score": 3}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dmd2", "sid", ON_FEATURES], ids=str)
def test_sequential_guidance_and_an_offloaded_teacher_change_no_number(method, make_run):
    common = {"method": method, "precision": "float64"}
    plain = make_run("plain", **common)
    saving = make_run("saving", guidance_forwards="sequential", teacher_offload=True, **common)
    assert train(plain)["cost"] == train(saving)["cost"]
    assert largest_difference(plain, saving) < 1e-9


def test_sequential_guidance_equals_batched_guidance_in_float32(make_run):
    trainer = build_from(make_run("run"))
    batch = trainer.batch("student")
    inputs = batch.noise("x"), batch.sigma("s"), batch.text
    batched = trainer.nets.teacher(*inputs)
    trainer.nets.teacher.batched = False
    sequential = trainer.nets.teacher(*inputs)
    torch.testing.assert_close(sequential, batched, rtol=1e-6, atol=1e-6)


def test_an_offloaded_teacher_has_one_block_on_the_device_at_a_time(tiny_wan):
    """With checkpointing, a copy is freed after the forward and made again in the backward."""
    x_t = torch.randn(1, 4, 2, 2, 2, requires_grad=True)
    sigma, text = torch.tensor([0.5]), torch.randn(1, 8, 16)

    def gradient(net: nn.Module) -> torch.Tensor:
        net.enable_gradient_checkpointing(checkpointed)
        x0 = Denoiser(net, "teacher", Ledger(1))(x_t, sigma, text)
        return torch.autograd.grad(x0.square().sum(), x_t)[0]

    plain = load_transformer(tiny_wan).requires_grad_(False)
    net = load_transformer(tiny_wan).requires_grad_(False)
    net = place(net, torch.device("cpu"), offload=True)
    copies: weakref.WeakSet = weakref.WeakSet()
    most_copies = 0

    def count_copies(block: nn.Module, _inputs: tuple) -> None:
        nonlocal most_copies
        copies.add(block.ffn.net[2].weight)
        most_copies = max(most_copies, len(copies))

    for block in net.blocks:
        assert isinstance(block, Streamed)
        block.block.register_forward_pre_hook(count_copies)
    # tensors at other addresses may be summed in another order
    torch.testing.assert_close(gradient(net), gradient(plain), rtol=1e-5, atol=1e-6)
    assert len(net.blocks) > 1
    assert most_copies == 1


def test_a_streamed_block_computes_on_the_device_and_stays_in_host_memory():
    streamed = Streamed(nn.Linear(2, 2), torch.device("meta"))
    assert streamed(torch.zeros(1, 2, device="meta")).device.type == "meta"
    assert streamed.block.weight.device.type == "cpu"
