"""The benchmark of a step covers every preset of the registry and writes its table."""

import pytest
import trainer_step

from distill_bench.registry import methods


def test_every_preset_and_every_combination_has_a_row():
    rows = trainer_step.rows()
    known = methods()
    assert rows.keys() >= {f"{name} {preset}" for name in known for preset in known[name].presets}
    assert rows.keys() >= {name for name in known if not known[name].presets}
    combinations = [name for name in rows if name.startswith("sgmd: ")]
    assert len(combinations) == 2 * 3 * 2
    # a preset's own keys win
    assert "exit_step" not in rows["dp_dmd lightx2v"]
    assert rows["dmd2 video"]["exit_step"] == "last"


@pytest.mark.slow
def test_a_step_takes_longer_than_its_passes_and_reasons_are_given(capsys):
    chosen = ["sgmd paper", "ida lightx2v"]
    assert trainer_step.main([*chosen, "--teacher=gaussian", "--rounds=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (measured,) = [line for line in lines if line.startswith("│ sgmd paper")]
    step, passes, overhead = measured.strip("│ ").split("│")[1:]
    assert float(step) > float(passes) > 0
    assert float(overhead.strip(" %")) == pytest.approx(
        100 * (float(step) / float(passes) - 1), abs=20
    )
    assert "ida lightx2v on gaussian: teacher 'gaussian': ida averages weights" in "\n".join(lines)


def test_a_pass_is_priced_by_its_samples_and_share_of_blocks(make_run):
    """A stop half-way runs half of the blocks; a guided pass runs twice the batch."""
    from distill_bench.train.setup import build_from

    run = build_from(make_run("run"))
    blocks = len(run.networks["student"].blocks)
    for share in (0.5, 1.0):
        net = trainer_step.network(run, "student", share)
        assert len(net.blocks) == share * blocks
    seen = []
    net.patch_embedding.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    for batches in (0.5, 1, 2):
        trainer_step.bare(run, "student", "forward", batches * run.config.batch_size)()
    assert seen == [run.config.batch_size, run.config.batch_size, 2 * run.config.batch_size]
