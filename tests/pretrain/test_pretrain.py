"""Training mini-wan in miniature: a resumed run gives the same weights, in a pipeline folder."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from distill_bench.autoencoder import FrameAutoencoder
from distill_bench.domain import shapes
from distill_bench.pretrain import __main__ as command
from distill_bench.pretrain import fit_teacher as pretrain
from distill_bench.teachers.folder import EMBEDDED

pytestmark = pytest.mark.slow

QUALITY = {
    "colour": 0.5,
    "shape": 0.5,
    "direction": 0.5,
    "speed": 0.5,
    "all": 0.5,
    "motion_over_data": 1.0,
}
CPU = torch.device("cpu")


class TinyTeacher(pretrain.TeacherNetwork):
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
    monkeypatch.setattr(pretrain, "TeacherNetwork", TinyTeacher)
    monkeypatch.setattr(pretrain, "measure_quality", lambda *args, **kwargs: dict(QUALITY))


def train(folder: Path, steps: int) -> None:
    small = ["--clips=12", "--autoencoder-steps=2", "--batch=2", "--every=1000", "--threads=1"]
    command.main(
        [f"--out={folder / 'mini'}", f"--work={folder / 'work'}", f"--steps={steps}", *small]
    )


def weights(folder: Path) -> dict[str, Tensor]:
    files = sorted((folder / "mini").rglob("*.safetensors"))
    assert len(files) == 3
    return {f"{f.parent.name}/{k}": v for f in files for k, v in load_file(f).items()}


@pytest.mark.usefixtures("tiny")
def test_a_run_that_was_cut_off_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    train(tmp_path / "whole", 253)
    set_lr = pretrain.set_lr

    def cut(optimiser, peak, step, steps):
        if steps == 253 and step == 252:  # two steps past the checkpoint of step 250
            raise KeyboardInterrupt
        set_lr(optimiser, peak, step, steps)

    monkeypatch.setattr(pretrain, "set_lr", cut)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", 253)
    assert torch.load(tmp_path / "cut" / "work" / "teacher.pt", weights_only=True)["step"] == 250
    monkeypatch.setattr(pretrain, "set_lr", set_lr)
    train(tmp_path / "cut", 253)
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


@pytest.mark.usefixtures("tiny")
def test_the_result_is_a_pipeline_folder_in_half_precision(tmp_path: Path):
    train(tmp_path, 2)
    folder = tmp_path / "mini"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["vae"] == ["distill_bench.autoencoder", "FrameAutoencoder"]
    assert all((folder / part).is_dir() for part in index if not part.startswith("_"))
    assert {v.dtype for v in weights(tmp_path).values()} == {torch.float16}
    assert "--steps 2 " in (folder / "README.md").read_text()
    assert not list(tmp_path.glob(".*"))  # nothing half-written is left


def test_the_oracle_judges_samples_of_any_teacher():
    torch.manual_seed(0)
    tokenizer, vae = pretrain.make_tokenizer(), FrameAutoencoder(width=8).eval()
    teacher = pretrain.TeacherNetwork
    try:
        pretrain.TeacherNetwork = TinyTeacher
        network = TinyTeacher(len(tokenizer))
        quality = pretrain.measure_quality(
            network, network.state_dict(), vae, tokenizer, CPU, count=36
        )
    finally:
        pretrain.TeacherNetwork = teacher
    assert quality.keys() == QUALITY.keys()
    assert all(0 <= quality[f] <= 1 for f in (*shapes.FIELDS, "all"))


def test_every_caption_fits_the_tokenizer_without_unknown_words():
    tokenizer = pretrain.make_tokenizer()
    ids = tokenizer([shapes.caption(a) for a in shapes.all_attributes()]).input_ids
    assert max(map(len, ids)) <= pretrain.TEXT_LENGTH
    assert tokenizer.unk_token_id not in {i for row in ids for i in row}
    assert len({tuple(row) for row in ids}) == 216


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
    quality = pretrain.oracle_accuracy(pretrain.reconstruct(vae, clips, CPU), attributes)
    assert min(quality[f] for f in shapes.FIELDS) >= 0.98
    std = pretrain.encode(vae, clips, CPU).std((0, 2, 3, 4))
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
            for clip in fit_encoders.rendered_clips(12, fit_encoders.TRAIN_KEYS)[0]
        }
