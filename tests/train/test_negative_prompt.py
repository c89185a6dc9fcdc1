"""Negative prompts: identity, and the unconditional branch of guidance wherever it is used."""

import shutil
from pathlib import Path

import pytest
import torch

from distill_bench.config.errors import ConfigError
from distill_bench.config.identity import cost_key, run_id
from distill_bench.config.protocol import protocol_hash
from distill_bench.config.resolve import load_run, resolve
from distill_bench.config.rows.sampling import teacher_sampling
from distill_bench.networks import embed as embedding
from distill_bench.networks.pipeline import load_pipeline, load_transformer, pipeline_of
from distill_bench.noise import teacher_sigmas
from distill_bench.sample.sampler import Sampler
from distill_bench.teachers.architectures.wan import Wan
from distill_bench.teachers.folder import TeacherError
from distill_bench.train.setup import build_from

CPU = torch.device("cpu")
NEGATIVE = "a blue square moving left"


def test_the_text_and_not_its_spelling_is_part_of_the_id(make_run, tiny_wan, tmp_path):
    """The published prompt by name, as a text and as a file; mini-wan has none."""
    path = tmp_path / "negative.txt"
    path.write_text(f"{Wan.NEGATIVE_PROMPT}\n", encoding="utf-8")
    values = ("default", Wan.NEGATIVE_PROMPT, f"file:{path}")
    runs = [load_run(make_run(str(i), negative_prompt=value)) for i, value in enumerate(values)]
    plain = load_run(make_run("plain"))
    assert len({run_id(run) for run in runs}) == 1
    assert run_id(runs[0]) != run_id(plain)
    assert run_id(load_run(make_run("other", negative_prompt=NEGATIVE))) != run_id(runs[0])
    assert {cost_key(run) for run in runs} == {cost_key(plain)}
    assert {protocol_hash(run) for run in runs} == {protocol_hash(plain)}
    references = plain.protocol.model_dump() | {"negative_prompt": "default"}
    of_protocol = load_run(make_run("protocol", protocol=references))
    assert protocol_hash(of_protocol) != protocol_hash(plain)
    assert run_id(of_protocol) != run_id(plain)
    embedded = resolve({"method": "dmd2", "negative_prompt": "default"})
    assert run_id(embedded) == run_id(resolve({"method": "dmd2"}))


@pytest.mark.parametrize("w", [1.0, 3.0])
def test_guidance_in_training_points_away_from_the_negative_prompt(w, make_run, tiny_wan):
    """v_neg + w (v_cond - v_neg), with the velocities of diffusers' own network."""
    run = build_from(make_run("run", negative_prompt=NEGATIVE, guidance_scale=w))
    batch = run.batch("student")
    x_t, sigma = batch.noise("x"), batch.sigma("s")
    negative = run.pipeline.encode_text([NEGATIVE])
    torch.testing.assert_close(run.nets.null_text, negative, rtol=0, atol=0)
    net = load_transformer(tiny_wan)
    with torch.no_grad():
        guided = (x_t - run.nets.teacher(x_t, sigma, batch.text)) / sigma[:, None, None, None, None]
        cond, away = (
            net(x_t, 1000 * sigma, text, return_dict=False)[0]
            for text in (batch.text, negative.expand_as(batch.text))
        )
    torch.testing.assert_close(guided, away + w * (cond - away), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(cond, away, rtol=1e-2)


def test_reference_clips_have_the_protocols_negative_prompt(make_run, tmp_path):
    """The teacher's reference clips and their ratios do not depend on the training's."""
    run = load_run(make_run("run", negative_prompt="a red circle"))
    protocol = run.protocol.model_dump() | {"negative_prompt": NEGATIVE}
    other = load_run(make_run("other", negative_prompt="a red circle", protocol=protocol))
    latents = []
    for config, text in ((run, ""), (other, NEGATIVE)):
        sampler = Sampler(config, tmp_path / "runs")
        expected = sampler.pipeline.encode_text([text])
        torch.testing.assert_close(sampler.texts.null_text, expected, rtol=0, atol=0)
        noise = torch.randn(2, *sampler.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            one_step = sampler.teacher_latents(teacher_sampling(config, 1))
            latents.append(one_step([noise], sampler.texts.rows([0, 1])))
    sigmas = teacher_sigmas(1, run.shift)
    assert sigmas[0] == 1
    assert not torch.allclose(*latents, rtol=1e-3)


def test_embed_makes_a_negative_prompt_available_without_a_text_encoder(tiny_wan, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n")
    bare = tmp_path / "bare"
    shutil.copytree(tiny_wan, bare, ignore=shutil.ignore_patterns("text_encoder"))
    embedding.embed(str(tiny_wan), [prompts], tmp_path)
    without = load_pipeline(str(bare), CPU, store=tmp_path)
    with pytest.raises(TeacherError, match="--negative-prompt"):
        without.texts(["a red circle"], negative_prompt=NEGATIVE)
    options = [str(tiny_wan), str(prompts), "--store", str(tmp_path)]
    with pytest.raises(ValueError, match=f"would be a text, .* write file:{prompts}"):
        embedding.embed(str(tiny_wan), [prompts], tmp_path, [str(prompts)])
    assert embedding.main([*options, "--negative-prompt", NEGATIVE]) == 0
    texts = without.texts(["a red circle"], negative_prompt=NEGATIVE)
    expected = load_pipeline(str(tiny_wan), CPU).encode_text([NEGATIVE])
    torch.testing.assert_close(texts.null_text, expected, rtol=0, atol=0)


def test_a_file_that_changed_after_the_run_was_resolved_stops_the_run(make_run, tmp_path):
    path = tmp_path / "negative.txt"
    path.write_text(NEGATIVE)
    config = load_run(make_run("run", negative_prompt=f"file:{path}"))
    path.write_text("a red circle")
    with pytest.raises(TeacherError, match=r"negative_prompt file:\S+ has changed"):
        pipeline_of(config, CPU, tmp_path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"negative_prompt": "file:none.txt"}, r"negative_prompt none.txt: No such file"),
        ({"negative_prompt": "empty.txt"}, r"a file has this name: write file:empty.txt for"),
        ({"protocol": {"negative_prompt": "empty.txt"}}, r"a file has this name: write file:empty"),
        ({"negative_prompt": "file:empty.txt"}, r"negative_prompt empty.txt: the file is empty"),
        ({"negative_prompt": None}, r"negative_prompt"),
        (
            {"teacher": "gaussian", "negative_prompt": "still"},
            r"^negative_prompt: a gaussian teacher knows only its own prompts",
        ),
        (
            {"teacher": "gaussian", "protocol": {"negative_prompt": "still"}},
            r"^protocol.negative_prompt: a gaussian teacher knows only its own prompts",
        ),
    ],
)
def test_an_impossible_negative_prompt_is_refused_in_one_line(keys, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text(" \n")
    with pytest.raises(ConfigError, match=message) as caught:
        resolve({"method": "dmd2"} | keys)
    assert "\n" not in str(caught.value)


def test_a_closed_form_takes_the_published_prompt_which_is_empty():
    plain = resolve({"method": "dmd2", "teacher": "gaussian"})
    published = resolve({"method": "dmd2", "teacher": "gaussian", "negative_prompt": "default"})
    assert run_id(plain) == run_id(published)
