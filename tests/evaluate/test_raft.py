"""RAFT: which weights are read, by which name, on which frames and in which batches."""

import numpy as np
import pytest
import torch
from torchvision.models.optical_flow import raft_large, raft_small

from distill_bench.eval.motion import Motion
from distill_bench.evaluate.optical_flow import RAFT_PIXELS, raft_flow
from distill_bench.evaluator import Clips
from distill_bench.store.files import sha256


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("raft") / "raft.pth"
    torch.save(raft_small(weights=None).state_dict(), path)
    return path


@pytest.mark.parametrize("size", ["small", "large"])
def test_the_name_has_the_size_of_the_network_and_eight_digits_of_the_weights_digest(
    size, tmp_path
):
    path = tmp_path / "raft.pth"
    make = {"small": raft_small, "large": raft_large}[size]
    torch.save(make(weights=None).state_dict(), path)
    assert raft_flow(path)[0] == f"raft-{size}#{sha256(path)[:8]}"


def test_a_file_of_other_python_objects_is_refused(tmp_path):
    path = tmp_path / "raft.pth"
    torch.save({"path": path}, path)
    with pytest.raises(ValueError, match=r"raft.pth holds no weights"):
        raft_flow(path)
    with pytest.raises(ValueError, match=r"raft.pth holds no weights"):
        Motion(raft=str(path)).reason_to_skip(None)


@pytest.mark.parametrize("height, width", [(120, 200), (200, 120)])
def test_frames_with_a_side_below_128_are_refused(height, width, weights):
    with pytest.raises(ValueError, match=f"frames are {height}x{width}; RAFT needs 128x128"):
        raft_flow(weights)[1](torch.zeros(2, 3, height, width, dtype=torch.uint8))


@pytest.mark.parametrize(
    "device, pairs", [("cpu", 1), ("meta", RAFT_PIXELS // (128 * 136)), ("meta, large", 1)]
)
def test_pairs_of_frames_run_alone_on_the_processor_and_many_at_once_elsewhere(
    device, pairs, weights
):
    """The meta device stands for a GPU; larger frames than fit run alone there, too."""
    flow, size = raft_flow(weights)[1], (128, 136)
    if device == "meta, large":
        size = (RAFT_PIXELS // 128, 136)
    device = torch.device(device.partition(",")[0])
    clip = torch.zeros(3, 3, *size, dtype=torch.uint8, device=device)
    assert flow.to(device)(clip).shape == (2, 2, *size)
    assert flow.fitting.size == pairs


def test_motion_is_read_by_the_given_weights(weights):
    frames = np.zeros((2, 2, 3, 128, 136), np.uint8)
    scores = Motion(raft=str(weights)).scores(Clips(frames, [""] * 2, [0, 1]), {})
    extractors = {score.extractor for score in scores if score.column.startswith("motion")}
    assert extractors == {raft_flow(weights)[0]}
