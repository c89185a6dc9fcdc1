"""Rows that train nothing and further ways of students, on a tiny Wan pipeline."""

import shutil
from pathlib import Path

import numpy as np
import torch
from runs import TINY_RUN
from safetensors.torch import load_file, save_file

from distill_bench.config.resolve import load_run, resolve
from distill_bench.config.rows.row import UNTRAINED, ReleasedRow, RowConfig, released_rows
from distill_bench.config.rows.sampling import own_sampling
from distill_bench.config.yaml_files import dump_yaml
from distill_bench.networks.denoiser import Denoiser
from distill_bench.networks.ledger import Ledger
from distill_bench.networks.pipeline import load_networks, load_pipeline, load_transformer
from distill_bench.sample.rows import sample_further, sample_row
from distill_bench.sample.sampler import Sampler
from distill_bench.store.files import read_json
from distill_bench.train import checkpoint


def clips(folder: Path) -> np.ndarray:
    return np.load(folder / "clips.npy")


def test_a_row_is_guided_by_its_own_scale_away_from_the_negative_prompt(tiny_wan):
    """Both steps of an ODE: u + 3 (c - u)."""
    protocol = TINY_RUN["protocol"] | {"negative_prompt": "a blue square"}
    config = resolve(TINY_RUN | {"teacher": str(tiny_wan), "protocol": protocol})
    entry = ReleasedRow(
        name="x", network=str(tiny_wan), sigmas=(1, 0.5), stepping="ode", guidance_scale=3
    )
    ((row, _),) = released_rows([entry], config).values()
    sampler, net = Sampler(config), load_networks(tiny_wan)
    noise, text = torch.randn(2, *sampler.shape), sampler.texts.rows(range(2))
    null = load_pipeline(str(tiny_wan), torch.device("cpu")).encode_text(["a blue square"])
    denoiser = Denoiser(net, "student", Ledger(1))

    def guided(x_t: torch.Tensor, sigma: float) -> torch.Tensor:
        levels = torch.full((2,), sigma)
        cond, uncond = (denoiser(x_t, levels, t) for t in (text, null.expand_as(text)))
        return uncond + 3 * (cond - uncond)

    with torch.no_grad():
        x0 = guided(noise, 1.0)
        expected = guided(x0 + 0.5 * (noise - x0), 0.5)
        latents = sampler.student_latents(net, row.sampling)([noise, noise], text)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)


def test_the_untrained_row_is_the_network_from_which_students_start(tiny_wan, make_run, tmp_path):
    other = Path(shutil.copytree(tiny_wan, tmp_path / "other"))
    path = other / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: 1.1 * tensor for name, tensor in load_file(path).items()}, path)
    folder = make_run("row", student=str(other))
    config = load_run(folder)
    row = RowConfig(label="untrained", network=UNTRAINED, sampling=own_sampling(config))
    expected = Sampler(config).student(load_networks(other), row.sampling).frames(0, 2)
    target = sample_row(folder, row)
    np.testing.assert_array_equal(clips(target), expected)
    assert read_json(target / "row.json")["kind"] == "untrained"


def test_a_further_way_samples_the_last_kept_student(tiny_wan, make_run):
    run, start = (
        make_run("run", protocol=TINY_RUN["protocol"] | {"fps": 12}),
        load_transformer(tiny_wan).state_dict(),
    )
    config = load_run(run)
    for updates in (2, 10, 9):
        student = {name: tensor + 0.01 * updates for name, tensor in start.items()}
        checkpoint.save_student(run, updates, student)
    way = own_sampling(config).model_copy(update={"nfe": 1})
    (run / "samplings").mkdir()
    (run / "samplings" / "one.yaml").write_text(dump_yaml(way.model_dump(mode="json")))
    (folder,) = sample_further(run)
    net = load_networks(tiny_wan)
    net.load_state_dict(load_file(run / "students" / "10.safetensors"))
    expected = Sampler(config).student(net, way).frames(0, 2)
    np.testing.assert_array_equal(clips(folder), expected)
    about = {"kind": "student", "fps": config.protocol.fps, "sampling": way.name}
    assert about.items() <= read_json(folder / "row.json").items()
