"""Predicted memory against measurements by torch's profiler on a CPU, on small transformers."""

import gc
import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pipelines
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel, WanTransformer3DModel
from torch.profiler import ProfilerActivity, profile

from distill_bench.config.resolve import resolve
from distill_bench.config.sweep_file import load_sweep
from distill_bench.config.yaml_files import dump_yaml
from distill_bench.networks.offload import Streamed
from distill_bench.networks.pipeline import DiffusersPipeline
from distill_bench.networks.text_pipeline import load_texts
from distill_bench.plan import command, memory, outline, prediction, sampling
from distill_bench.plan.cost import step_flops
from distill_bench.plan.memory import predicted
from distill_bench.plan.too_large import gib, too_large, too_large_to_sample
from distill_bench.registry import methods
from distill_bench.sample.sampler import Sampler
from distill_bench.teachers.contents import read_config
from distill_bench.teachers.folder import is_outline, outlines, teacher_folder
from distill_bench.testing import tiny
from distill_bench.train.loop import update
from distill_bench.train.setup import build_from

BASE = {
    "method": "dmd2",
    "batch_size": 2,
    "nfe": 2,
    "frames": 9,
    "height": 128,
    "width": 128,
    "trackers": [],
    "signals_every": None,
}
SETTINGS = {
    "as it is": {},
    "checkpointed": {"gradient_checkpointing": True, "method": "sgmd"},
    "sequential, offloaded": {
        "guidance_forwards": "sequential",
        "teacher_offload": True,
        "gradient_checkpointing": True,
    },
    "adapters": {"adapter": {"rank": 4}, "gradient_checkpointing": True},
    "one graph": {"method": {"name": "sgmd", "preset": "paper"}},
    "batched rollouts": {
        "fake_score_rollouts": "batched",
        "fake_score_updates": 8,
        "reuse_rollout": True,
        "gradient_checkpointing": True,
        "guidance_scale": 1.0,
    },
    "accumulated": {
        "accumulation": 2,
        "ema": None,
        "method": "tsg_fisher",
        "gradient_checkpointing": True,
    },
}
# settings on other teachers than `small_wan`
ON_OTHERS = {
    "cogvideox": "small_cogvideox",
    "experts, sequential, offloaded": "small_experts",
}


@pytest.fixture(scope="module")
def small_wan(tmp_path_factory) -> Path:
    """A pipeline that is mostly transformer: 6 blocks of width 96, 192 tokens per clip."""
    folder = tmp_path_factory.mktemp("pipelines") / "small-wan"
    tiny.tiny_pipeline(folder)
    WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=384,
        num_layers=6,
        rope_max_seq_len=32,
    ).save_pretrained(folder / "transformer")
    return folder


def alive() -> dict[int, int]:
    """Bytes of every live tensor storage in this process."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inspecting every object triggers deprecation warnings
        tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]
    storages = [t.untyped_storage() for t in tensors]
    # traces that torch.compile keeps hold tensors of symbolic size
    return {s._cdata: s.nbytes() for s in storages if isinstance(s.nbytes(), int)}


def measured(run: Path, trace: Path) -> tuple[int, int]:
    """Bytes that training holds between updates, and peak bytes that one update adds.

    The first number is the sum over all live tensors, the second comes from torch's profiler.
    """
    before = sum(alive().values())
    built = build_from(run)
    update(built)
    held = sum(alive().values()) - before
    return held, peak_allocated(lambda: update(built), trace)


def peak_allocated(do: Callable[[], object], trace: Path) -> int:
    """Peak bytes that torch's allocator hands out during a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        do()
    profiler.export_chrome_trace(str(trace))
    events = [
        e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"
    ]
    events.sort(key=lambda e: e["ts"])
    began = events[0]["args"]["Total Allocated"] - events[0]["args"]["Bytes"]
    return max(e["args"]["Total Allocated"] for e in events) - began


@pytest.fixture(scope="module")
def small_cogvideox(tmp_path_factory) -> Path:
    """A pipeline of CogVideoX-2b's classes with 6 blocks of width 96, 192 tokens per clip."""
    folder = tmp_path_factory.mktemp("pipelines") / "cogvideox-2b"
    pipelines.save("cogvideox-2b", folder)
    like = {
        key: value
        for key, value in read_config(folder / "transformer").items()
        if not key.startswith("_")
    }
    like |= {"num_attention_heads": 4, "attention_head_dim": 24, "num_layers": 6}
    CogVideoXTransformer3DModel(**like).save_pretrained(folder / "transformer")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", pipelines.SIZES)
def test_every_architecture_is_rehearsed_with_its_own_texts(name, tmp_path):
    pipelines.save(name, tmp_path / name)
    frames, height, width = pipelines.SIZES[name]
    fields = {"teacher": str(tmp_path / name), "frames": frames, "height": height, "width": width}
    config = resolve(BASE | fields)
    estimate = predicted(config)
    text = load_texts(config.teacher, torch.device("cpu")).encode_text(["a red circle"])
    assert estimate.activations["student"] > 0 and estimate.flops["student"] > 0
    assert outline.outline(config).encode_text([""]).shape == text.shape


@pytest.fixture(scope="module")
def small_experts(tmp_path_factory, small_wan) -> Path:
    """The small Wan pipeline with a second expert."""
    folder = tmp_path_factory.mktemp("pipelines") / "small-experts"
    pipelines.add_expert(Path(shutil.copytree(small_wan, folder)))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SETTINGS, *ON_OTHERS])
def test_the_predicted_peak_is_the_measured_one(name, request, tmp_path):
    run = tmp_path / "runs" / "run"
    run.mkdir(parents=True)
    config = resolve(
        BASE
        | {"teacher": str(request.getfixturevalue(ON_OTHERS.get(name, "small_wan")))}
        | SETTINGS.get(name.removeprefix("experts, "), {})
    )
    (run / "run.yaml").write_text(dump_yaml(config.model_dump(mode="json")))
    estimate, (held, most) = predicted(config), measured(run, tmp_path / "trace.json")
    # on a CPU, an offloaded teacher is in the same memory
    assert estimate.held + estimate.held_back == pytest.approx(held, rel=0.05)
    assert estimate.peak + estimate.held_back == pytest.approx(held + most, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [{}, {"protocol": {"precision": "bfloat16", "clips": 8}}, {"teacher_offload": True}],
    ids=str,
)
def test_the_predicted_peak_of_drawing_clips_is_the_measured_one(
    fields, small_wan, tmp_path, monkeypatch
):
    """Without the autoencoder, whose convolutions allocate extra buffers on a CPU."""
    monkeypatch.setattr(DiffusersPipeline, "decode", lambda self, latents: latents)
    config = resolve(BASE | {"teacher": str(small_wan), "protocol": {"clips": 8}} | fields)
    sampler = Sampler(config, tmp_path)
    nets = {"teacher": sampler.teacher_net, "student": sampler.placed(sampler.pipeline.student())}
    rows = {
        "teacher": sampler.teacher(2, sampler.seeds),
        "student": sampler.student(nets["student"]),
    }
    needs = []
    for role, row in rows.items():
        held = sum(
            t.nbytes
            for net in (nets[role], sampler.pipeline.vae)
            for t in net.state_dict().values()
        )
        streamed = [block for block in nets[role].modules() if isinstance(block, Streamed)]
        held -= sum(t.nbytes for block in streamed for t in block.state_dict().values())
        needs.append(
            held + peak_allocated(lambda row=row: row.frames(0, 8), tmp_path / "trace.json")
        )
    assert memory.sampling_peak(config) == pytest.approx(max(needs), rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan22", "cogvideox-2b", "ltx"])
def test_decoding_many_frames_is_predicted_from_few(name, tmp_path, monkeypatch):
    pipelines.save(name, tmp_path / name)
    _, height, width = pipelines.SIZES[name]
    config = resolve(
        BASE | {"teacher": str(tmp_path / name), "frames": 33, "height": height, "width": width}
    )
    estimate = memory.sampling_peak(config)
    monkeypatch.setattr(sampling, "FEW_FRAMES", (0, 100))
    assert estimate == pytest.approx(memory.sampling_peak(config), rel=0.1)


@pytest.mark.slow
def test_a_large_teacher_is_predicted_from_few_blocks(small_wan, tmp_path):
    """Every stage agrees with all blocks rehearsed, since more blocks may move the peak."""
    folders = {
        name: Path(shutil.copytree(small_wan, tmp_path / name)) for name in ("teacher", "student")
    }
    like = json.loads((small_wan / "transformer" / "config.json").read_text())
    for name, blocks in {"teacher": 10, "student": 5}.items():
        WanTransformer3DModel.from_config(like | {"num_layers": blocks}).save_pretrained(
            folders[name] / "transformer"
        )
    fields = {"method": "sgmd", "nfe": 1, "gradient_checkpointing": True, "teacher_offload": True}
    config = resolve(BASE | fields | {name: str(folder) for name, folder in folders.items()})
    estimate, (whole, _) = predicted(config), memory.rehearsed(config, (10, 5), 1)
    assert estimate.held_back == whole.held_back and estimate.held == whole.held
    for role, stages in whole.stages.items():
        assert estimate.stages[role] == pytest.approx(stages, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("method", methods())
def test_every_method_is_rehearsed_without_its_data(method, tiny_wan):
    estimate = predicted(
        resolve(
            BASE
            | {
                "teacher": str(tiny_wan),
                "method": method,
                "nfe": 2,  # dp_dmd trains from the second step on
                "frames": 5,
                "height": 16,
                "width": 16,
            }
        )
    )
    assert estimate.activations["student"] > 0 and estimate.flops["student"] > 0
    assert ("fake_score" in estimate.weights) == (method != "consistency")


@pytest.mark.slow
def test_each_setting_saves_its_part_of_the_memory(small_wan):
    def at(**fields) -> prediction.Prediction:
        return predicted(resolve(BASE | {"teacher": str(small_wan), "nfe": 1} | fields))

    plain = at()
    low = at(precision="bfloat16", weights="bfloat16")
    saving = at(gradient_checkpointing=True)
    assert low.weights["teacher"] < 0.6 * plain.weights["teacher"] and low.moments == plain.moments
    assert low.masters["student"] > 0.9 * plain.weights["student"] and plain.masters["student"] == 0
    assert saving.activations["student"] < 0.6 * plain.activations["student"]
    configs = [
        resolve(BASE | {"teacher": str(small_wan), "nfe": 1, "gradient_checkpointing": on})
        for on in (True, False)
    ]
    needed, recomputed = step_flops(saving.flops, configs[0])
    assert recomputed > 0
    assert step_flops(plain.flops, configs[1]) == (needed, 0)
    adapted = at(adapter={"rank": 4})
    assert (
        adapted.held < 0.3 * plain.held
        and adapted.weights["teacher"] > 0.9 * plain.weights["teacher"]
    )
    halved = predicted(
        resolve(BASE | {"teacher": str(small_wan), "nfe": 1, "sharding": True}), processes=2
    )
    assert (
        halved.moments["student"] == -(-plain.moments["student"] // 2) and halved.peak < plain.peak
    )


@pytest.mark.slow
def test_too_little_memory_is_one_line_with_the_need_and_settings_to_try(tiny_wan):
    config = resolve(
        BASE
        | {
            "teacher": str(tiny_wan),
            "frames": 5,
            "height": 16,
            "width": 16,
            "gradient_checkpointing": True,
        }
    )
    estimate = predicted(config)
    assert too_large(estimate, estimate.peak, config) is None
    line = too_large(estimate, estimate.peak - 1, config)
    assert (
        gib(estimate.peak) in line
        and "adapter: {rank: 32}" in line
        and "accumulation above 1" in line
    )
    assert "gradient_checkpointing" not in line and "\n" not in line
    line = too_large_to_sample(2**30, 2**29, config)
    assert (
        "sampling needs 1 GiB on a device of 0.5 GiB; "
        "set protocol.precision: bfloat16, or teacher_offload" in line
    )
    assert too_large_to_sample(2**30, 2**30, config) is None


def test_the_sweep_at_size_resolves_by_the_teachers_configs_alone():
    path = Path(__file__).parents[2] / "sweeps" / "wan2.1_1.3b_fake_score_freq.yaml"
    with outlines():
        sweep = load_sweep(path)
        runs = sweep.expand()
        assert is_outline(teacher_folder(runs[0].teacher))
    rows = {(r.method["name"], r.fake_score_updates, r.fake_score_lr) for r in runs}
    assert {
        ("dmd2", 5, 4e-7),
        ("dmd2", 1, 4e-7),
        ("dmd2", 1, 2e-6),
        ("tsg_fisher", 5, 4e-7),
        ("sgmd", 1, 4e-7),
    } == rows
    assert len(runs) == 7 * sweep.seeds and not {"ida", "dp_dmd"} & {r.method["name"] for r in runs}
    # 16 channels of 21 x 60 x 104, with 1.3 billion weights: the shape that the published models
    # have
    with outlines():
        net = outline.outline(runs[0], layers=(1, 1))
    assert net.latent_shape(81, 480, 832) == (16, 21, 60, 104)


@pytest.mark.slow
def test_the_command_prints_memory_by_role(tiny_wan, tmp_path, capsys):
    path = tmp_path / "sweep.yaml"
    cells = "grid: {fake_score_updates: [1, 5, 9], fake_score_rollouts: [sequential, batched]}"
    path.write_text(
        "question: q\n"
        f"base: {{method: dmd2, frames: 5, height: 16, width: 16, teacher: {tiny_wan}}}\n"
        f"{cells}\n"
    )
    assert command.main([str(path), "--memory", "--set", "batch_size=2"]) == 0
    out = capsys.readouterr().out
    assert (
        "5 frames of 16x16, batch 2 on 1 processes" in out and "dmd2 x1" in out and "dmd2 x5" in out
    )
    rollouts = [float(size) for size in re.findall(r"rollouts: ([\d.e-]+)", out)]
    assert len(rollouts) == 2 and rollouts[0] < rollouts[1]  # of x5 and x9
