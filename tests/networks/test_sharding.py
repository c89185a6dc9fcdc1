"""Sharding: two ranks that share the weights of every role (FSDP2, gloo) train like one process."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pipelines
import pytest
from diffusers import WanTransformer3DModel
from network_variants import ON_FEATURES
from safetensors.torch import load_file

from distill_bench.config.resolve import load_run
from distill_bench.plan.memory import predicted
from distill_bench.registry import methods
from distill_bench.store.files import read_json, read_jsonl
from distill_bench.testing import tiny
from distill_bench.testing.runs import Runs
from distill_bench.train import checkpoint
from distill_bench.train.loop import train

pytestmark = pytest.mark.slow

WITH_R1 = {"name": "dmd2", "preset": "fastgen", "r1_weight": 1.0}
METHODS = {str(method): method for method in [*methods(), ON_FEATURES, WITH_R1]}
# sid's student loss is differentiated through the teacher, whose experts the ranks choose apart
OTHER_ARCHITECTURES = {"cogvideox": ON_FEATURES, "ltx": ON_FEATURES, "wan22-a14b": "sid"}
FIELDS = {
    "student_updates": 2,
    "fake_score_updates": 1,
    "exit_step": "last",
    "gradient_checkpointing": True,
    "signals_every": 2,
    "checkpoint_every": 2,
}
RESUMED = {
    "student_updates": 3,
    "fake_score_updates": 2,
    "fake_score_rollouts": "batched",
    "precision": "float64",
    "signals_every": None,
    "sharding": True,
}
LOW = {"precision": "bfloat16", "weights": "bfloat16", "signals_every": None}
PEAKS = {"float32": {"signals_every": None}, "bfloat16": LOW}
# The allocator maps each large buffer separately, so that mapped bytes can be counted.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"}


def make_method_runs(folder: Path) -> dict[str, Path]:
    """One run per method for one process, and one for two ranks."""
    return {
        f"{ranks} {name}": Runs(method, folder, f"{index}-{ranks}").make(**FIELDS, sharding=True)
        for index, (name, method) in enumerate(METHODS.items())
        for ranks in ("one", "two")
    }


def make_architecture_runs(folder: Path) -> dict[str, Path]:
    """Methods on teachers of other classes; two ranks also offload the teacher."""
    runs = {}
    for teacher, method in OTHER_ARCHITECTURES.items():
        pipelines.save(teacher, folder / teacher)
        frames, height, width = pipelines.SIZES[teacher]
        size = {"frames": frames, "height": height, "width": width}
        fields = {"teacher": str(folder / teacher), "data": None} | size
        for ranks in ("one", "two"):
            maker = Runs(method, folder, f"{teacher}-{ranks}", fields)
            runs[f"{ranks} {teacher}"] = maker.make(
                **FIELDS, sharding=True, teacher_offload=ranks == "two"
            )
    return runs


def make_wide_runs(folder: Path) -> dict[str, Path]:
    """A network large enough for its buffers to be counted, in each precision."""
    tiny.tiny_pipeline(folder)
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
    ).save_pretrained(folder / "transformer")
    return {
        f"peak {name}": Runs("sgmd", folder.parent, f"peak-{name}", {"teacher": str(folder)}).make(
            **FIELDS | fields, sharding=True
        )
        for name, fields in PEAKS.items()
    }


def train_on_two_ranks(arguments: list[str]) -> None:
    """Train run folders one after the other on two ranks; `FOLDER:stop` stops after one update."""
    script = Path(__file__).parent / "sharded.py"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, *launch, str(script), *arguments],
        env=os.environ | ALLOCATOR | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Path]:
    """Trained run folders by name.

    One launch trains everything that needs two ranks, since starting ranks takes seconds.
    """
    folder = tmp_path_factory.mktemp("sharding")
    pairs = make_method_runs(folder) | make_architecture_runs(folder)
    low = {
        f"low {sharding}": Runs("sgmd", folder, f"low-{sharding}").make(
            **FIELDS | LOW, sharding=sharding
        )
        for sharding in (True, False)
    }
    resumed = {
        name: Runs(ON_FEATURES, folder, name.replace(" ", "-")).make(**RESUMED)
        for name in ("whole", "two then one", "one then two")
    }
    wide = make_wide_runs(folder / "wide")
    train(resumed["whole"])
    assert train(resumed["one then two"], stop=lambda: True)["status"] == "stopped"
    on_two = [run for name, run in pairs.items() if name.startswith("two ")]
    on_two += [*low.values(), *wide.values(), resumed["one then two"]]
    train_on_two_ranks([*map(str, on_two), f"{resumed['two then one']}:stop"])
    assert train(resumed["two then one"])["status"] == "done"
    for name, run in pairs.items():
        if name.startswith("one "):
            train(run)
    return pairs | low | resumed | wide


@pytest.mark.parametrize("name", [*METHODS, *OTHER_ARCHITECTURES])
def test_two_ranks_have_the_losses_of_one_process(name, trained):
    one, two = (read_jsonl(trained[f"{ranks} {name}"] / "train.jsonl") for ranks in ("one", "two"))
    for alone, shared in zip(one, two, strict=True):
        assert alone.keys() == shared.keys()
        for key in alone.keys() & {"student_loss", "fake_score_loss", "x0_std"}:
            assert math.isclose(alone[key], shared[key], rel_tol=1e-6, abs_tol=1e-6), key
        assert alone["cost_forward_equivalents"] == shared["cost_forward_equivalents"]
    norms = [key for key in one[-1] if key.startswith("x0_gradient_norm/")]
    assert norms
    assert all(math.isclose(one[-1][key], two[-1][key], rel_tol=1e-4) for key in norms)


@pytest.mark.parametrize("name", ["dmd2", "consistency", "ida"])
def test_each_rank_holds_half_of_every_role(name, trained):
    shares = read_json(trained[f"two {name}"] / "held.json")["shares"]
    assert {"student", "teacher", "moving average"} <= shares.keys()
    assert all(0.45 < share < 0.65 for share in shares.values()), shares


@pytest.mark.parametrize("name", ["two then one", "one then two"])
def test_a_checkpoint_resumes_with_another_number_of_ranks(name, trained):
    newest, whole = (checkpoint.folders(trained[run])[-1] for run in (name, "whole"))
    for file in ("weights.safetensors", "optimisers.safetensors"):
        resumed, expected = load_file(newest / file), load_file(whole / file)
        assert resumed.keys() == expected.keys()
        for key in expected:
            assert float((expected[key] - resumed[key]).abs().max()) < 1e-9, (file, key)
    kept, expected = (load_file(checkpoint.students(trained[run])[3]) for run in (name, "whole"))
    assert all(float((expected[key] - kept[key]).abs().max()) < 1e-6 for key in expected)


def test_shards_are_the_masters_of_weights_gathered_in_bfloat16(trained):
    """Forwards agree, because norms are gathered in float32; gradients round differently."""
    shared, replicated = (
        read_jsonl(trained[f"low {sharding}"] / "train.jsonl") for sharding in (True, False)
    )
    first, expected = shared[0], replicated[0]
    assert math.isclose(first["student_loss"], expected["student_loss"], rel_tol=1e-6)
    assert math.isclose(first["student_grad_norm"], expected["student_grad_norm"], rel_tol=1e-3)
    for line, other in zip(shared, replicated, strict=True):
        assert math.isclose(line["fake_score_loss"], other["fake_score_loss"], rel_tol=0.02)
    saved = load_file(checkpoint.folders(trained["low True"])[-1] / "weights.safetensors")
    assert all(value.is_floating_point() and value.element_size() == 4 for value in saved.values())


@pytest.mark.parametrize("name", ["two sgmd", "low True"])
def test_the_bytes_that_a_rank_holds_are_predicted(name, trained):
    held = read_json(trained[name] / "held.json")["bytes"]
    prediction = predicted(load_run(trained[name]), processes=2)
    for role in ("student", "fake_score", "teacher"):
        expected = prediction.weights[role] + prediction.masters.get(role, 0)
        assert held[role] == pytest.approx(expected, rel=0.1), role


@pytest.mark.parametrize("name", PEAKS)
def test_the_peak_of_a_rank_is_predicted(name, trained):
    run = trained[f"peak {name}"]
    prediction = predicted(load_run(run), processes=2)
    added = json.loads((run / "peak.json").read_text())
    assert prediction.peak == pytest.approx(prediction.held + added, rel=0.05)
