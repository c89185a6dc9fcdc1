"""Model card of an export: origin, scores, and a snippet that runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from export_runs import SMALL_RUN, snippet_of
from safetensors.torch import load_file

from distill_bench.config.resolve import load_run, resolve
from distill_bench.evaluate.score import evaluate
from distill_bench.export import __main__ as export_main
from distill_bench.export import card, pipeline
from distill_bench.networks.pipeline import load_transformer
from distill_bench.sample.clip_files import read_clip
from distill_bench.sample.run import sample
from distill_bench.teachers.architecture import architecture_of

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "run", [("wan21", "dmd2"), ("cogvideox", "sgmd")], indirect=True, ids="-".join
)
def test_an_export_states_its_origin_and_is_the_student_of_further_runs(run, tmp_path):
    """Wan's class keeps some weights in float32."""
    out = tmp_path / "student"
    scores = evaluate(sample(run)[-1], {}, ["motion"])
    assert export_main.main([str(run), str(out), "--dtype", "bfloat16"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    config = load_run(run)
    weights = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
    dtypes = {torch.bfloat16}
    if Path(config.teacher).name.startswith("wan"):
        dtypes.add(torch.float32)
    assert {weight.dtype for weight in weights.values()} == dtypes
    text = (out / "README.md").read_text()
    rows = [f"| {score['title']} | {score['value']:.4g} |" for score in scores]
    call = "num_inference_steps=3, guidance_scale=1.0"
    for fact in (run.name, config.teacher_hash, call, "Licence", *rows):
        assert fact in text, fact
    guided = config.model_copy(update={"negative_prompt": "a | b\nc"})
    row = r"| negative prompt of the teacher | a \| b c |"
    assert row in card.card(run, guided, "renoise", guided.student_updates, "student", [])
    assert "negative prompt" not in text
    size = {key: getattr(config, key) for key in ("teacher", "frames", "height", "width")}
    further = resolve(SMALL_RUN | size | {"method": "dmd2", "student": str(out)})
    assert further.student_hash
    architecture = load_transformer(out).architecture
    assert architecture.unlike(architecture) is None


@pytest.mark.parametrize("run", [("cogvideox", "dmd2")], indirect=True, ids="-".join)
def test_the_cards_snippet_runs_in_a_fresh_interpreter(run, tmp_path):
    """Its scheduler's class is ours, so the snippet must import it."""
    code = snippet_of(pipeline.export(run, tmp_path / "student"))
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    written = read_clip(tmp_path / "clip.mp4")
    assert written.fps == 8 and written.frames.shape == (9, 3, 32, 32)


@pytest.mark.parametrize("run", [("wan21", "dmd2")], indirect=True, ids="-".join)
def test_the_card_separates_the_teachers_name_and_revision(run):
    config = load_run(run)
    architecture = architecture_of(Path(config.teacher))
    config = config.model_copy(update={"teacher": "owner/name@v1.0"})
    index = {"scheduler": ["diffusers", "S"]}
    call = card.snippet(config, "renoise", architecture, "student", index, lora=True)
    text = card.card(run, config, "renoise", 2, "student", call)
    assert "\nbase_model: owner/name\n" in text
    assert '.from_pretrained("owner/name", revision="v1.0")' in text
