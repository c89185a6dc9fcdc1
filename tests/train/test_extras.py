"""Extra data: made once per store, shared by processes, and keyed by settings."""

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
def few_pairs(monkeypatch):
    """Eight pairs of two steps, in four batches."""
    monkeypatch.setattr(extras, "ODE_PAIRS", 8)
    monkeypatch.setattr(extras, "ODE_STEPS", 2)
    monkeypatch.setattr(pipelines, "CLIPS_PER_BATCH", 2)


@pytest.fixture
def pairs(tiny_wan, monkeypatch):
    """Make a run's pairs in a store; returns a batch of pairs and the number of sampler calls.

    Each sampler call first calls `wait`; call number `interrupt_at` is interrupted.
    """
    lock, calls, sampler = threading.Lock(), [], extras.euler

    def make(
        store, wait=lambda: None, interrupt_at=None, **fields
    ) -> tuple[dict[str, torch.Tensor], int]:
        config = resolve(TINY_RUN | {"method": "dmd", "teacher": str(tiny_wan)} | fields)
        calls_before = len(calls)

        def counted(*inputs: object) -> torch.Tensor:
            with lock:
                calls.append(1)
            wait()
            if len(calls) - calls_before == interrupt_at:
                raise KeyboardInterrupt
            return sampler(*inputs)

        monkeypatch.setattr(extras, "euler", counted)
        draw = extras.ode_pairs(config, pipeline_of(config, CPU, store), store)
        return draw(DRAWS), len(calls) - calls_before

    return make


def assert_equal_pairs(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_pairs_hold_noise_and_the_teachers_samples_and_are_made_once(pairs, tmp_path):
    made, calls = pairs(tmp_path)
    cached, calls_if_cached = pairs(tmp_path)
    assert (calls, calls_if_cached) == (4, 0)
    assert made.keys() == {"noise", "x0", "text"}
    assert_equal_pairs(made, cached)
    assert made["x0"].isfinite().all()
    assert not torch.equal(made["x0"], made["noise"])


def test_interrupted_pairs_resume_with_the_same_bits(pairs, tmp_path):
    """Four batches, interrupted in the third: two are left to make."""
    uninterrupted, _ = pairs(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        pairs(tmp_path / "stopped", interrupt_at=3)
    resumed, calls = pairs(tmp_path / "stopped")
    assert calls == 2
    assert_equal_pairs(uninterrupted, resumed)


def test_processes_share_the_work(pairs, tmp_path):
    """The barrier passes only if both threads sample at the same time."""
    alone, _ = pairs(tmp_path / "alone")
    barrier = threading.Barrier(2, timeout=20)
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(pairs, tmp_path / "shared", barrier.wait) for _ in range(2)]
        results = [future.result()[0] for future in futures]
    assert len(list((tmp_path / "shared" / "extras").glob("*.safetensors"))) == 4
    for shared in results:
        assert_equal_pairs(alone, shared)


def test_an_offloaded_teacher_samples_offloaded_and_is_restored(tiny_wan, tmp_path, monkeypatch):
    """Its blocks are in host memory while it makes pairs; training may then place the network."""
    keys = TINY_RUN | {"method": "dmd", "teacher": str(tiny_wan)}
    config = resolve(keys | {"teacher_offload": True})
    pipeline, sampler = pipeline_of(config, CPU, tmp_path), extras.euler
    streamed_blocks = []

    def count_streamed(teacher, *inputs):
        modules = teacher.denoiser.net.modules()
        streamed_blocks.append(sum(isinstance(module, Streamed) for module in modules))
        return sampler(teacher, *inputs)

    monkeypatch.setattr(extras, "euler", count_streamed)
    names = list(pipeline.transformer.state_dict())
    offloaded = extras.ode_pairs(config, pipeline, tmp_path)(DRAWS)
    assert streamed_blocks == [len(pipeline.transformer.blocks)] * 4
    assert list(pipeline.transformer.state_dict()) == names
    store, config = tmp_path / "placed", resolve(keys)
    placed = extras.ode_pairs(config, pipeline_of(config, CPU, store), store)(DRAWS)
    assert_equal_pairs(offloaded, placed)


def test_other_prompts_and_another_precision_have_pairs_of_their_own(pairs, tmp_path):
    """Sequential guidance, which changes only rounding, reuses the pairs."""
    default, calls = pairs(tmp_path)
    (tmp_path / "prompts.txt").write_text("a blue square moving right\n")
    other, calls_for_prompts = pairs(tmp_path, prompts=str(tmp_path / "prompts.txt"))
    low, calls_for_precision = pairs(tmp_path, precision="bfloat16", weights="bfloat16")
    away, calls_for_negative = pairs(tmp_path, negative_prompt="a blue square moving left")
    assert calls == calls_for_prompts == calls_for_precision == calls_for_negative == 4
    assert torch.equal(default["noise"], away["noise"])
    assert not torch.allclose(default["x0"], away["x0"], rtol=1e-3)
    assert torch.equal(default["noise"], other["noise"])
    assert torch.equal(default["noise"], low["noise"])
    assert not torch.equal(default["x0"], other["x0"])
    assert 0 < float((default["x0"] - low["x0"]).norm() / default["x0"].norm()) < 0.05
    assert pairs(tmp_path, guidance_forwards="sequential")[1] == 0
