"""Student and fake score as low-rank adapters of the teacher's weights."""

import numpy as np
import pytest
import torch
from network_variants import ADAPTER, ON_FEATURES, SHARED_GRAPH, largest_difference
from runs import weights
from safetensors.torch import load_file

from distill_bench.config.errors import ConfigError
from distill_bench.config.resolve import load_run
from distill_bench.config.schema import AdapterConfig
from distill_bench.networks.adapters import activate, add_adapter, merge_adapter
from distill_bench.networks.denoiser import Denoiser
from distill_bench.networks.ledger import Ledger
from distill_bench.networks.pipeline import load_transformer
from distill_bench.sample.run import sample
from distill_bench.testing import checks
from distill_bench.testing.runs import Runs
from distill_bench.train import checkpoint
from distill_bench.train.loop import train
from distill_bench.train.records import Records
from distill_bench.train.setup import build_from


def test_all_roles_share_one_base_and_train_only_their_own_adapter(make_run):
    """Two blocks, rank 2: q and v of two attentions (24 x 24), one feed-forward layer (32 x 24)."""
    trainer = build_from(make_run("lora", adapter=ADAPTER, method="sgmd"))
    views = [
        trainer.networks["student"],
        trainer.networks["fake_score"],
        trainer.nets.unguided_teacher.net,
    ]
    assert len({id(view.net) for view in views}) == 1
    size = 2 * (4 * 2 * (24 + 24) + 2 * (32 + 24))
    for role in ("student", "fake_score"):
        groups = trainer.optimisers[role].param_groups
        assert sum(p.numel() for p in trainer.networks[role].parameters()) == size
        assert sum(p.numel() for group in groups for p in group["params"]) == size


def test_training_adapters_leaves_the_teacher_unchanged(make_run, tiny_wan):
    trainer = build_from(make_run("lora", adapter=ADAPTER, student_lr=0.1))
    batch = trainer.batch("student")
    inputs = batch.noise("x"), batch.sigma("s"), batch.text
    for _ in range(2):
        trainer.update_student()
        trainer.update_fake_score(0)
    original = Denoiser(load_transformer(tiny_wan), "teacher", Ledger(1))
    with torch.no_grad():
        expected = original(*inputs)
        assert torch.equal(trainer.nets.unguided_teacher(*inputs), expected)
        student, fake_score = trainer.nets.student(*inputs), trainer.nets.fake_score(*inputs)
    assert not torch.allclose(student, expected)
    assert not torch.allclose(student, fake_score)


def test_a_merged_adapter_gives_plain_layers_with_the_students_predictions(make_run):
    trainer = build_from(make_run("lora", adapter=ADAPTER, student_lr=0.1))
    batch = trainer.batch("student")
    inputs = batch.noise("x"), batch.sigma("s"), batch.text
    trainer.update_student()
    with torch.no_grad():
        student = trainer.nets.student(*inputs)
        base = trainer.networks["student"].net
        activate(base, ["student"])
        merged = Denoiser(merge_adapter(base), "student", Ledger(1))(*inputs)
    assert "lora" not in " ".join(base.state_dict())
    torch.testing.assert_close(merged, student, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpoints_hold_adapters_only_and_resume_with_the_same_bits(checkpointing, make_run):
    fields = {"adapter": ADAPTER, "gradient_checkpointing": checkpointing, "student_lr": 1e-2}
    whole, resumed = make_run("whole", **fields), make_run("resumed", **fields)
    train(whole)
    assert train(resumed, stop=lambda: True)["status"] == "stopped"
    train(resumed)
    assert largest_difference(whole, resumed) == 0
    saved = weights(whole)
    assert all("lora_" in name for name in saved)
    assert {name.split(".")[0] for name in saved} == {"student", "fake_score", "ema"}


@pytest.mark.slow
def test_the_kept_student_is_the_moving_average_of_its_adapter(make_run):
    run = make_run("lora", adapter=ADAPTER, student_lr=1e-2)
    train(run)
    saved, kept = weights(run), load_file(checkpoint.students(run)[2])
    shapes = {name: tuple(value.shape) for name, value in kept.items() if "blocks.0.ffn" in name}
    assert shapes == {
        "blocks.0.ffn.net.2.lora_A.weight": (2, 32),
        "blocks.0.ffn.net.2.lora_B.weight": (24, 2),
    }
    assert all(torch.equal(kept[name], saved[f"ema.{name}"]) for name in kept)
    assert any(not torch.equal(kept[name], saved[f"student.{name}"]) for name in kept)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dmd2", ON_FEATURES, SHARED_GRAPH, "sid"], ids=str)
def test_checkpointing_recomputes_a_block_with_its_original_adapter(method, make_run):
    fields = {"method": method, "adapter": ADAPTER, "student_lr": 1e-2, "fake_score_lr": 1e-2}
    plain = make_run("plain", **fields)
    saving = make_run("saving", gradient_checkpointing=True, **fields)
    train(plain)
    train(saving)
    assert largest_difference(plain, saving) == 0


def test_samples_come_from_the_adapted_student(make_run, tiny_wan):
    fields = {"student_lr": 0.05, "student_updates": 4, "ema": None, "evaluations": 2}
    run = make_run("lora", adapter=ADAPTER, **fields)
    train(run)
    first, last = (np.load(folder / "clips.npy") for folder in sample(run))
    assert (first != last).any()
    net = load_transformer(tiny_wan)
    checkpoint.load_student(checkpoint.students(run)[4], net, load_run(run).adapter)
    trainer = build_from(run)
    Records(trainer, run).resume()
    batch = trainer.batch("student")
    inputs = batch.noise("x"), batch.sigma("s"), batch.text
    with torch.no_grad():
        loaded = Denoiser(net, "student", Ledger(1))(*inputs)
        assert torch.equal(loaded, trainer.nets.student(*inputs))


def test_an_adapter_for_unknown_layers_is_refused_with_the_known_suffixes(tiny_wan):
    """`config` checks targets by the names in the weight files; an outline has no weights."""
    message = "adapter.targets: no linear layer matches 'query'; available suffixes: .*to_q"
    with pytest.raises(ConfigError, match=message):
        add_adapter(load_transformer(tiny_wan), "student", AdapterConfig(targets=("query",)), 0)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sgmd", ON_FEATURES, "f_distill", "consistency"], ids=str)
def test_methods_conform_with_adapters(method, tmp_path):
    runs = Runs(method, tmp_path, "run", {"adapter": ADAPTER})
    for check in checks.CHECKS:
        if check is not checks.check_presets:
            check(runs)
