"""Two experts behind one denoiser, on a tiny pipeline of Wan2.2-A14B's classes."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import pipelines
import pytest
import torch
from network_variants import ADAPTER

from distill_bench.config.errors import ConfigError
from distill_bench.config.identity import run_id
from distill_bench.config.resolve import load_run, resolve
from distill_bench.config.rows.sampling import teacher_sampling
from distill_bench.config.schema import RunConfig
from distill_bench.config.sweep_file import SweepConfig
from distill_bench.config.validation import validate
from distill_bench.config.yaml_files import dump_yaml
from distill_bench.networks.denoiser import Denoiser, Guided, forward_flops
from distill_bench.networks.ledger import Ledger
from distill_bench.networks.offload import Streamed, place, to_host_memory
from distill_bench.networks.pipeline import (
    load_networks,
    load_pipeline,
    load_transformer,
    pipeline_of,
)
from distill_bench.noise import GuidanceByLevel, teacher_sigmas
from distill_bench.rollout import euler
from distill_bench.sample.sampler import Sampler, levels
from distill_bench.sweep.manifest import open_sweep
from distill_bench.teachers.experts import guidance_of
from distill_bench.teachers.folder import TeacherError
from distill_bench.train import extras
from distill_bench.train.setup import build_from

CPU = torch.device("cpu")
EXPERTS = ("high_noise", "low_noise")


@pytest.fixture(scope="module")
def a14b(tmp_path_factory) -> Path:
    """A pipeline folder with two experts."""
    folder = tmp_path_factory.mktemp("pipelines") / "wan22-a14b"
    pipelines.save("wan22-a14b", folder)
    return folder


def inputs_at(levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    x_t = torch.randn(len(levels), 4, 2, 2, 2, generator=draws)
    return x_t, levels, torch.randn(len(levels), 8, 16, generator=draws)


def test_each_sample_of_a_batch_runs_through_the_expert_of_its_noise_level(a14b):
    """In order, counted once, differentiable to the input alone; the boundary is of high noise."""
    net, ledger = load_networks(a14b).requires_grad_(False), Ledger(1)
    boundary = torch.tensor(net.boundary)
    below = boundary.nextafter(torch.zeros(()))
    x_t, sigma, text = inputs_at(torch.stack([boundary, below, torch.tensor(0.1), torch.ones(())]))
    x_t.requires_grad_()
    denoiser = Denoiser(place(net, CPU, offload=True), "teacher", ledger)
    assert sum(isinstance(module, Streamed) for module in net.modules()) == 4
    tokens = denoiser.features(x_t, sigma, text, 0.5)
    assert ledger.counts["teacher"]["forward"] == 2  # one of two blocks
    x0 = denoiser(x_t, sigma, text)
    assert ledger.counts["teacher"]["forward"] == 2 + 4
    for sample, expert in enumerate(("high_noise", "low_noise", "low_noise", "high_noise")):
        alone = Denoiser(load_transformer(a14b, expert), "teacher", Ledger(1))
        own = x_t[sample : sample + 1], sigma[sample : sample + 1], text[sample : sample + 1]
        torch.testing.assert_close(x0[sample], alone(*own)[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(tokens[sample], alone.features(*own, 0.5)[0])
    x0.sum().backward()
    assert (x_t.grad.flatten(1).abs().amax(1) > 0).all()
    assert ledger.counts["teacher"]["input_backward"] == 4
    assert ledger.counts["teacher"]["full_backward"] == 0
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(isinstance(module, Streamed) for module in to_host_memory(net).modules())


@pytest.mark.slow
@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize("adapter", [None, ADAPTER])
def test_student_and_fake_score_start_from_one_expert_and_the_teacher_keeps_both(
    expert, adapter, a14b, make_run
):
    run = build_from(
        make_run("run", teacher=str(a14b), student_expert=expert, adapter=adapter, method="sgmd")
    )
    inputs = inputs_at(torch.tensor([0.2, 0.99]))
    chosen = Denoiser(load_transformer(a14b, expert), "teacher", Ledger(1))
    both = Denoiser(load_networks(a14b), "teacher", Ledger(1))
    with torch.no_grad():
        for role in ("student", "fake_score", "target"):
            torch.testing.assert_close(getattr(run.nets, role)(*inputs), chosen(*inputs))
        torch.testing.assert_close(run.nets.unguided_teacher(*inputs), both(*inputs))
        assert not torch.allclose(chosen(*inputs), both(*inputs))
    priced = forward_flops(load_transformer(a14b), (4, 2, 2, 2), inputs[2])
    assert run.ledger.flops["teacher"] == priced  # a student with an adapter costs more
    # adapters of the student leave the teacher as it is
    run.update_student()
    with torch.no_grad():
        torch.testing.assert_close(run.nets.unguided_teacher(*inputs), both(*inputs))
    assert "full_backward" not in {
        kind for kind, count in run.ledger.counts["teacher"].items() if count
    }


def test_the_expert_is_in_the_id_and_needs_a_pipeline_with_two(a14b, tiny_wan):
    def resolved(**fields):
        size = {"frames": 5, "height": 16, "width": 16}
        return resolve({"method": "dmd2", "teacher": str(a14b)} | size | fields)

    own = {run_id(resolved(**fields)) for fields in ({}, {"student_expert": "high_noise"})}
    assert len(own | {run_id(resolved(student_expert="low_noise"))}) == 2 and len(own) == 1
    hashes = {resolved(student=str(a14b), student_expert=e).student_hash for e in EXPERTS}
    assert len(hashes) == 2 and "" not in hashes
    for fields in ({"teacher": str(tiny_wan)}, {"student": str(tiny_wan)}):
        with pytest.raises(ConfigError, match="'low_noise': tiny-wan has no transformer_2"):
            resolved(student_expert="low_noise", **fields)


def test_training_and_the_teachers_clips_guide_each_expert_by_its_own_scale(a14b, make_run):
    scales = {"high_noise": 4.0, "low_noise": 1.5}
    protocol = {"clips": 2, "teacher_steps": 3, "teacher_guidance": scales}
    keys = {"teacher": str(a14b), "guidance_scale": scales, "protocol": protocol}
    run = build_from(make_run("run", method="decoupled_dmd", **keys))
    x_t, sigma, text = inputs_at(torch.tensor([0.2, 0.99]))
    both = run.nets.unguided_teacher
    with torch.no_grad():
        cond, uncond = (both(x_t, sigma, t) for t in (text, run.nets.null_text.expand_as(text)))
        expected = uncond + torch.tensor([1.5, 4.0]).reshape(2, 1, 1, 1, 1) * (cond - uncond)
        torch.testing.assert_close(run.nets.teacher(x_t, sigma, text), expected)

    sampler = Sampler(run.config)
    own = teacher_sampling(run.config, 3)
    noise, texts = torch.randn(2, *sampler.shape), sampler.texts.rows(range(2))
    denoiser, null = Denoiser(sampler.teacher_net, "teacher", Ledger(1)), sampler.texts.null_text
    by_level = GuidanceByLevel(4.0, 1.5, load_networks(a14b).boundary)
    assert run.nets.guidance_scale == by_level
    down = torch.cat([levels(own), torch.zeros(1)])
    assert down[0] > by_level.boundary > down[-2]
    clips = euler(Guided(denoiser, null, by_level), noise, down, texts)
    torch.testing.assert_close(sampler.teacher_latents(own)([noise], texts), clips)
    assert own.name.endswith("guidance4+1.5")

    # the weight g - 1 of the method's own term; all levels are below a boundary of 1.5
    below, equal = GuidanceByLevel(2.0, 1.0, 1.5), GuidanceByLevel(2.0, 2.0, 0.5)
    number, equally, none = (
        run.method.student_loss(
            dataclasses.replace(run.nets, guidance_scale=scale),
            run.batches.batch(0, "student", 0),
        ).terms["augmentation"]
        for scale in (2.0, equal, below)
    )
    assert number == equally != 0 and none == 0


def test_experts_of_another_pipeline_are_guided_at_their_own_boundary(a14b, tiny_wan):
    """A row that was trained elsewhere may have another boundary than the teacher."""
    net, scales = load_networks(a14b), {"high_noise": 4.0, "low_noise": 3.0}
    teachers = GuidanceByLevel(4.0, 3.0, net.boundary)
    assert guidance_of(scales, str(a14b)) == guidance_of(scales, str(a14b), net) == teachers
    net.boundary = 0.5
    assert guidance_of(scales, str(a14b), net) == GuidanceByLevel(4.0, 3.0, 0.5)
    assert guidance_of(2.5, str(tiny_wan)) == 2.5
    with pytest.raises(TeacherError, match="has one network; write a number"):
        guidance_of(scales, str(tiny_wan))


def test_ode_pairs_are_guided_by_the_scale_of_each_step_s_expert(a14b, tmp_path, monkeypatch):
    """Three Euler steps, from the high-noise expert's level to the low-noise expert's."""
    monkeypatch.setattr(extras, "ODE_PAIRS", 2)
    monkeypatch.setattr(extras, "ODE_STEPS", 3)
    size = {"teacher": str(a14b), "frames": 5, "height": 16, "width": 16}

    def pairs(high_noise: float, low_noise: float) -> dict[str, torch.Tensor]:
        scale = {"high_noise": high_noise, "low_noise": low_noise}
        config = resolve({"method": "dmd", "guidance_scale": scale} | size)
        pipeline = pipeline_of(config, CPU, tmp_path)
        return extras.ode_pairs(config, pipeline, tmp_path).every()

    made = pairs(4.0, 3.0)
    boundary, levels = (
        load_networks(a14b).boundary,
        teacher_sigmas(3, resolve({"method": "dmd"} | size).shift),
    )
    null = load_pipeline(str(a14b), CPU).texts([""]).null_text
    x_t, used = made["noise"], []
    for high, low in itertools.pairwise(levels):
        expert = EXPERTS[int(high < boundary)]
        used.append(expert)
        net = load_transformer(a14b, expert)
        with torch.no_grad():
            cond, uncond = (
                net(x_t, 1000 * high.expand(2), text, return_dict=False)[0]
                for text in (made["text"], null.expand_as(made["text"]))
            )
        scale = {"high_noise": 4.0, "low_noise": 3.0}[expert]
        x_t = x_t + (low - high) * (uncond + scale * (cond - uncond))
    assert set(used) == set(EXPERTS)
    torch.testing.assert_close(made["x0"], x_t, rtol=1e-4, atol=1e-5)
    for other in ((4.0, 4.0), (3.0, 3.0), (3.0, 4.0)):
        assert not torch.allclose(pairs(*other)["x0"], made["x0"], rtol=1e-3, atol=1e-4)


def test_a_scale_per_expert_is_in_the_id_and_needs_a_teacher_with_two(a14b, tiny_wan, tmp_path):
    def resolved(**fields):
        size = {"frames": 5, "height": 16, "width": 16}
        return resolve({"method": "dmd2", "teacher": str(a14b)} | size | fields)

    four, scales = {"high_noise": 4.0, "low_noise": 4.0}, {"low_noise": 3, "high_noise": 4}
    assert run_id(resolved(guidance_scale=four)) == run_id(resolved(guidance_scale=4))
    ids = {run_id(resolved(guidance_scale=g)) for g in (4, 3, scales)}
    ids |= {run_id(resolved(protocol={"teacher_guidance": scales}))}
    assert len(ids) == 4
    assert stored(resolved(guidance_scale=scales), tmp_path).guidance_scale == scales
    with pytest.raises(ConfigError, match="names high; write a number, or one for each of high_"):
        resolved(guidance_scale={"high": 4.0})
    with pytest.raises(ConfigError, match="low_noise is -1"):
        resolved(guidance_scale=scales | {"low_noise": -1})
    data = {"question": "?", "base": {"method": "dmd2", "teacher": str(tiny_wan)}, "name": "s"}
    data["base"] |= {"frames": 5, "height": 16, "width": 16}
    for more, key in (
        ({"grid": {"guidance_scale": [scales]}}, "guidance_scale"),
        ({"grid": {"protocol.teacher_guidance": [scales]}}, "protocol.teacher_guidance"),
        ({"sampling": [{"guidance_scale": scales}]}, "sampling.guidance_scale"),
        ({"rows": [{"name": "R", "network": "x", "guidance_scale": scales}]}, "rows: R: guidance"),
    ):
        with pytest.raises(ConfigError, match=f"{key}.*needs a teacher with two experts") as error:
            open_sweep(validate(SweepConfig, data | more, "s"), tmp_path, tmp_path)
        assert "\n" not in str(error.value)


def stored(config: RunConfig, folder: Path) -> RunConfig:
    """The config after it was written to a run folder and read again."""
    (folder / "run.yaml").write_text(dump_yaml(config.model_dump(mode="json")))
    return load_run(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boundary_ratio": None}, "it has a transformer_2, but boundary_ratio is None"),
        ({"boundary_ratio": 875}, "boundary_ratio is 875 in its model_index.json, not a number"),
        ({"ffn_dim": 64}, "ffn_dim is 32 in its transformer and 64 in its transformer_2"),
        (None, "boundary_ratio is 0.8.* but it has no transformer_2"),
    ],
    ids=str,
)
def test_experts_that_do_not_belong_together_are_refused_in_one_line(
    change, message, a14b, tmp_path
):
    copy = Path(shutil.copytree(a14b, tmp_path / "copy"))
    if change is None:
        shutil.rmtree(copy / "transformer_2")
    else:
        part = "transformer_2/config.json" if "ffn_dim" in change else "model_index.json"
        config = json.loads((copy / part).read_text())
        (copy / part).write_text(json.dumps(config | change))
    with pytest.raises(ConfigError, match=message) as error:
        resolve({"method": "dmd2", "teacher": str(copy), "frames": 5, "height": 16, "width": 16})
    assert "\n" not in str(error.value)
