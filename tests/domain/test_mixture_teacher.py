"""The mixture teacher in the harness: folder, clips, training of every method, scores, quality."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from distill_bench.config.errors import ConfigError
from distill_bench.config.resolve import load_run, resolve
from distill_bench.domain.closed_form import FlatNetwork
from distill_bench.domain.mixture import PROMPTS, SHAPE, motion_mixture, transported
from distill_bench.domain.mixture_network import MixtureNetwork
from distill_bench.domain.mixture_teacher import write_mixture_teacher
from distill_bench.draws import generator
from distill_bench.eval.mixture_truth import MixtureTruth
from distill_bench.evaluate.score import evaluate
from distill_bench.evaluator import Clips
from distill_bench.networks.denoiser import Denoiser
from distill_bench.networks.ledger import Ledger
from distill_bench.networks.pipeline import load_pipeline
from distill_bench.noise import teacher_sigmas
from distill_bench.pretrain.fit_mixture import mode_shares
from distill_bench.registry import methods
from distill_bench.rollout import euler
from distill_bench.sample.reference_kinds import COMPARED, ROLES
from distill_bench.sample.references import references
from distill_bench.sample.run import sample
from distill_bench.teachers.folder import EMBEDDED, TeacherError
from distill_bench.teachers.kinds import find_teacher
from distill_bench.testing import checks, ranks
from distill_bench.testing.runs import Runs
from distill_bench.train.loop import train

ON_MIXTURE = {"teacher": "mixture", "data": None}


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline("mixture", torch.device("cpu"))


def test_the_shipped_parameters_are_those_of_the_code(pipeline):
    for name, value in motion_mixture().tensors().items():
        torch.testing.assert_close(pipeline.mixture.tensors()[name], value, rtol=0, atol=1e-12)


def test_the_shipped_folder_is_small():
    assert sum(path.stat().st_size for path in EMBEDDED["mixture"].iterdir()) < 1_000_000


@pytest.mark.slow
def test_samples_of_the_shipped_network_have_the_modes_of_the_data(pipeline):
    """To 0.03 in total variation, in 32 Euler steps from noise other than the card's.

    The noise is quasi-random: evenly spread samples add little error of their own.
    """
    net, weights = pipeline.student(), pipeline.mixture.weights
    points = torch.quasirandom.SobolEngine(16, scramble=True, seed=123).draw(4096)
    normal = torch.special.ndtri(points.double().clamp(1e-9, 1 - 1e-9))
    noise = (normal @ pipeline.mixture.basis.T).float().reshape(-1, *SHAPE)
    for row, prompt in enumerate(pipeline.prompts()):
        text = pipeline.encode_text([prompt]).expand(len(noise), -1, -1)
        denoise = Denoiser(net, "student", Ledger(1))
        with torch.no_grad():
            x = euler(denoise, noise, teacher_sigmas(32, 1.5), text).flatten(1).double()
        shares = mode_shares(pipeline.mixture, x, weights[row])
        distance = float((shares - weights[row]).abs().sum()) / 2
        assert distance < 0.03, (prompt, distance)


def test_the_card_states_modes_near_the_datas_and_nearer_the_teachers():
    card = (EMBEDDED["mixture"] / "README.md").read_text()
    heads, *rows = re.findall(r"^\| \D.*", card.split("Quality of ")[1], re.MULTILINE)
    names = [name.strip() for name in heads.strip("|").split("|")]
    assert names == ["prompt", "network", "motion", "teacher", "motion", "apart", "floor"]
    assert len(rows) == len(PROMPTS)
    for row in rows:
        _, network, _, teacher, _, apart, floor = row.strip("|").split("|")
        assert float(floor) < float(teacher) < 0.03 and float(network) < 0.03
        assert float(apart) < 0.01


def test_clips_show_the_data_and_encode_inverts_decode(pipeline):
    names, keys = ["any motion", "mostly to the left", "any motion"], [5, 6, 7]
    x0 = pipeline.data(names, keys)
    frames = pipeline.clips(names, keys)
    assert frames.dtype == np.uint8
    assert torch.equal(pipeline.decode(x0), torch.from_numpy(frames))
    torch.testing.assert_close(pipeline.encode(frames), x0, rtol=0, atol=4e-4)
    # a key alone decides a clip, in every version: all committed scores compare with these data
    assert torch.equal(pipeline.data(names[1:2], keys[1:2]), x0[1:2])
    draws = generator("mixture", 6)
    share, noise = torch.rand(1, generator=draws), torch.randn(16, generator=draws)
    row = [list(PROMPTS).index("mostly to the left")]
    exact = transported(pipeline.mixture, row, share, noise[None])
    assert torch.equal(exact, x0[1:2].flatten(1))
    assert not torch.equal(x0[0], x0[2])
    video = pipeline.decode_video(x0.requires_grad_())
    assert video.shape == (3, 3, 8, 8, 8)
    assert video.requires_grad


def test_controls_change_the_motion_of_clips_and_nothing_else(pipeline):
    """Motion coordinates and the others are read off the frames, to within 4e-4 per latent."""
    names = ["any motion", "mostly to the left", "mostly fast"] * 8
    frames = pipeline.clips(names, range(24))

    def split(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        z = pipeline.encode(frames).flatten(1).double() @ pipeline.mixture.basis
        return z[:, :2].numpy(), z[:, 2:].numpy()

    motion, other = split(frames)
    speed = np.hypot(*motion.T)
    damaged = {kind: make(frames, 5) for kind, make in pipeline.controls(names).items()}
    assert damaged.keys() == {"slowed", "stilled", "equalised"}
    moved = {}
    for kind, clips in damaged.items():
        assert clips.shape == frames.shape and clips.dtype == np.uint8
        moved[kind], same = split(clips)
        assert same == pytest.approx(other, abs=3e-3), kind
    assert moved["slowed"] == pytest.approx(motion / 2, abs=3e-3)
    still = np.hypot(*moved["stilled"].T) < 3e-3
    assert still.sum() == 6, "a quarter"
    assert moved["stilled"][~still] == pytest.approx(motion[~still], abs=3e-3)
    assert (pipeline.controls(names)["stilled"](frames, 6) != damaged["stilled"]).any()
    assert (pipeline.controls(names)["stilled"](frames, 5) == damaged["stilled"]).all()
    equal = np.hypot(*moved["equalised"].T)
    for first in range(3):
        assert equal[first::3] == pytest.approx(speed[first::3].mean(), abs=3e-3)
    cosine = (moved["equalised"] * motion).sum(1) / (equal * speed)
    assert cosine[speed > 0.1].min() > 0.99, "headings do not change"


MOTION = {"mode_tv", "mixture_motion_ratio", "mixture_motion_w1", "mixture_motion_spread_ratio"}
SEEN = {  # control -> scores that must see it
    "slowed": MOTION,
    "stilled": MOTION - {"mixture_motion_spread_ratio"},  # still clips differ from moving ones
    "equalised": MOTION - {"mixture_motion_ratio"},  # the mean does not change
}


@pytest.mark.slow
def test_controls_are_more_than_three_spreads_of_the_floor_away(pipeline):
    """The floor is that of exact samples, 200 per prompt."""
    names = [name for name in pipeline.prompts() for _ in range(200)]
    facts = pipeline.facts(None, torch.ones(1), "ode", 1.0)

    def scores(frames: np.ndarray) -> dict[str, float]:
        clips = Clips(frames, names, list(range(len(names))), facts=facts)
        return {score.column: score.value for score in MixtureTruth().scores(clips, {})}

    samples = [pipeline.clips(names, range(i, i + len(names))) for i in range(0, 5000, 1000)]
    floors = [scores(frames) for frames in samples]
    for kind, damage in pipeline.controls(names).items():
        damaged = scores(damage(samples[0], 0))
        for column in SEEN[kind]:
            floor = np.array([of_set[column] for of_set in floors])
            away = abs(damaged[column] - floor.mean()) / floor.std(ddof=1)
            assert away > 3, (kind, column, away)
        if kind == "equalised":
            assert damaged["mixture_motion_spread_ratio"] < 0.01
            assert damaged["mixture_motion_ratio"] == pytest.approx(
                floors[0]["mixture_motion_ratio"], abs=1e-3
            )


def test_the_shipped_network_predicts_the_velocity_of_the_teacher(pipeline):
    """To 0.08 % of its mean square at every level, with and without a prompt."""
    draws = torch.Generator().manual_seed(1)
    net, names = pipeline.student(), [name for name in pipeline.prompts() for _ in range(60)]
    x0 = pipeline.data(names, range(len(names)))
    noise = torch.randn(x0.shape, generator=draws)
    for text in (pipeline.encode_text(names), torch.zeros(len(names), 1, len(pipeline.prompts()))):
        for level in (0.05, 0.2, 0.5, 0.8, 0.97):
            sigma = torch.full((len(names),), level)
            x_t = (1 - level) * x0 + level * noise
            with torch.no_grad():
                exact, learned = (
                    role(x_t, 1000 * sigma, text)[0] for role in (pipeline.transformer, net)
                )
            error = (learned - exact).square().mean() / exact.square().mean()
            assert error < 8e-4, (level, float(error))


def test_a_new_network_makes_the_best_linear_guess_for_data_of_unit_variance():
    """E[noise - x0 | x_t] = (2 s - 1) / ((1 - s)^2 + s^2) x_t, for every text."""
    net = MixtureNetwork(16, 5)
    x_t, sigma = torch.randn(4, 16), torch.tensor([0.0, 0.3, 0.5, 1.0])
    s = sigma[:, None]
    velocity = net(x_t, sigma, torch.eye(4, 5))
    expected = (2 * s - 1) / ((1 - s) ** 2 + s**2) * x_t
    torch.testing.assert_close(velocity, expected[:, None])


def test_a_written_teacher_is_read_as_it_was(pipeline, tmp_path):
    other = replace(pipeline.mixture, weights=pipeline.mixture.weights[:2].flip(0).contiguous())
    net = FlatNetwork(MixtureNetwork(16, 2))
    for _ in range(2):  # a second fit replaces the first
        write_mixture_teacher(tmp_path / "a" / "b", other, ["still", "fast"], (2, 4, 2, 1), net)
    read = find_teacher(str(tmp_path / "a" / "b")).load(torch.device("cpu"))
    assert (read.shape, read.prompts()) == ((2, 4, 2, 1), ["still", "fast"])
    for name, value in other.tensors().items():
        assert torch.equal(read.mixture.tensors()[name], value)
    for p, q in zip(read.student().parameters(), net.parameters(), strict=True):
        assert torch.equal(p, q)
    facts = read.facts(None, torch.ones(1), "ode", 1.0)
    assert facts["prompts"].tolist() == ["still", "fast"]
    assert facts["latent_shape"].tolist() == [2, 4, 2, 1]
    for name, value in other.tensors().items():
        np.testing.assert_array_equal(facts[name], value.numpy())
    assert not any(p.requires_grad for p in read.transformer.parameters())
    assert {p.dtype for p in read.transformer.parameters()} == {torch.float32}
    assert read.has_clips(["anything"]) is True


def test_student_and_fake_score_start_as_one_network(pipeline):
    student, fake_score = pipeline.student(), pipeline.fake_score()
    for p, q in zip(student.parameters(), fake_score.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p is not q


def test_a_folder_without_weights_says_how_to_make_them(tmp_path):
    for path in EMBEDDED["mixture"].iterdir():
        if path.name != "network.safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(TeacherError, match="pretrain --mixture"):
        find_teacher(str(tmp_path)).load(torch.device("cpu")).student()


def test_an_exact_fake_score_is_refused_and_mixed_weights_are_not():
    with pytest.raises(ConfigError, match="no closed form of its student's density"):
        resolve({"method": "dmd2", "teacher": "mixture", "fake_score": "exact"})
    assert resolve({"method": "ida", "teacher": "mixture"}).teacher == "mixture"


@pytest.mark.parametrize("method", methods())
def test_every_method_trains(method, tmp_path):
    run_dir = Runs(method, tmp_path, fields=ON_MIXTURE).make()
    summary = train(run_dir)
    assert summary["status"] == "done"
    assert summary["cost"]["student"]["full_backward"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dmd2", {"name": "sgmd", "preset": "shared"}, "ida"])
def test_methods_conform_on_the_mixture(method, tmp_path):
    """Losses, detachment, cost ledger, optimiser steps, bits after resuming, guard, ...

    Not `check_hyperparameters`: a network of one block has one depth of features.
    """
    runs = Runs(method, tmp_path, fields=ON_MIXTURE)
    for check in checks.CHECKS:
        if check is not checks.check_hyperparameters:
            check(runs)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # longer than the check's own timeout, which names the method
def test_two_ranks_end_where_one_does(tmp_path):
    methods_to_train = ("dmd2", {"name": "sgmd", "preset": "shared"})
    ranks.check_two_ranks(*methods_to_train, folder=tmp_path, fields=ON_MIXTURE)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Store with a trained run of 100 clips and its reference rows."""
    folder = tmp_path_factory.mktemp("store")
    protocol = {"clips": 100, "teacher_steps": 8, "teacher_guidance": 1.0}
    runs = Runs("sgmd", folder, fields=ON_MIXTURE | {"protocol": protocol})
    run_dir = runs.make()
    train(run_dir)
    return run_dir


@pytest.mark.slow
def test_a_run_and_every_reference_row_are_scored(store):
    rows = references(load_run(store), store.parent)
    assert rows.keys() == ROLES.keys()
    compared = {kind: rows[kind] for kind in COMPARED}
    values = {}
    for kind, folder in rows.items() | {("student", sample(store)[-1])}:
        others = {other: path for other, path in compared.items() if other != kind}
        lines = evaluate(folder, others, ["mixture_truth"])
        values[kind] = {line["column"]: line["value"] for line in lines}
        assert all(math.isfinite(value) for value in values[kind].values())
    assert values["student"].keys() >= {
        "mode_tv",
        "mode_entropy",
        "lost_modes",
        "mixture_motion_ratio",
        "mixture_motion_w1",
        "mixture_energy",
        "mixture_log_density",
        "mode_tv_teacher",
    }
    for column in ("mode_tv", "mixture_motion_w1", "mixture_energy"):
        assert values["frozen"][column] > 2 * values["data"][column], column
    assert values["frozen"]["mixture_motion_ratio"] < 0.01
    assert values["slowed"]["mixture_motion_ratio_teacher"] == pytest.approx(0.5, abs=1e-3)
    assert values["equalised"]["mixture_motion_spread_ratio_teacher"] < 0.01
    # grey noise averages to a latent near 0, which belongs to the still mode
    assert values["noise"]["mode_tv"] > values["data"]["mode_tv"] + 0.15
    prompts = [json.loads(line)["prompt"] for line in (rows["data"] / "manifest.jsonl").open()]
    assert len(set(prompts)) == 5
