"""Extra data: made once per store, shared by processes, and keyed by settings."""

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from runs import TINY_RUN

from distill_bench.config.resolve import resolve
from distill_bench.domain.gaussian_teacher import GaussianPipeline, write_gaussian_teacher
from distill_bench.draws import Draws, generator
from distill_bench.networks import pipeline as pipelines
from distill_bench.networks.denoiser import Denoiser, Guided
from distill_bench.networks.ledger import Ledger
from distill_bench.networks.offload import Streamed
from distill_bench.networks.pipeline import DiffusersPipeline, pipeline_of
from distill_bench.noise import warp
from distill_bench.pretrain import fit_autoencoder, fit_encoders, quality
from distill_bench.teachers.embeddings import Texts
from distill_bench.testing.tiny import tiny_clips
from distill_bench.train import extras
from distill_bench.train.inputs import Rows

CPU = torch.device("cpu")
STEPS = extras.ODE_STEPS  # of runs; the fixture below takes fewer
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
    loading = threading.Lock()  # loading swaps methods of nn.Module; two threads leave them swapped

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
        with loading:
            pipeline = pipeline_of(config, CPU, store)
        draw = extras.ode_pairs(config, pipeline, store)
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


def test_pairs_of_the_gaussian_teacher_are_near_the_exact_solution_of_its_ode(
    tmp_path, monkeypatch
):
    """The exact solution maps unit noise to m + C^(1/2) noise; at shift 3, pairs are within 8 %."""
    monkeypatch.setattr(extras, "ODE_STEPS", STEPS)
    fields = {"method": "dmd", "teacher": "gaussian", "data": None, "guidance_scale": 1.0}
    config = resolve(TINY_RUN | fields | {"shift": 3.0})
    pipeline = pipeline_of(config, CPU, tmp_path)
    pairs = extras.ode_pairs(config, pipeline, tmp_path)(DRAWS)
    values, basis = torch.linalg.eigh(pipeline.covariance)
    deviation = pairs["noise"].flatten(1).double() @ (basis * values.sqrt()) @ basis.T
    mean = pipeline.mean + pairs["text"][:, 0].double() @ pipeline.shifts
    error = (pairs["x0"].flatten(1) - mean - deviation).norm() / deviation.norm()
    assert error < 0.08


def test_interrupted_pairs_resume_with_the_same_bits(pairs, tmp_path):
    """Four batches, interrupted in the third: two are left to make."""
    uninterrupted, _ = pairs(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        pairs(tmp_path / "stopped", interrupt_at=3)
    resumed, calls = pairs(tmp_path / "stopped")
    assert calls == 2
    assert_equal_pairs(uninterrupted, resumed)


def test_processes_share_the_work(pairs, tmp_path):
    """The barrier passes only if both threads sample at the same time; one is then late."""
    alone, _ = pairs(tmp_path / "alone")
    barrier = threading.Barrier(2, timeout=20)

    def wait() -> None:
        time.sleep(0.3 * barrier.wait())  # its number: 0 or 1

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(pairs, tmp_path / "shared", wait) for _ in range(2)]
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


def test_another_size_has_pairs_of_its_own(pairs, tmp_path):
    low, calls = pairs(tmp_path)
    high, calls_if_high = pairs(tmp_path, height=32)
    assert calls == calls_if_high == 4
    assert high["x0"].shape[-2] == 2 * low["x0"].shape[-2]


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


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_pairs_follow_the_guided_teachers_euler_steps_from_noise_of_their_own(
    precision, tmp_path, monkeypatch, capsys
):
    """Seven pairs in batches of two; row i has prompt i, in turn, and noise keyed by i alone."""
    monkeypatch.setattr(extras, "ODE_PAIRS", 7)
    keys = {"teacher": "gaussian", "guidance_scale": 2.5, "shift": 3.0, "precision": precision}
    config = resolve(TINY_RUN | keys)
    pipeline = pipeline_of(config, CPU, tmp_path)
    rows = extras.ode_pairs(config, pipeline, tmp_path)
    assert rows.purpose == "ode_pairs"
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        f"the teacher's samples {r} of 7" for r in ("0 to 1", "2 to 3", "4 to 5", "6 to 6")
    ]
    pairs = rows.every()
    noise = [torch.randn(*pipeline.shape, generator=generator("ode_pairs", i)) for i in range(7)]
    assert torch.equal(pairs["noise"], torch.stack(noise))
    prompts = pipeline.prompts()
    text = pipeline.encode_text([prompts[i % len(prompts)] for i in range(7)])
    assert torch.equal(pairs["text"], text)
    autocast = torch.bfloat16 if precision == "bfloat16" else None
    denoiser = Denoiser(pipeline.transformer, "teacher", Ledger(1), autocast)
    teacher = Guided(denoiser, torch.zeros(1, 1, len(prompts)), 2.5)
    x_t = pairs["noise"]
    levels = warp(torch.tensor([1.0, 0.5, 0.0]), 3.0)
    for high, low in itertools.pairwise(levels):
        with torch.no_grad():
            x0 = teacher(x_t, high.expand(7), text)
        x_t = x0 + low / high * (x_t - x0)
    torch.testing.assert_close(pairs["x0"], x_t, rtol=1e-4, atol=1e-5)


def test_pairs_are_those_of_their_settings(tmp_path):
    """A store may hold pairs of several runs; each setting that changes a pair has its own."""
    config = resolve(TINY_RUN | {"teacher": "gaussian"})
    pipeline, folder = pipeline_of(config, CPU, tmp_path), tmp_path / "extras"
    changes = [{}, {"guidance_scale": 1.5}, {"shift": 4.0}, {"precision": "bfloat16"}]
    changes += [{"teacher_hash": "other"}, {"negative_prompt_hash": "other"}]
    changes += [{"precision": "bfloat16", "shift": 4.0}, {"negative_prompt_hash": "another"}]
    changes += [{"negative_prompt_hash": "other", "shift": 4.0}]
    changes += [{"precision": "bfloat16", "weights": "bfloat16"}]
    for count, fields in enumerate(changes + changes, 1):
        extras.ode_pairs(config.model_copy(update=fields), pipeline, tmp_path)
        files = {path.name for path in folder.glob("ode_pairs-*.safetensors")}
        assert len(files) == 4 * min(count, len(changes))


def test_real_latents_are_drawn_from_the_data_once_per_store(tmp_path, monkeypatch):
    """Row i has prompt i, in turn, and a key that no evaluator or teacher has seen."""
    monkeypatch.setattr(extras, "REAL_LATENTS", 6)
    monkeypatch.setattr(extras, "FIRST_KEY", 100)
    config = resolve(TINY_RUN | {"teacher": "gaussian"})
    pipeline, draw = pipeline_of(config, CPU, tmp_path), GaussianPipeline.data
    calls = []

    def counted(pipeline, prompts, keys):
        calls.append(len(keys))
        return draw(pipeline, prompts, keys)

    monkeypatch.setattr(GaussianPipeline, "data", counted)
    rows = [extras.real_latents(config, pipeline, tmp_path).every() for _ in range(2)]
    assert calls == [1, 6, 1]  # an example each time, all rows once
    prompts = pipeline.prompts()
    named = [prompts[i % len(prompts)] for i in range(6)]
    assert torch.equal(rows[0]["x0"], draw(pipeline, named, list(range(100, 106))))
    assert torch.equal(rows[0]["text"], pipeline.encode_text(named))
    assert_equal_pairs(*rows)
    assert extras.real_latents(config, pipeline, tmp_path).purpose == "real_latents"
    other = config.model_copy(update={"teacher_hash": "other"})
    extras.real_latents(other, pipeline, tmp_path)
    assert calls == [1, 6, 1, 1, 1, 6]
    for size in ("frames", "height", "width"):
        extras.real_latents(config.model_copy(update={size: 64}), pipeline, tmp_path)
    assert calls == [1, 6, 1, 1] + [1, 6] * 4
    monkeypatch.setattr(GaussianPipeline, "latent_shape", lambda _, *size: (1, *size))
    with pytest.raises(ValueError, match=r"of shape \(1, 4, 2, 2\), .* \(1, 5, 16, 16\)"):
        extras.real_latents(config, pipeline, tmp_path)


def test_real_latents_of_other_prompts_are_files_of_their_own(tmp_path, monkeypatch):
    """Also if there is one prompt."""
    monkeypatch.setattr(extras, "REAL_LATENTS", 3)
    write_gaussian_teacher(tmp_path / "teacher", (1, 5, 2, 2), 1, 2.0, 0)
    config = resolve(TINY_RUN | {"teacher": str(tmp_path / "teacher")})
    pipeline = pipeline_of(config, CPU, tmp_path)
    for count, prompts in enumerate([None, "a", "b", "a", None], 1):
        own = config.model_copy(update={"prompts": prompts, "prompts_hash": prompts or ""})
        assert len(extras.real_latents(own, pipeline, tmp_path).every()["x0"]) == 3
        files = list((tmp_path / "extras").glob("real_latents-*.safetensors"))
        assert len(files) == min(count, 3)


def test_real_latents_that_another_process_makes_are_waited_for(tmp_path, monkeypatch):
    config = resolve(TINY_RUN | {"teacher": "gaussian"})
    pipeline, draw = pipeline_of(config, CPU, tmp_path), GaussianPipeline.data
    began = threading.Event()

    def slow(pipeline, prompts, keys):
        if len(keys) > 1:
            began.set()
            time.sleep(0.3)
        return draw(pipeline, prompts, keys)

    monkeypatch.setattr(GaussianPipeline, "data", slow)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(extras.real_latents, config, pipeline, tmp_path)
        assert began.wait(20)
        rows = extras.real_latents(config, pipeline, tmp_path)
        assert_equal_pairs(rows.every(), other.result().every())


def test_a_teacher_that_cannot_render_its_prompts_gives_its_own_samples(tiny_wan, tmp_path):
    config = resolve(TINY_RUN | {"method": "dmd", "teacher": str(tiny_wan)})
    rows = extras.real_latents(config, pipeline_of(config, CPU, tmp_path), tmp_path)
    assert rows.purpose == "real_latents"
    every = extras.ode_pairs(config, pipeline_of(config, CPU, tmp_path), tmp_path).every()
    assert rows.every().keys() == {"x0", "text"}
    assert torch.equal(rows.every()["x0"], every["x0"])
    assert torch.equal(rows.every()["text"], every["text"])


def test_clips_of_a_folder_are_encoded_in_order_with_their_prompts(tiny_wan, tmp_path, monkeypatch):
    """Five clips, at most two at a time."""
    monkeypatch.setattr(extras, "ENCODED_TOGETHER", 2)
    folder = tmp_path / "clips"
    tiny_clips(folder)
    frames = np.load(folder / "clips.npy")[:5]
    np.save(folder / "clips.npy", frames)
    names = ["a red circle", "a blue square", "a red circle", "", "a green star"]
    lines = "".join(f'{{"prompt": "{name}"}}\n' for name in names)
    (folder / "manifest.jsonl").write_text(lines)
    config = resolve(TINY_RUN | {"teacher": str(tiny_wan), "data": str(folder)})
    pipeline, encode = pipeline_of(config, CPU, tmp_path), DiffusersPipeline.encode
    together = []

    def counted(pipeline, frames):
        together.append(len(frames))
        return encode(pipeline, frames)

    monkeypatch.setattr(DiffusersPipeline, "encode", counted)
    rows = extras.real_latents(config, pipeline, tmp_path)
    assert rows.purpose == "real_latents"
    assert sum(together) == 5
    assert max(together) == 2
    torch.testing.assert_close(rows.every()["x0"], encode(pipeline, frames))
    assert torch.equal(rows.every()["text"], pipeline.texts(names).rows(range(5)))
    (folder / "manifest.jsonl").write_text(lines + lines[:27])
    with pytest.raises(ValueError, match=r"holds 5 clips, but manifest.jsonl lists 6"):
        extras.real_latents(config, pipeline, tmp_path)
    (folder / "manifest.jsonl").write_text(lines)
    taller = config.model_copy(update={"height": 32})
    with pytest.raises(ValueError, match=r"clips are \(5, 3, 16, 16\) .* needs \(5, 3, 32, 16\)"):
        extras.real_latents(taller, pipeline, tmp_path)
    np.save(folder / "clips.npy", np.array([config, config], object))
    with pytest.raises(ValueError, match="allow_pickle"):
        extras.real_latents(config, pipeline, tmp_path)


def test_rendered_latents_have_keys_that_no_shipped_network_was_trained_on():
    """Nor any clip of a protocol, whose keys begin at 0."""
    keys = range(extras.FIRST_KEY, extras.FIRST_KEY + 432)
    evaluators = range(fit_encoders.TRAIN_KEYS, fit_encoders.TRAIN_KEYS + 4320)
    assert len(keys) == extras.REAL_LATENTS
    assert keys[0] > evaluators[-1] > evaluators[0] > 10_000
    assert keys[-1] < quality.HELD_OUT_KEY < fit_autoencoder.FIRST_KEY


def test_only_known_needs_are_provided_each_by_its_name(tmp_path):
    config = resolve(TINY_RUN | {"teacher": "gaussian"})
    pipeline = pipeline_of(config, CPU, tmp_path)
    both = extras.providers(frozenset({"real_latents", "ode_pairs"}), config, pipeline, tmp_path)
    assert {name: rows.purpose for name, rows in both.items()} == {
        "ode_pairs": "ode_pairs",
        "real_latents": "real_latents",
    }
    with pytest.raises(ValueError, match="nothing provides flow, masks; a method may need: ode_"):
        extras.providers(frozenset({"ode_pairs", "masks", "flow"}), config, pipeline, tmp_path)


def test_a_batch_draws_each_row_equally_often_with_its_own_text(tmp_path, monkeypatch):
    monkeypatch.setattr(pipelines, "CLIPS_PER_BATCH", 9)  # all pairs are one batch
    config = resolve(TINY_RUN | {"teacher": "gaussian"})
    rows = extras.ode_pairs(config, pipeline_of(config, CPU, tmp_path), tmp_path)
    every = rows.every()
    draws = Draws(0, 0, "student", range(4000), CPU, torch.float64)
    batch = rows(draws)
    which = (batch["x0"][:, None] == every["x0"].double()).flatten(2).all(2)
    assert (which.sum(1) == 1).all()
    assert which.double().mean(0).sub(1 / 8).abs().max() < 0.02
    for name, tensor in every.items():
        assert torch.equal(batch[name], tensor.double()[which.int().argmax(1)])
    far = rows(Draws(0, 0, "student", range(3), torch.device("meta"), torch.float64))
    assert {row.device.type for row in far.values()} == {"meta"}


def test_a_drawn_row_has_its_own_text():
    embedded = {text: torch.randn(1, 2) for text in ("a", "b", "c", "")}
    texts = Texts(["a", "b", "c"], embedded, CPU, torch.float32)
    of_row = [2, 0, 1, 1]
    x0 = torch.arange(4.0)
    drawn = Rows("test", {"x0": x0}, texts, of_row)(DRAWS)
    assert len(drawn["x0"].unique()) > 1
    for row, text in zip(drawn["x0"], drawn["text"], strict=True):
        assert torch.equal(text, texts.rows([of_row[int(row)]])[0])
