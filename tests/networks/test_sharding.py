"""Two processes that share every role's weights (FSDP2, gloo) train as one process does, for every method."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pipelines
import pytest
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from distill_bench.config.resolve import load_run
from distill_bench.plan.memory import predicted
from distill_bench.registry import methods
from distill_bench.testing import tiny
from distill_bench.testing.runs import Runs
from distill_bench.train import checkpoint
from distill_bench.train.loop import train

pytestmark = pytest.mark.slow

ON_FEATURES = [
    {"name": "dmd2", "preset": "paper"},
    {"name": "dmd2", "preset": "fastgen", "r1_weight": 1.0},
]
METHODS = {str(m): m for m in [*methods(), *ON_FEATURES]}
OTHERS = ("cogvideox", "ltx")  # teachers of other classes
FIELDS = {
    "student_updates": 2,
    "fake_score_updates": 1,
    "exit_step": "last",
    "gradient_checkpointing": True,
    "signals_every": 2,
    "checkpoint_every": 2,
}
PEAKS = {"float32": {}, "bfloat16": {"precision": "bfloat16", "weights": "bfloat16"}}
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_MMAP_MAX_": "1000000",
}  # what is large is mapped by itself, and counted
RESUMED = {
    "student_updates": 3,
    "fake_score_updates": 1,
    "precision": "float64",
    "signals_every": None,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Path]:
    """Run folders by name: each method trained by one and by two processes, and runs that changed between the two."""
    folder = tmp_path_factory.mktemp("sharding")
    runs = {}
    for at, (name, method) in enumerate(METHODS.items()):
        for ranks in ("one", "two"):
            runs[f"{ranks} {name}"] = Runs(method, folder, f"{at}-{ranks}").make(
                **FIELDS, sharding=True
            )
    for teacher in OTHERS:
        pipelines.save(teacher, folder / teacher)
        frames, height, width = pipelines.SIZES[teacher]
        fields = {
            "teacher": str(folder / teacher),
            "data": None,
            "frames": frames,
            "height": height,
            "width": width,
        }
        for ranks in ("one", "two"):
            made = Runs(ON_FEATURES[0], folder, f"{teacher}-{ranks}", fields)
            runs[f"{ranks} {teacher}"] = made.make(
                **FIELDS, sharding=True, teacher_offload=ranks == "two"
            )
    for name in ("whole", "two then one", "one then two"):
        fields = RESUMED | {"sharding": True}
        runs[name] = Runs(ON_FEATURES[0], folder, name.replace(" ", "-")).make(**fields)
    low = FIELDS | {"precision": "bfloat16", "weights": "bfloat16", "signals_every": None}
    for sharding in (True, False):
        runs[f"low {sharding}"] = Runs("sgmd", folder, f"low-{sharding}").make(
            **low, sharding=sharding
        )
    wide = folder / "wide"
    tiny.tiny_pipeline(wide)
    WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=1024,
        num_layers=4,
        rope_max_seq_len=32,
    ).save_pretrained(wide / "transformer")
    for name, fields in PEAKS.items():
        made = Runs("sgmd", folder, f"peak-{name}", {"teacher": str(wide)})
        runs[f"peak {name}"] = made.make(
            **FIELDS | {"signals_every": None, "sharding": True} | fields
        )
    train(runs["whole"])
    assert train(runs["one then two"], stop=lambda: True)["status"] == "stopped"
    two = [
        str(path)
        for name, path in runs.items()
        if name.startswith(("two ", "low ", "peak ")) and name != "two then one"
    ]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    done = subprocess.run(
        [
            *launch,
            str(Path(__file__).parent / "sharded.py"),
            *two,
            f"{runs['two then one']}:stop",
            str(runs["one then two"]),
        ],
        env=os.environ
        | ALLOCATOR
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert train(runs["two then one"])["status"] == "done"
    for name, path in runs.items():
        if name.startswith("one ") and name != "one then two":
            train(path)
    return runs


@pytest.mark.parametrize("name", [*METHODS, *OTHERS])
def test_the_losses_of_two_processes_are_those_of_one(name, trained):
    one, two = (
        [json.loads(line) for line in (trained[f"{n} {name}"] / "train.jsonl").open()]
        for n in ("one", "two")
    )
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() & {"student_loss", "fake_score_loss", "x0_std"}:
            assert math.isclose(a[key], b[key], rel_tol=1e-6, abs_tol=1e-6), (key, a[key], b[key])
        assert a["cost_forward_equivalents"] == b["cost_forward_equivalents"]
    norms = [key for key in one[-1] if key.startswith("x0_gradient_norm/")]
    assert norms and all(math.isclose(one[-1][key], two[-1][key], rel_tol=1e-4) for key in norms)


@pytest.mark.parametrize("name", ["dmd2", "consistency", "ida"])
def test_each_process_holds_a_share_of_every_role(name, trained):
    held = json.loads((trained[f"two {name}"] / "held.json").read_text())["shares"]
    assert {"student", "teacher", "moving average"} <= held.keys()
    assert all(0.45 < share < 0.65 for share in held.values()), held


@pytest.mark.parametrize("name", ["two then one", "one then two"])
def test_a_checkpoint_goes_on_with_another_number_of_processes(name, trained):
    files = ["weights.safetensors", "optimisers.safetensors"]
    for file in files:
        whole, other = (load_file(checkpoint.found(trained[n])[-1] / file) for n in ("whole", name))
        assert whole.keys() == other.keys()
        for key in whole:
            assert float((whole[key] - other[key]).abs().max()) < 1e-9, (file, key)
    kept, other = (load_file(checkpoint.students(trained[n])[3]) for n in ("whole", name))
    assert all(float((kept[key] - other[key]).abs().max()) < 1e-6 for key in kept)


def test_shards_are_the_masters_of_weights_that_are_gathered_in_bfloat16(trained):
    shared, each = (
        [json.loads(line) for line in (trained[f"low {s}"] / "train.jsonl").open()]
        for s in (True, False)
    )
    # forwards are alike: norms are gathered in float32. Of the gradients some are rounded to bfloat16 in one and not in the other
    assert math.isclose(shared[0]["student_loss"], each[0]["student_loss"], rel_tol=1e-6)
    assert math.isclose(shared[0]["student_grad_norm"], each[0]["student_grad_norm"], rel_tol=1e-3)
    for a, b in zip(shared, each, strict=True):
        assert math.isclose(a["fake_score_loss"], b["fake_score_loss"], rel_tol=0.02)
    saved = load_file(checkpoint.found(trained["low True"])[-1] / "weights.safetensors")
    assert all(value.is_floating_point() and value.element_size() == 4 for value in saved.values())


@pytest.mark.parametrize("name", ["two sgmd", "low True"])
def test_what_each_process_holds_was_predicted(name, trained):
    held = json.loads((trained[name] / "held.json").read_text())["bytes"]
    found = predicted(load_run(trained[name]), processes=2)
    for role in ("student", "fake_score", "teacher"):
        assert held[role] == pytest.approx(
            found.weights[role] + found.masters.get(role, 0), rel=0.1
        ), role


@pytest.mark.parametrize("name", PEAKS)
def test_the_peak_of_a_process_was_predicted(name, trained):
    added = json.loads((trained[f"peak {name}"] / "peak.json").read_text())
    found = predicted(load_run(trained[f"peak {name}"]), processes=2)
    assert found.peak == pytest.approx(found.held + added, rel=0.05)
