"""Broken teachers and students: refused in one line before a job runs."""

import json
import shutil
from pathlib import Path

import pipelines
import pytest
import sentencepiece
import torch
import transformers
from runs import OLD_RUN, OLD_RUN_ID
from safetensors.torch import load_file, save_file

from distill_bench.config.errors import ConfigError
from distill_bench.config.identity import run_id
from distill_bench.config.resolve import resolve
from distill_bench.networks.pipeline import load_pipeline, load_transformer, pipeline_of
from distill_bench.networks.text_pipeline import load_texts
from distill_bench.teachers import architectures, contents
from distill_bench.teachers.architecture import architecture_of
from distill_bench.teachers.folder import TeacherError

RUN = {"method": "dmd2", "frames": 5, "height": 16, "width": 16}


@pytest.fixture
def copy(tiny_wan, tmp_path) -> Path:
    """A copy of the tiny pipeline, for a test to break."""
    return Path(shutil.copytree(tiny_wan, tmp_path / "broken"))


def change(folder: Path, **keys) -> None:
    """Set keys of the config in a folder, or of its model_index.json."""
    path = next(folder.glob("*config.json"), folder / "model_index.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def refused(**fields) -> str:
    """The error of a run, checked to be one line."""
    with pytest.raises(ConfigError) as caught:
        resolve(RUN | fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_architecture_is_refused_with_the_known_names_and_a_template(copy):
    change(copy / "transformer", _class_name="HunyuanVideoTransformer3DModel")
    message = refused(teacher=str(copy))
    assert "HunyuanVideoTransformer3DModel" in message
    assert "cogvideox, ltxvideo, wan" in message
    assert "start from distill_bench/teachers/architectures/wan.py" in message


def test_an_architecture_is_found_by_its_file_name(copy, monkeypatch, tmp_path):
    (tmp_path / "more").mkdir()
    code = "from distill_bench.teachers.architectures.wan import Wan\n\n"
    code += "class Mine(Wan):\n    own_fps = 7.0\n"
    (tmp_path / "more" / "mine.py").write_text(code)
    monkeypatch.setattr(
        architectures, "__path__", [*architectures.__path__, str(tmp_path / "more")]
    )
    change(copy / "transformer", _class_name="MineTransformer3DModel")
    assert architecture_of(copy).fps == 7.0


def test_an_autoencoder_of_another_model_is_refused(copy):
    change(copy / "vae", z_dim=48)
    message = refused(teacher=str(copy))
    assert "its autoencoder makes latents of 48 channels, its transformer takes 4" in message


def test_models_from_images_are_refused(copy):
    change(copy / "transformer", in_channels=36)
    message = "takes latents of 36 channels and gives 4: it is not a text-to-video model"
    assert message in refused(teacher=str(copy))


TOO_SHORT = (
    "frames 1 is too short for the teacher tiny-wan: a clip needs two latents in time, "
    "here at least 5 frames"
)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"frames": 1}, TOO_SHORT),
        ({"frames": 7}, "frames 7 must be 1 more than a multiple of 4"),
        ({"height": 24}, "height 24 must be a multiple of 16"),
    ],
)
def test_a_clip_that_the_teacher_cannot_make_is_refused(size, message, tiny_wan):
    assert message in refused(teacher=str(tiny_wan), **size)


def test_missing_weights_are_not_drawn_at_random(copy):
    path = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights.pop("blocks.0.ffn.net.2.weight")
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(
        TeacherError, match=r"transformer: 1 weights are missing .* blocks.0.ffn.net.2.weight"
    ):
        load_transformer(copy)
    path.unlink()
    with pytest.raises(TeacherError, match=r"cannot load .*transformer") as caught:
        load_transformer(copy)
    assert "\n" not in str(caught.value)
    encoder = copy / "text_encoder" / "model.safetensors"
    weights = load_file(encoder)
    weights.pop("encoder.final_layer_norm.weight")
    save_file(weights, encoder, {"format": "pt"})
    with pytest.raises(
        TeacherError,
        match=r"text_encoder: 1 weights are missing .* encoder.final_layer_norm.weight",
    ):
        load_texts(str(copy), torch.device("cpu")).encode_text(["a red circle"])


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_missing_or_truncated_weights_are_refused(part, copy):
    path = copy / part / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert f"cannot load {path}" in refused(teacher=str(copy))
    index = path.with_name(f"{path.name}.index.json")
    index.write_text(json.dumps({"weight_map": {"a": "of-2.safetensors"}}))
    assert f"{part} lacks weights: it has no of-2.safetensors" in refused(teacher=str(copy))
    index.unlink()
    path.unlink()
    assert f"{part} lacks weights: it has no {path.name}" in refused(teacher=str(copy))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("model_index.json", "its model_index.json is missing"),
        ("scheduler/scheduler_config.json", "its scheduler/scheduler_config.json is missing"),
        ("tokenizer", "its tokenizer is empty"),
    ],
)
def test_a_pipeline_without_its_index_scheduler_or_tokenizer_is_refused(
    name, problem, tiny_wan, copy
):
    path = copy / name
    for file in path.iterdir() if path.is_dir() else [path]:
        file.unlink()
    message = f"teacher {copy} is not a pipeline folder: {problem}; download or copy the whole"
    assert f"{message} folder" in refused(teacher=str(copy))
    assert f"{message} folder" in refused(teacher=str(tiny_wan), student=str(copy))


def test_a_teacher_without_its_autoencoder_or_prompts_is_refused(copy):
    (copy / "prompts.txt").write_text("\n")
    assert f"prompts {copy / 'prompts.txt'}: the file has no prompts" in refused(teacher=str(copy))
    shutil.rmtree(copy / "vae")
    assert f"{copy} has no vae/, but its model_index.json lists one" in refused(teacher=str(copy))


def test_a_config_with_more_blocks_than_the_weights_is_refused(copy):
    change(copy / "transformer", num_layers=3)
    message = "transformer: num_layers is 3 in config.json, but the weights have 2 blocks"
    assert message in refused(teacher=str(copy))


def test_cogvideox_has_no_positions_beyond_its_training_size(tmp_path):
    pipelines.save("cogvideox-1.5", tmp_path / "cog")
    message = refused(teacher=str(tmp_path / "cog"), frames=9, height=48, width=32)
    assert message == "height 48 must be at most 32 for the teacher cog"


def test_a_student_without_weights_is_refused(tiny_wan, copy):
    (copy / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    assert "broken/transformer lacks weights" in refused(teacher=str(tiny_wan), student=str(copy))


def test_an_autoencoder_of_unknown_class_or_without_a_config_is_refused(copy):
    change(copy / "vae", _class_name="AutoencoderKLLTXVideo")
    assert "unknown autoencoder 'AutoencoderKLLTXVideo'" in refused(teacher=str(copy))
    (copy / "vae" / "config.json").unlink()
    assert "vae has no config.json" in refused(teacher=str(copy))


@pytest.mark.parametrize("name", ["transformer/config.json", "vae/config.json", "model_index.json"])
@pytest.mark.parametrize(
    ("text", "problem"),
    [('{"a": 1,', "line 1"), ("[]", "a config must be a JSON object; found list")],
)
def test_a_config_that_is_not_a_json_object_is_named(name, text, problem, copy):
    (copy / name).write_text(text)
    message = refused(teacher=str(copy))
    assert f"cannot read {copy / name}" in message
    assert problem in message


def test_every_target_of_an_adapter_must_name_a_layer(tiny_wan):
    """peft ignores a target without a match if another target has one."""
    message = "adapter.targets: no linear layer matches 'to_w'; available suffixes: attn1.to_k, "
    assert message in refused(teacher=str(tiny_wan), adapter={"targets": ["to_q", "to_w"]})
    known = {"teacher": str(tiny_wan), "adapter": {"targets": ["to_q", "ffn.net.2"]}}
    assert resolve(RUN | known).adapter


@pytest.mark.parametrize(
    "name",
    ["text_encoder/model.safetensors", "text_encoder/config.json", "tokenizer/tokenizer.json"],
)
def test_a_truncated_text_encoder_or_tokenizer_is_one_line(name, copy):
    path = copy / name
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(TeacherError, match=f"cannot load {path.parent}") as caught:
        load_texts(str(copy), torch.device("cpu")).encode_text(["a red circle"])
    assert "\n" not in str(caught.value)


def test_a_config_with_fewer_layers_than_the_weights_is_refused(copy):
    change(copy / "transformer", num_layers=1)
    with pytest.raises(
        TeacherError,
        match=r"transformer: its config.json has no place for \d+ of its weights.* blocks.1.",
    ):
        load_transformer(copy)


@pytest.mark.parametrize("key", ["teacher", "student", "prompts"])
def test_files_that_changed_since_the_run_was_resolved_are_not_loaded(key, tiny_wan, copy):
    keys = {"teacher": str(tiny_wan), "student": str(copy), "prompts": str(copy / "prompts.txt")}
    if key == "teacher":
        keys = {"teacher": str(copy)}
    config = resolve(RUN | keys)
    assert pipeline_of(config, torch.device("cpu")).folder == Path(config.teacher)
    if key == "student":
        change(copy / "transformer", eps=1e-5)
    else:
        (copy / "prompts.txt").write_text("a blue circle\n")
    with pytest.raises(
        TeacherError, match=f"{key} .* has changed since the run was resolved"
    ) as caught:
        pipeline_of(config, torch.device("cpu"))
    assert "\n" not in str(caught.value)


def test_weights_of_another_shape_are_one_line(copy):
    change(copy / "transformer", ffn_dim=64)
    with pytest.raises(TeacherError) as caught:
        load_pipeline(str(copy), torch.device("cpu"))
    message = str(caught.value)
    assert message.startswith(f"cannot load {copy}/transformer: blocks.")
    assert message.endswith("but got torch.Size([32])")
    change(copy / "text_encoder", d_ff=77)
    with pytest.raises(
        TeacherError,
        match=r"text_encoder: 3 weights are missing or have the wrong shape, e.g. encoder.block",
    ):
        load_texts(str(copy), torch.device("cpu")).encode_text(["a red circle"])


def test_a_student_of_other_latents_or_texts_is_refused(tiny_wan, copy):
    pair = {"teacher": str(tiny_wan), "student": str(copy)}
    change(copy / "transformer", text_dim=32)
    message = "its text width is 32, but that of the teacher tiny-wan is 16"
    assert f"student broken: {message}" in refused(**pair)
    change(copy / "transformer", text_dim=16, in_channels=16, out_channels=16)
    message = "its number of latent channels is 16, but that of the teacher tiny-wan is 4"
    assert f"student broken: {message}" in refused(**pair)
    assert "no teacher 'nowhere'" in refused(teacher=str(tiny_wan), student="nowhere")
    assert "gaussian" in refused(teacher="gaussian", student=str(tiny_wan))


def test_a_student_enters_the_id_by_content(tiny_wan, copy):
    """A run without a student keeps the id from before the key `student` existed."""
    assert run_id(resolve({"method": "dmd2"}).model_copy(update=OLD_RUN)) == OLD_RUN_ID
    moved = Path(shutil.copytree(copy, copy.with_name("moved")))
    without, original, elsewhere = (
        run_id(resolve(RUN | {"teacher": str(tiny_wan), "student": student}))
        for student in (None, str(copy), str(moved))
    )
    assert original == elsewhere != without


def test_a_student_of_another_width_cannot_share_the_teachers_heads(tiny_wan, copy):
    change(copy / "transformer", num_attention_heads=1)
    gan = {"name": "dmd2", "gan": "fake_score"}
    message = "features of the teacher's width 24, but the student's features have width 12"
    refusal = refused(method=gan, teacher=str(tiny_wan), student=str(copy))
    assert f"has heads on {message}" in refusal


def test_the_hash_of_a_large_teacher_is_cached_until_a_file_changes(copy, tmp_path, monkeypatch):
    expected = contents.content_hash(copy)
    monkeypatch.setattr(contents, "LARGE", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    contents.hash_of.cache_clear()
    assert contents.content_hash(copy) == expected
    (cached,) = (tmp_path / "cache" / "distill-bench" / "hashes").iterdir()
    cached.write_text("from-the-cache")
    contents.hash_of.cache_clear()
    assert contents.content_hash(copy) == "from-the-cache"
    change(copy / "transformer", ffn_dim=64)
    assert contents.content_hash(copy) not in (expected, "from-the-cache")


def test_a_tokenizer_that_is_only_a_sentencepiece_model_is_read(tmp_path):
    """CogVideoX and LTX-Video ship such a tokenizer: ids are sentencepiece's, then </s>."""
    lines = ["a red circle moving left", "a blue square moving right", "circle and square"]
    (tmp_path / "text").write_text("\n".join(lines * 40))
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(folder / "spiece"),
        vocab_size=28,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    config = {
        "tokenizer_class": "T5Tokenizer",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "extra_ids": 0,
        "model_max_length": 226,
        "legacy": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    ids = transformers.AutoTokenizer.from_pretrained(folder)("a red square moving").input_ids
    assert ids == [*reference.encode("a red square moving"), 1]
