"""Prompt files, and embeddings: encoded once per store."""

import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors import safe_open

from distill_bench.config.errors import ConfigError
from distill_bench.config.identity import run_id
from distill_bench.config.resolve import resolve
from distill_bench.config.yaml_files import dump_yaml
from distill_bench.networks import embed as embedding
from distill_bench.networks import pipeline, text_pipeline
from distill_bench.networks.pipeline import load_pipeline
from distill_bench.teachers import embeddings
from distill_bench.teachers.embeddings import Embeddings
from distill_bench.teachers.folder import TeacherError
from distill_bench.teachers.prompts import read_prompts
from distill_bench.train.loop import train

PROMPTS = ["a red circle", "a blue square moving left", "a circle moving right"]
RUN = {
    "method": "dmd2",
    "student_updates": 1,
    "fake_score_updates": 1,
    "batch_size": 2,
    "nfe": 2,
    "frames": 5,
    "height": 16,
    "width": 16,
    "trackers": [],
    "signals_every": None,
}


@pytest.fixture
def prompts(tmp_path) -> Path:
    """A file with PROMPTS."""
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n\n")
    return path


@pytest.fixture
def bare(tiny_wan, tmp_path) -> Path:
    """The tiny teacher without its text encoder."""
    return Path(
        shutil.copytree(tiny_wan, tmp_path / "bare", ignore=shutil.ignore_patterns("text_encoder"))
    )


def run_of(teacher: Path, prompts: Path, store: Path, **fields) -> Path:
    """Write a run folder in a store."""
    run = store / "run"
    run.mkdir(parents=True, exist_ok=True)
    config = resolve(RUN | {"teacher": str(teacher), "prompts": str(prompts)} | fields)
    (run / "run.yaml").write_text(dump_yaml(config.model_dump(mode="json")))
    return run


def test_the_three_formats_of_prompt_files_give_the_same_prompts(tmp_path, prompts):
    json_lines, vbench = tmp_path / "p.jsonl", tmp_path / "VBench.json"
    lines = [json.dumps({"prompt": p, "seed": i}) for i, p in enumerate(PROMPTS)]
    json_lines.write_text("\n".join(lines) + "\n")
    entries = [{"prompt_en": p, "dimension": ["color"], "auxiliary_info": {}} for p in PROMPTS]
    vbench.write_text(json.dumps(entries))
    assert read_prompts(prompts) == read_prompts(json_lines) == read_prompts(vbench) == PROMPTS


def test_a_byte_order_mark_and_outer_spaces_are_not_part_of_a_prompt(tiny_wan, tmp_path):
    """`embed` and training read the same prompts from a teacher's prompts.txt."""
    teacher = Path(shutil.copytree(tiny_wan, tmp_path / "teacher"))
    (teacher / "prompts.txt").write_text(
        "".join(f" {prompt} \n" for prompt in PROMPTS), encoding="utf-8-sig"
    )
    assert read_prompts(teacher / "prompts.txt") == PROMPTS
    assert load_pipeline(str(teacher), torch.device("cpu")).prompts() == PROMPTS


def test_prompts_that_are_too_long_are_named(tiny_wan, tmp_path, capsys):
    (tmp_path / "long.txt").write_text("a red circle\n" + "a blue square moving left " * 9 + "\n")
    embedding.embed(str(tiny_wan), [tmp_path / "long.txt"], tmp_path / "store")
    warning = capsys.readouterr().err
    assert "1 of 3 prompts are longer than the 8 tokens that tiny-wan takes" in warning
    assert "and are truncated, e.g. 'a blue square" in warning
    embedding.embed(str(tiny_wan), [tmp_path / "long.txt"], tmp_path / "store")
    assert capsys.readouterr().err == ""


def test_only_a_line_feed_ends_a_prompt(tmp_path):
    """Other separators (U+2028, form feed) may be part of a prompt."""
    odd = ["one\u2028and two", "three\x0cand four", "five\u0085six", "a\rb\x0b\x1c\x1d\x1e\u2029c"]
    for name, text in (
        ("a.txt", "\r\n".join(odd)),
        ("A.JSONL", "\r\n".join(json.dumps(p, ensure_ascii=False) for p in odd)),
        ("a.jsonl", "\n".join(json.dumps(p, ensure_ascii=False) for p in odd)),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        assert read_prompts(tmp_path / name) == odd


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n \n", "the file has no prompts"),
        ("a.csv", "prompt,seed\na red circle,1\n", "tables are not read; write one prompt per"),
        ("a.jsonl", '{"prompt": "x"}\n{"text": "y"}\n', "line 2: prompt: Field required"),
        ("a.jsonl", '{"prompt": "x", "seed": -1}\n', "line 1: seed: Input should be greater"),
        ("a.jsonl", '{"prompt": "x", "Seed": 1}\n', "line 1: unknown key 'Seed'; write 'seed'"),
        ("a.jsonl", "{", "line 1: not JSON"),
        ("a.json", '["x", 3]', "entry 2: "),
        ("a.json", '["x", " "]', "entry 2: prompt: String should have at least 1 character"),
        (
            "a.jsonl",
            '{"prompt": "x"}\n{"prompt": "\\ud800"}\n',
            "line 2: prompt: Input should be a valid string",
        ),
        (
            "a.json",
            '{"prompts": ["x"]}',
            "expected a list of strings or of {'prompt': TEXT}, found dict",
        ),
        ("a.json", "null", "found null"),
        ("none.txt", None, "No such file"),
    ],
)
def test_a_malformed_prompt_file_is_refused_in_one_line(name, text, message, tmp_path, tiny_wan):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        resolve(RUN | {"teacher": str(tiny_wan), "prompts": str(path)})
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cached_embeddings_equal_the_text_encoders(tiny_wan, prompts, tmp_path):
    """Trailing zero rows are not stored; reading restores them."""
    folder, encoded = embedding.embed(str(tiny_wan), [prompts], tmp_path)
    assert encoded == len(PROMPTS) + 1, "the prompts and the null text"
    (shard,) = folder.glob("*.safetensors")
    with safe_open(shard, "pt") as file:
        names = file.keys()  # a safe_open file is not iterable
        lengths = [file.get_tensor(name).shape[0] for name in names]
    assert sorted(lengths) == [0, 3, 4, 5]
    fresh = load_pipeline(str(tiny_wan), torch.device("cpu"))
    stored = load_pipeline(str(tiny_wan), torch.device("cpu"), store=tmp_path)
    expected = fresh.encode_text([*PROMPTS, ""])
    with mock.patch.object(
        text_pipeline.TextPipeline,
        "text_encoder_pipeline",
        side_effect=AssertionError("the text encoder was loaded"),
    ):
        torch.testing.assert_close(stored.encode_text([*PROMPTS, ""]), expected, rtol=0, atol=0)
        texts = stored.texts(PROMPTS)
        torch.testing.assert_close(torch.cat([*texts, texts.null_text]), expected, rtol=0, atol=0)


def test_cached_prompts_are_not_encoded_again(tiny_wan, prompts, tmp_path):
    more = tmp_path / "more.txt"
    more.write_text(f"{PROMPTS[0]}\na red square\n")
    assert embedding.embed(str(tiny_wan), [prompts], tmp_path)[1] == 4
    folder, encoded = embedding.embed(str(tiny_wan), [prompts, more], tmp_path)
    assert encoded == 1
    assert len(list(folder.glob("*.safetensors"))) == 2
    assert embedding.embed(str(tiny_wan), [prompts, more], tmp_path)[1] == 0


def test_a_damaged_shard_is_named_in_one_line(tiny_wan, prompts, tmp_path, capsys):
    folder, _ = embedding.embed(str(tiny_wan), [prompts], tmp_path)
    (shard,) = folder.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(SystemExit) as ended:
        embedding.main([str(tiny_wan), str(prompts), "--store", str(tmp_path)])
    message = capsys.readouterr().err
    assert ended.value.code == 2
    assert f"embeddings {shard} cannot be read" in message
    assert "remove the file" in message
    assert message.count("\n") == 1
    shard.unlink()
    assert embedding.embed(str(tiny_wan), [prompts], tmp_path)[1] == len(PROMPTS) + 1


def test_encoding_resumes_after_the_last_complete_shard(tiny_wan, prompts, tmp_path, monkeypatch):
    write = embeddings.write_shard

    def fail_after_one_shard(folder: Path, *shard) -> None:
        if list(folder.glob("*")):
            raise OSError("full")
        write(folder, *shard)

    monkeypatch.setattr(text_pipeline, "PROMPTS_PER_SHARD", 2)
    monkeypatch.setattr(text_pipeline, "write_shard", fail_after_one_shard)
    with pytest.raises(OSError, match="full"):
        embedding.embed(str(tiny_wan), [prompts], tmp_path)
    monkeypatch.setattr(text_pipeline, "write_shard", write)
    assert embedding.embed(str(tiny_wan), [prompts], tmp_path)[1] == 2


def test_training_reads_embeddings_and_needs_no_text_encoder(tiny_wan, bare, prompts, tmp_path):
    embedding.embed(str(tiny_wan), [prompts], tmp_path)
    assert train(run_of(bare, prompts, tmp_path))["status"] == "done"


def test_a_prompt_without_an_embedding_is_refused_with_the_command_to_encode_it(
    tiny_wan, bare, prompts, tmp_path
):
    with pytest.raises(
        TeacherError,
        match=r"'a red circle' has no embedding \(4 of 4 have none\).*distill-bench embed TEACHER",
    ):
        train(run_of(bare, prompts, tmp_path))
    embedding.embed(str(tiny_wan), [prompts], tmp_path)
    prompts.write_text("a red circle\nright\n")
    with pytest.raises(
        TeacherError, match=r"'right' has no embedding \(1 of 3 have none\)"
    ) as caught:
        train(run_of(bare, prompts, tmp_path))
    assert "\n" not in str(caught.value)


def test_a_run_encodes_missing_prompts_before_it_loads_a_network(
    tiny_wan, prompts, tmp_path, monkeypatch
):
    folder, _ = embedding.embed(str(tiny_wan), [prompts], tmp_path)
    prompts.write_text("a red circle\nright\n")
    load, encoded_before_load = pipeline.load_transformer, []

    def check_and_load(transformer_folder: Path, *expert: str):
        encoded_before_load.append("right" in Embeddings(folder))
        return load(transformer_folder, *expert)

    monkeypatch.setattr(pipeline, "load_transformer", check_and_load)
    assert train(run_of(tiny_wan, prompts, tmp_path))["status"] == "done"
    assert encoded_before_load
    assert all(encoded_before_load)
    assert len(list(folder.glob("*.safetensors"))) == 2


def test_prompts_enter_the_id_by_content(tiny_wan, prompts, tmp_path):
    json_lines = tmp_path / "p.jsonl"
    json_lines.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    as_text, as_json, without = (
        run_id(resolve(RUN | {"teacher": str(tiny_wan), "prompts": file}))
        for file in (str(prompts), str(json_lines), None)
    )
    assert as_text == as_json != without
    with pytest.raises(ConfigError, match="a gaussian teacher has prompts of its own"):
        resolve({"method": "dmd2", "teacher": "gaussian", "prompts": str(prompts)})


def test_ranks_share_the_prompts(tiny_wan, prompts, tmp_path, monkeypatch):
    """In torchrun's environment, each of two ranks encodes every second prompt."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert embedding.embed(str(tiny_wan), [prompts], tmp_path)[1] == 2
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    assert embedding.embed(str(tiny_wan), [prompts], tmp_path)[1] == 0


def test_keys_of_prompts_that_nothing_reads_are_named_once_but_not_vbench_s(tmp_path, capsys):
    entries = [{"prompt": "a", "negative_prompt": "b"}, {"prompt_en": "c", "dimension": ["d"]}]
    (tmp_path / "p.json").write_text(json.dumps(entries))
    for _ in range(2):
        assert read_prompts(tmp_path / "p.json") == ["a", "c"]
    (line,) = capsys.readouterr().err.splitlines()
    assert "p.json: keys that are not used: 'negative_prompt' (1 times); known: prompt" in line
