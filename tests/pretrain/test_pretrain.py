"""Training mini-wan in miniature: a resumed run gives the same weights, in a pipeline folder."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from distill_bench.autoencoder import FrameAutoencoder
from distill_bench.domain import controls, shapes
from distill_bench.pretrain import __main__ as command
from distill_bench.pretrain import fit_autoencoder, fit_teacher, network, quality
from distill_bench.teachers.folder import EMBEDDED
from distill_bench.teachers.prompts import read_prompts

pytestmark = pytest.mark.slow

QUALITY = {"colour": 0.5, "shape": 0.5, "direction": 0.5, "speed": 0.5, "all": 0.5, "still": 0.1}
CPU = torch.device("cpu")


class TinyTeacher(network.TeacherNetwork):
    def __init__(self, vocabulary: int) -> None:
        torch.nn.Module.__init__(self)
        self.text_encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=vocabulary,
                d_model=16,
                d_kv=8,
                d_ff=16,
                num_layers=1,
                num_heads=2,
                dropout_rate=0.0,
            )
        )
        self.transformer = WanTransformer3DModel(
            patch_size=(2, 2, 2),
            num_attention_heads=1,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=16,
            num_layers=1,
            rope_max_seq_len=16,
        )


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_teacher, "TeacherNetwork", TinyTeacher)
    monkeypatch.setattr(fit_teacher, "measure_quality", lambda *args, **kwargs: dict(QUALITY))
    monkeypatch.setattr(fit_teacher, "CHECKPOINT_STEPS", 10)
    monkeypatch.setattr(fit_teacher, "WEIGHTED_FROM", 5)


def train(folder: Path, steps: int, decay: int = 10, more: Sequence[str] = ()) -> None:
    small = ["--clips=12", "--autoencoder-steps=2", "--batch=2", "--every=1000", "--threads=1"]
    folders = [f"--out={folder / 'mini'}", f"--work={folder / 'work'}"]
    command.main([*folders, f"--steps={steps}", f"--decay-steps={decay}", *small, *more])


def weights(folder: Path) -> dict[str, Tensor]:
    files = sorted((folder / "mini").rglob("*.safetensors"))
    assert len(files) == 3
    return {f"{f.parent.name}/{k}": v for f in files for k, v in load_file(f).items()}


def assert_equal_weights(folder: Path, other: Path) -> None:
    first, second = weights(folder), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.usefixtures("tiny")
def test_a_run_that_was_cut_off_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    train(tmp_path / "whole", 25)
    schedule = fit_teacher.schedule

    def cut(step, options):
        if step == 23:  # three steps past the checkpoint of step 20
            raise KeyboardInterrupt
        return schedule(step, options)

    monkeypatch.setattr(fit_teacher, "schedule", cut)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", 25)
    saved = torch.load(tmp_path / "cut" / "work" / "teacher.pt", weights_only=True)
    assert saved["step"] == 20
    monkeypatch.setattr(fit_teacher, "schedule", schedule)
    train(tmp_path / "cut", 25)
    assert_equal_weights(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.usefixtures("tiny")
def test_a_longer_run_goes_on_before_the_learning_rate_fell(tmp_path: Path, capsys):
    train(tmp_path / "whole", 40)
    train(tmp_path / "longer", 25)
    capsys.readouterr()
    train(tmp_path / "longer", 40)
    assert "resuming from step 15" in capsys.readouterr().out
    assert_equal_weights(tmp_path / "whole", tmp_path / "longer")


def test_the_posterior_mean_of_two_points_is_a_hyperbolic_tangent():
    """Of -1 and 1 at noise level sigma: tanh((1 - sigma) x_t / sigma^2)."""
    x_t, sigma = torch.linspace(-2, 2, 9), torch.tensor([0.3, 0.9]).repeat_interleave(9)
    x_t = x_t.repeat(2)[:, None, None, None, None]
    clips = torch.tensor([-1.0, 1.0])[None, :, None, None, None, None].expand(18, 2, 1, 1, 1, 1)
    mean = fit_teacher.posterior_mean(x_t, sigma, clips)
    expected = torch.tanh((1 - sigma) * x_t.flatten() / sigma**2)
    assert torch.allclose(mean.flatten(), expected, atol=1e-6)


def test_targets_average_clips_of_the_same_caption_or_of_all():
    captions = [shapes.caption(a) for a in fit_autoencoder.training_attributes(2000)]
    ids, _ = network.tokens(network.make_tokenizer(), captions)
    index, draw = torch.arange(100), torch.Generator().manual_seed(0)
    dropped = index % 10 == 0
    alike = fit_teacher.clips_alike(
        index, dropped, fit_teacher.clips_by_caption(ids), draw
    ).tolist()
    for i, (own, *others) in enumerate(alike):
        assert own == i and i not in others and len(others) == fit_teacher.ALIKE - 1
        same = {captions[j] for j in others} == {captions[i]}
        assert same != dropped[i]


def test_levels_of_larger_loss_weigh_less_once_their_means_have_settled():
    sigma, losses = torch.tensor([0.02, 0.5, 0.52, 1.0]), torch.tensor([4.0, 1.0, 1.0, 2.0])
    progress = fit_teacher.Progress(None, None, [])
    for _ in range(1200):
        assert torch.equal(fit_teacher.level_weights(progress, sigma, losses), torch.ones(4))
    progress.step = fit_teacher.WEIGHTED_FROM
    weights = fit_teacher.level_weights(progress, sigma, losses)
    assert torch.allclose(weights * losses, (weights * losses)[:1].expand(4), rtol=1e-4)
    assert progress.level_loss[1] == 1, "a level without samples keeps its mean"


@pytest.mark.usefixtures("tiny")
def test_a_run_of_another_recipe_is_refused(tmp_path: Path, capsys):
    train(tmp_path, 2)
    before = (tmp_path / "work" / "teacher.pt").read_bytes()
    with pytest.raises(SystemExit, match="2"):
        train(tmp_path, 2, more=["--lr=0.1"])
    assert "--lr 0.1: " in capsys.readouterr().err
    assert (tmp_path / "work" / "teacher.pt").read_bytes() == before


@pytest.mark.usefixtures("tiny")
def test_the_result_is_a_pipeline_folder_in_half_precision(tmp_path: Path):
    train(tmp_path, 2)
    folder = tmp_path / "mini"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["vae"] == ["distill_bench.autoencoder", "FrameAutoencoder"]
    assert all((folder / part).is_dir() for part in index if not part.startswith("_"))
    assert {v.dtype for v in weights(tmp_path).values()} == {torch.float16}
    card = (folder / "README.md").read_text()
    assert "--steps 2 --decay-steps 10 " in card
    assert max(len(line) for line in card.split("\n") if not line.startswith("|")) <= 120
    kinds = Counter(shapes.parse(text).kind for text in read_prompts(folder / "prompts.txt"))
    assert kinds == {"named": 216, "direction": 216, "free": 216}
    train(tmp_path, 2)  # with the autoencoder of the work folder
    assert not any(str(tmp_path) in file.read_text() for file in folder.rglob("*.json"))
    assert not list(tmp_path.glob(".*"))  # nothing half-written is left


def test_the_oracle_judges_samples_of_any_teacher(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quality, "FINAL_COUNTS", (6, 4))
    monkeypatch.setattr(quality, "STEPS", 2)
    torch.manual_seed(0)
    tokenizer, vae = network.make_tokenizer(), FrameAutoencoder(width=8).eval()
    measured = quality.measure_quality(
        TinyTeacher(len(tokenizer)), vae, tokenizer, torch.randn(9, 4, shapes.FRAMES, 8, 8), True
    )
    shares = [*shapes.FIELDS, "all", "guided"]
    assert all(0 <= float(measured[name]) <= 1 for name in shares)
    speeds = ["speed_w1", "mean_speed", "still"]
    assert set(measured) == {
        *shares,
        *speeds,
        *[f"guided_{name}" for name in speeds],
        "nearest",
        "stepping",
        "shift",
        "fd",
        "fd_floor",
    }
    assert measured["fd"] > 20 * measured["fd_floor"], "an untrained network is far from the data"


def test_data_is_at_the_floor_of_its_distance():
    """Clips that stand still are not: what FD sees is more than appearance."""
    moving = shapes.all_attributes("direction")
    clips = fit_autoencoder.render_clips(moving, 99_000, silent=True)
    data = quality.distance_to_data(clips, moving)
    assert data["fd"] < 1.5 * data["fd_floor"]
    frozen = quality.distance_to_data(controls.frozen(clips), moving)
    assert frozen["fd"] > 5 * frozen["fd_floor"]


def test_copies_of_training_clips_are_at_distance_zero():
    vae = FrameAutoencoder(width=8).eval()
    train, held_out = (
        fit_autoencoder.render_clips(shapes.all_attributes("free"), key, silent=True)
        for key in (1, 100)
    )
    latents = fit_autoencoder.encode(vae, train, CPU)
    assert quality.nearest_distance(vae, train[::-1].copy(), latents) < 1e-2
    assert quality.nearest_distance(vae, held_out, latents) > 1


def test_data_has_the_speeds_of_the_data():
    free = [a for a in shapes.all_attributes("free") for _ in range(30)]
    clips = fit_autoencoder.render_clips(free, 77_000, silent=True)
    measured = quality.speed_quality(clips)
    assert measured["speed_w1"] < 0.06 and abs(measured["still"]) < 0.06
    assert measured["mean_speed"] == pytest.approx(1, abs=0.1)
    still = quality.speed_quality(np.repeat(clips[:, :1], shapes.FRAMES, axis=1))
    assert (still["still"], still["mean_speed"]) == (1 - shapes.STILL_SHARE, 0)


def test_training_clips_have_the_kinds_of_captions_in_their_shares():
    attributes = fit_autoencoder.training_attributes(4320)
    assert attributes[:100] == fit_autoencoder.training_attributes(100)
    count = Counter(a.kind for a in attributes)
    assert {k: n * 20 // 4320 for k, n in count.items()} == fit_autoencoder.MIX
    for kind in shapes.KINDS:
        each = Counter(a for a in attributes if a.kind == kind)
        assert set(each) == set(shapes.all_attributes(kind))
        assert max(each.values()) - min(each.values()) <= 1


def test_every_caption_fits_the_tokenizer_without_unknown_words():
    tokenizer = network.make_tokenizer()
    every = [shapes.caption(a) for kind in shapes.KINDS for a in shapes.all_attributes(kind)]
    ids = tokenizer(every).input_ids
    assert max(map(len, ids)) <= network.TEXT_LENGTH
    assert tokenizer.unk_token_id not in {i for row in ids for i in row}
    assert len({tuple(row) for row in ids}) == len(every) == 306


def test_the_autoencoder_keeps_its_statistics_and_shapes(tmp_path: Path):
    vae = FrameAutoencoder(width=8).eval()
    vae.latents_mean.copy_(torch.arange(4.0))
    vae.latents_std.copy_(torch.arange(4.0) + 1)
    vae.save_pretrained(tmp_path)
    again = FrameAutoencoder.from_pretrained(tmp_path).eval()
    video = torch.rand(2, 3, 5, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = again.encode(video)
        assert latents.shape == (2, 4, 5, 8, 8)
        assert again.decode(latents).shape == video.shape
        assert torch.equal(latents, vae.encode(video))
        alone = vae.encode(video[:, :, 2:3])
    torch.testing.assert_close(latents[:, :, 2:3], alone)  # frames do not see one another


@pytest.mark.skipif(not EMBEDDED["mini-wan"].is_dir(), reason="mini-wan is not trained here")
def test_the_shipped_autoencoder_keeps_every_attribute():
    vae = FrameAutoencoder.from_pretrained(
        EMBEDDED["mini-wan"] / "vae", torch_dtype=torch.float32
    ).eval()
    attributes = shapes.all_attributes()[::3]
    clips = np.stack([shapes.render(a, 9_000 + i) for i, a in enumerate(attributes)])
    latents = fit_autoencoder.encode(vae, clips, CPU)
    accuracy = quality.oracle_accuracy(fit_autoencoder.decode(vae, latents), attributes)
    assert min(accuracy[f] for f in shapes.FIELDS) >= 0.98
    std = latents.std((0, 2, 3, 4))
    assert ((std > 0.8) & (std < 1.25)).all()


def test_the_encoders_are_trained_by_the_same_command_and_know_what_they_have_seen(tmp_path):
    from distill_bench import evaluator
    from distill_bench.evaluate import encoders
    from distill_bench.pretrain import fit_encoders

    assert (
        command.main(["--encoders", "--out", str(tmp_path), "--steps", "3", "--clips", "12"]) == 0
    )
    nets = {
        encoders.CLASSIFIER: encoders.Classifier,
        encoders.FRAME_CLIP: encoders.frame_clip,
        encoders.VIDEO_CLIP: encoders.video_clip,
    }
    for name, make in nets.items():
        _, digest, seen = encoders.load_encoder(make(), name, tmp_path)
        card = json.loads((tmp_path / f"{name}.json").read_text())
        assert card["sha256"] == digest and card["command"].endswith(
            "--encoders --steps 3 --clips 12 --seed 0"
        )
        assert seen == {
            evaluator.clip_digest(clip)
            for clip in fit_encoders.LabelledClips.rendered(12, fit_encoders.TRAIN_KEYS).frames
        }


def test_clips_played_backwards_move_the_other_way_and_keep_their_nose():
    from distill_bench.pretrain import fit_encoders

    clips = fit_encoders.LabelledClips.rendered(72, 500)
    forwards, backwards = clips.answers(False), clips.answers(True)
    assert torch.equal(backwards["velocity"], -forwards["velocity"])
    for name in ("colour", "shape", "speed", "heading"):
        assert torch.equal(backwards[name], forwards[name]), name
    still = forwards["speed"] == 0
    played = np.ascontiguousarray(clips.frames[:, ::-1])
    for attributes, caption in zip(shapes.read(played), clips.captions(True), strict=True):
        named = shapes.parse(caption).named()
        assert {k: getattr(attributes, k) for k in named} == named
    kept = [a == b for a, b in zip(clips.captions(False), clips.captions(True), strict=True)]
    free = [a.kind == "free" for a in clips.attributes]
    assert kept == (still.numpy() | np.array(free)).tolist() and 0 < still.sum() < 36


def test_captions_of_a_batch_are_distinct_and_of_one_kind():
    from distill_bench.evaluate import encoders
    from distill_bench.pretrain import fit_encoders

    clips = fit_encoders.LabelledClips.rendered(300, 500)
    tokens = encoders.tokenize(clips.captions(False), encoders.CLIP_WORDS)
    groups = fit_encoders.batch_groups(tokens, [a.kind for a in clips.attributes])
    draw, seen = torch.Generator().manual_seed(0), set()
    for _ in range(12):
        chosen, texts = fit_encoders.draw_batch(groups, 50, draw)
        assert torch.equal(tokens[chosen], texts)
        assert len(texts.unique(dim=0)) == len(texts) <= 50
        (kind,) = {clips.attributes[i].kind for i in chosen}
        seen.add(kind)
    assert seen == set(shapes.KINDS)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--measure", "0"], "--measure 0: write a number of at least 1"),
        (["--measure", "-1"], "--measure -1: write a number of at least 1"),
        (["--autoencoder-steps", "0"], "--autoencoder-steps 0: write a number of at least 1"),
        (["--measure", "1"], "no pipeline folder; name one that pretrain wrote"),
    ],
)
def test_impossible_options_end_with_one_line_before_anything_is_written(
    arguments, says, tmp_path, capsys
):
    with pytest.raises(SystemExit) as ended:
        command.main([*arguments, "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")])
    assert ended.value.code == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
