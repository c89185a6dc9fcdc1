"""Extra data are made once per store, in files that processes share and that settings key."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from runs import TINY_RUN

from distill_bench.config.resolve import resolve
from distill_bench.draws import Draws
from distill_bench.networks import pipeline as pipelines
from distill_bench.networks.offload import Streamed
from distill_bench.networks.pipeline import pipeline_of
from distill_bench.train import extras

CPU = torch.device("cpu")
DRAWS = Draws(0, 0, "student", range(6), CPU, torch.float32)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(extras, "ODE_PAIRS", 8)
    monkeypatch.setattr(extras, "ODE_STEPS", 2)
    monkeypatch.setattr(pipelines, "CLIPS_PER_BATCH", 2)


@pytest.fixture
def pairs(tiny_wan, monkeypatch):
    """Makes a run's pairs in a store; returns a batch of them and the number of sampler calls."""
    lock, calls, sampler = threading.Lock(), [], extras.euler

    def made(
        store, meet=lambda: None, dies_at=None, **fields
    ) -> tuple[dict[str, torch.Tensor], int]:
        config = resolve(TINY_RUN | {"method": "dmd"} | {"teacher": str(tiny_wan)} | fields)
        before = len(calls)

        def counted(*inputs: object) -> torch.Tensor:
            with lock:
                calls.append(1)
            meet()
            if len(calls) - before == dies_at:
                raise KeyboardInterrupt
            return sampler(*inputs)

        monkeypatch.setattr(extras, "euler", counted)
        draw = extras.ode_pairs(config, pipeline_of(config, CPU, store), store)
        return draw(DRAWS), len(calls) - before

    return made


def test_pairs_are_what_a_teacher_makes_of_noise_and_are_made_once(pairs, tmp_path):
    first, calls = pairs(tmp_path)
    again, none = pairs(tmp_path)
    assert calls == 4 and none == 0 and first.keys() == {"noise", "x0", "text"}
    assert (
        all(torch.equal(first[key], again[key]) for key in first) and first["x0"].isfinite().all()
    )
    assert float((first["x0"] - first["noise"]).abs().max()) > 0


def test_pairs_that_were_interrupted_go_on_in_the_same_bits(pairs, tmp_path):
    whole, _ = pairs(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        pairs(tmp_path / "stopped", dies_at=3)
    rest, calls = pairs(tmp_path / "stopped")
    assert calls == 2 and all(torch.equal(whole[key], rest[key]) for key in whole)


def test_processes_share_the_work(pairs, tmp_path):
    whole, _ = pairs(tmp_path / "whole")
    both = threading.Barrier(
        2, timeout=20
    )  # a call returns when two are at work: each alone would wait for ever
    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(pairs, tmp_path / "shared", both.wait) for _ in range(2)]
        results = [each.result()[0] for each in found]
    assert len(list((tmp_path / "shared" / "extras").glob("*.safetensors"))) == 4
    assert all(torch.equal(whole[key], result[key]) for result in results for key in whole)


def test_an_offloaded_teacher_stays_offloaded_and_is_given_back_as_it_was(
    tiny_wan, tmp_path, monkeypatch
):
    """Its blocks are in host memory while it makes pairs; training may place the network anew."""
    config = resolve(
        TINY_RUN | {"method": "dmd"} | {"teacher": str(tiny_wan), "teacher_offload": True}
    )
    pipeline, sampler, streamed = pipeline_of(config, CPU, tmp_path), extras.euler, []

    def seen(teacher, *inputs):
        streamed.append(
            sum(isinstance(module, Streamed) for module in teacher.denoiser.net.modules())
        )
        return sampler(teacher, *inputs)

    monkeypatch.setattr(extras, "euler", seen)
    names = list(pipeline.transformer.state_dict())
    offloaded = extras.ode_pairs(config, pipeline, tmp_path)(DRAWS)
    assert (
        streamed == [len(pipeline.transformer.blocks)] * 4
        and list(pipeline.transformer.state_dict()) == names
    )
    whole = resolve(TINY_RUN | {"method": "dmd"} | {"teacher": str(tiny_wan)})
    placed = extras.ode_pairs(
        whole, pipeline_of(whole, CPU, tmp_path / "placed"), tmp_path / "placed"
    )(DRAWS)
    assert all(torch.equal(offloaded[key], placed[key]) for key in placed)


def test_other_prompts_and_another_precision_have_pairs_of_their_own(pairs, tmp_path):
    ours, calls = pairs(tmp_path)
    (tmp_path / "prompts.txt").write_text("a blue square moving right\n")
    other, more = pairs(tmp_path, prompts=str(tmp_path / "prompts.txt"))
    low, most = pairs(tmp_path, precision="bfloat16", weights="bfloat16")
    assert (
        calls == more == most == 4
        and torch.equal(ours["noise"], other["noise"])
        and torch.equal(ours["noise"], low["noise"])
    )
    assert not torch.equal(ours["x0"], other["x0"])
    assert 0 < float((ours["x0"] - low["x0"]).norm() / ours["x0"].norm()) < 0.05
    assert (
        pairs(tmp_path, guidance_forwards="sequential")[1] == 0
    )  # the same numbers but for rounding
