"""Fitting of the mixture's network: the folder that it writes, and its bits."""

import pytest
import torch
from safetensors.torch import load_file

from distill_bench.domain.mixture import PROMPTS, motion_mixture
from distill_bench.domain.mixture_teacher import NETWORK_FILE
from distill_bench.pretrain.__main__ import main
from distill_bench.pretrain.fit_mixture import mode_shares
from distill_bench.teachers.kinds import find_teacher


def fitted(out, steps: int = 24):
    """Folder written by a short fit."""
    arguments = ["--mixture", "--out", str(out), "--steps", str(steps), "--batch", "16"]
    assert main([*arguments, "--samples", "20"]) == 0
    return out


@pytest.fixture
def few_warmup_steps(monkeypatch):
    monkeypatch.setattr("distill_bench.pretrain.fit_mixture.WARMUP", 4)


@pytest.mark.slow
@pytest.mark.usefixtures("few_warmup_steps")
def test_a_fit_writes_a_teacher_with_a_card_and_repeats_to_the_bit(tmp_path):
    folder = fitted(tmp_path / "a")
    pipeline = find_teacher(str(folder)).load(torch.device("cpu"))
    assert pipeline.prompts() == list(PROMPTS)
    assert sum(p.numel() for p in pipeline.student().parameters()) > 200_000
    card = (folder / "README.md").read_text()
    assert "--mixture --steps 24 --batch 16 --lr 0.002 --seed 0 --samples 20" in card
    errors = [float(line.split("|")[2]) for line in card.splitlines() if line.startswith("| 2")]
    first = [float(line.split("|")[2]) for line in card.splitlines() if line.startswith("| 3 ")]
    assert errors[-1] < first[0]  # the error falls
    assert all(f"| {prompt} |" in card for prompt in PROMPTS)
    weights = [load_file(f / NETWORK_FILE) for f in (folder, fitted(tmp_path / "b"))]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_mode_shares_count_samples_by_mode():
    mixture = motion_mixture()
    x = mixture.means[[0, 0, 5, 16]] @ mixture.basis.T
    shares = mode_shares(mixture, x, mixture.weights[0])
    assert shares[[0, 5, 16]].tolist() == [0.5, 0.25, 0.25]
