"""The training loop on a tiny pipeline of Wan's real classes."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from runs import assert_same_weights, weights

from distill_bench.sample.run import sample
from distill_bench.train import checkpoint
from distill_bench.train.loop import train
from distill_bench.train.setup import build_from


@pytest.mark.slow
def test_a_terminated_training_saves_a_checkpoint_first(make_run):
    run = make_run("terminated", student_updates=100_000, checkpoint_every=100_000, method="dmd2")
    worker = subprocess.Popen(
        [sys.executable, "-m", "distill_bench.train", str(run)], stdout=subprocess.PIPE, text=True
    )
    assert worker.stdout.readline().startswith("student update ")
    worker.terminate()
    last_line = worker.communicate()[0].splitlines()[-1]
    (saved,) = checkpoint.folders(run)
    assert worker.returncode == 0
    assert last_line == f"stopped after {saved.name} student updates"


@pytest.mark.parametrize("method", ["dmd", "dmd2", "sgmd"])
def test_wan_trains_two_updates_and_samples(method, make_run):
    run = make_run(method, method=method)
    summary = train(run)
    assert summary["status"] == "done"
    assert summary["student_updates"] == 2
    lines = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    assert [line["student_updates"] for line in lines] == [1, 2]
    assert all(np.isfinite(v) for line in lines for v in line.values())
    clips = np.load(sample(run)[-1] / "clips.npy")
    assert clips.shape == (2, 5, 3, 16, 16)
    assert clips.dtype == np.uint8
    assert clips.std() > 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dmd2", "sgmd"])
def test_a_run_stopped_and_resumed_ends_in_the_same_bits(method, make_run):
    whole, parts = make_run("whole", method=method), make_run("parts", method=method)
    train(whole)
    assert train(parts, stop=lambda: True)["status"] == "stopped"
    resumed = train(parts)
    assert resumed["status"] == "done"
    assert_same_weights(whole, parts)
    assert resumed["cost"] == json.loads((whole / "train.json").read_text())["cost"]
    assert len((parts / "train.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated", "one bit", "no state"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(damage, make_run, capsys):
    whole, torn = make_run("whole", student_updates=3), make_run("torn", student_updates=3)
    train(whole)
    stops = iter([False, True])
    train(torn, stop=lambda: next(stops))
    newest = checkpoint.folders(torn)[-1]
    path = newest / ("state.json" if damage == "no state" else "weights.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes({"truncated": data[:1000], "one bit": data, "no state": b"{"}[damage])
    train(torn)
    assert "set aside" in capsys.readouterr().err
    assert newest.with_name("2.corrupt").is_dir()
    assert_same_weights(whole, torn)


def test_accumulation_does_not_change_the_gradient(make_run):
    whole = make_run("whole", student_updates=1)
    parts = make_run("parts", student_updates=1, accumulation=4)
    train(whole)
    train(parts)
    first, second = weights(whole), weights(parts)
    close = [torch.allclose(first[k], second[k], atol=3e-6) for k in first]
    # With beta1 = 0, Adam's first step is lr * sign(gradient). The sign may flip where rounding
    # dominates the gradient.
    assert np.mean(close) > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("fake_score_updates", [1, 2, 5])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_ledger_equals_the_count_by_hand(fake_score_updates, accumulation, make_run):
    """methods.md 1.12 with R = nfe = 2 (exit at the last step); a guided teacher has 2 forwards."""
    k, nfe = fake_score_updates, 2
    common = {
        "student_updates": 1,
        "exit_step": "last",
        "fake_score_updates": k,
        "accumulation": accumulation,
    }
    cost = train(make_run("dmd2", method="dmd2", **common))["cost"]
    assert cost == {
        "student": {"forward": nfe * (1 + k), "input_backward": 0, "full_backward": 1},
        "fake_score": {"forward": 1 + k, "input_backward": 0, "full_backward": k},
        "teacher": {"forward": 2, "input_backward": 0, "full_backward": 0},
    }
    shared = train(make_run("sgmd", method="sgmd", reuse_rollout=True, **common))
    assert shared["cost"] == {
        "student": {"forward": nfe * k, "input_backward": 0, "full_backward": 1},
        "fake_score": {"forward": 1 + k, "input_backward": 1, "full_backward": k},
        "teacher": {"forward": 2, "input_backward": 0, "full_backward": 0},
    }
    assert shared["cost_forward_equivalents"] == pytest.approx(nfe * k + 2 + 1 + k + 1 + 2 * k + 2)


def test_a_phase_trains_its_own_role_alone(make_run):
    run = build_from(make_run("run", method="sgmd"))
    nets = run.networks
    before = {role: [p.detach().clone() for p in net.parameters()] for role, net in nets.items()}

    def moved(role: str) -> bool:
        return any(
            not torch.equal(p, q)
            for p, q in zip(nets[role].parameters(), before[role], strict=True)
        )

    run.update_student()
    assert moved("student")
    assert not moved("fake_score")
    assert all(p.grad is None for p in nets["fake_score"].parameters())
    before["student"] = [p.detach().clone() for p in nets["student"].parameters()]
    run.update_fake_score(0)
    assert moved("fake_score")
    assert not moved("student")


def test_a_diverged_run_is_recorded_as_collapsed(make_run):
    run = make_run("hot", student_lr=1e6, student_updates=20)
    summary = train(run)
    assert summary["status"] == "collapsed"
    assert "student update" in summary["reason"]
    assert train(run) == json.loads((run / "train.json").read_text()), "it is not trained again"


@pytest.mark.slow
def test_equal_seeds_give_equal_weights_and_other_seeds_other_weights(make_run):
    first, repeated, other = make_run("a"), make_run("b"), make_run("c", seed=1)
    for run in (first, repeated, other):
        train(run)
    assert_same_weights(first, repeated)
    pairs = zip(weights(first).values(), weights(other).values(), strict=True)
    assert any(not torch.equal(x, y) for x, y in pairs)
