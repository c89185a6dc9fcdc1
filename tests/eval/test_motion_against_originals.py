"""Motion from uint8 clips to score, against VBench's definition, opencv and torchvision's RAFT."""

import dataclasses
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from textures import textured_clips
from torch.nn.functional import interpolate
from torchvision.transforms.v2.functional import resize

from distill_bench.domain import controls
from distill_bench.eval import motion as motion_module
from distill_bench.eval.motion import Motion, speeds
from distill_bench.evaluate import optical_flow
from distill_bench.evaluate.optical_flow import farneback_flow, raft_flow
from distill_bench.evaluator import Clips


def known_flow(clip: torch.Tensor) -> torch.Tensor:
    """Flow that can be read off the frames: a quarter pixel per level of red (x) and green (y)."""
    return clip[:, :2].float().diff(dim=0) / 4


def clips_of_known_flow(frames: int, fps: float) -> Clips:
    """A tenth of the pixels step now and then, more often from clip to clip."""
    draw = np.random.default_rng(frames)
    share = np.linspace(0.05, 0.7, 16)[:, None]
    steps = np.where(draw.random((16, frames - 1)) < share, draw.integers(1, 7, (16, 1)), 0)
    level = np.pad(steps.cumsum(1), ((0, 0), (1, 0)))
    values = np.full((16, frames, 3, 32, 40), 20, dtype=np.uint8)
    values[:, :, 0, 3:, 4:8] += level[:, :, None, None].astype(np.uint8)
    return Clips(values, ["a"] * 16, list(range(16)), fps)


def vbench(clip: np.ndarray, fps: float) -> float:
    """Dynamic degree of one clip by the rules of VBench, dynamic_degree.py@45e79ec."""
    frames = clip[:: max(1, round(fps / 8))]
    height, width = frames.shape[2:]
    dynamic_pairs = 0
    for x, y in known_flow(torch.from_numpy(frames)).numpy():
        fastest_first = -np.sort(-np.sqrt(x**2 + y**2).ravel())
        top = fastest_first[: int(0.05 * height * width)].mean()
        dynamic_pairs += top > 6.0 * (min(height, width) / 256)
    return float(dynamic_pairs >= round(4 * len(frames) / 16))


RATES = [(8, 8.0), (16, 16.0), (20, 20.0), (17, 12.0), (10, 4.0), (40, 23.976), (33, 30.0)]


def dynamic_degrees(clips: Clips) -> np.ndarray:
    scores = Motion().scores(clips, {})
    return np.array(next(s.per_clip for s in scores if s.column == "dynamic_degree"))


@pytest.fixture
def flow_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(motion_module, "flow_method", lambda frames, raft: ("known", known_flow))


@pytest.mark.parametrize("frames, fps", RATES)
@pytest.mark.usefixtures("flow_is_known")
def test_the_dynamic_degree_is_that_of_vbench(frames, fps):
    clips = clips_of_known_flow(frames, fps)
    expected = [vbench(clip, fps) for clip in clips.frames]
    assert dynamic_degrees(clips).tolist() == expected
    assert 0.1 < np.mean(expected) < 0.95, "some clips are dynamic and some are not"


WRONG_CLIPS = {
    "the rate is taken for 8": lambda c: dataclasses.replace(c, fps=8.0),
    "the rate is doubled": lambda c: dataclasses.replace(c, fps=2 * c.fps),
    "every second frame": lambda c: dataclasses.replace(c, frames=c.frames[:, ::2]),
    "blue first": lambda c: dataclasses.replace(c, frames=c.frames[:, :, ::-1].copy()),
    "range 0 to 1": lambda c: dataclasses.replace(c, frames=c.frames // 255),
    "T and C swapped": lambda c: dataclasses.replace(
        c, frames=c.frames.swapaxes(1, 2).reshape(c.frames.shape)
    ),
    "frames twice as large": lambda c: dataclasses.replace(
        c, frames=c.frames.repeat(2, 3).repeat(2, 4)
    ),
}


@pytest.mark.parametrize("mistake", [*WRONG_CLIPS, "all pixels", "the fastest 20 %"])
@pytest.mark.usefixtures("flow_is_known")
def test_a_mistake_in_the_dynamic_degree_is_caught(mistake, monkeypatch):
    """More than one clip in twenty changes sides; the tolerance is none."""
    changed = []
    for frames, fps in RATES[:3]:
        clips = clips_of_known_flow(frames, fps)
        if mistake in WRONG_CLIPS:
            wrong = WRONG_CLIPS[mistake](clips)
        else:
            wrong = clips
            monkeypatch.setattr(motion_module, "TOP", 1.0 if mistake == "all pixels" else 0.2)
        changed += list(dynamic_degrees(wrong) != [vbench(clip, fps) for clip in clips.frames])
    assert np.mean(changed) > 0.05


@pytest.mark.parametrize("size", [(32, 64), (64, 32)])
def test_one_pair_of_four_frames_above_the_threshold_of_the_shorter_side_is_enough(size):
    """0.75 pixels per frame of 32."""
    sample = Clips(np.zeros((2, 4, 3, *size), np.uint8), ["a"] * 2, [0, 1])
    top = np.array([[0.8, 0, 0], [0.7, 0.7, 0.7]])
    assert motion_module.dynamic_degree(sample, top, farneback_flow).tolist() == [1, 0]


def top_by_opencv(clip: np.ndarray) -> np.ndarray:
    """Fastest 5 % of each pair of frames, (T - 1,): opencv on BGR frames, as it reads videos."""
    import cv2

    half = []
    for frame in clip:
        bgr = np.ascontiguousarray(frame[::-1].transpose(1, 2, 0))
        size = frame.shape[2] // 2, frame.shape[1] // 2
        half.append(cv2.resize(cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY), size, interpolation=3))
    top = []
    for first, second in pairwise(half):
        flow = cv2.calcOpticalFlowFarneback(
            first,
            second,
            None,
            pyr_scale=0.5,
            levels=4,
            winsize=21,
            iterations=5,
            poly_n=7,
            poly_sigma=1.5,
            flags=0,
        )
        speed = np.sort(np.hypot(*np.moveaxis(flow, -1, 0)).ravel())
        top.append(2 * speed[-int(0.05 * speed.size) :].mean())
    return np.array(top)


FLOW_INPUT = {
    "none": lambda x: x,
    "blue first": lambda x: x[:, ::-1],
    "range 0 to 1": lambda x: x // 255,
    "every second frame": lambda x: x[::2].repeat(2, 0)[: len(x)],
    "T and C swapped": lambda x: x.swapaxes(0, 1).reshape(x.shape),
    "half size": lambda x: x[..., ::2, ::2],
    "nearest": lambda x: x[..., ::2, ::2].repeat(2, -1).repeat(2, -2),
}


@pytest.mark.parametrize("mistake", FLOW_INPUT)
def test_farneback_is_opencvs_and_a_mistake_in_its_input_is_caught(mistake):
    clip = textured_clips(1, 4, 96, 120, seed=0)[0]
    expected = top_by_opencv(clip)
    read = speeds(FLOW_INPUT[mistake](clip)[None], farneback_flow).by_pair[0]
    error = np.abs(read / expected - 1).max()
    assert error < 1e-5 if mistake == "none" else error > 1e-3


def test_farneback_reads_fast_textures_with_opencvs_levels_and_iterations():
    """18 pixels per frame: fewer levels, or more iterations, would read another speed."""
    clip = textured_clips(1, 13, 160, 192, seed=0)[0, ::6]
    read = speeds(clip[None], farneback_flow).by_pair[0]
    assert read == pytest.approx(top_by_opencv(clip), rel=1e-5)


@pytest.fixture(scope="module")
def raft(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, torch.Tensor]:
    """Random weights, a clip, and its flow by the transforms that torchvision publishes."""
    from torchvision.models.optical_flow import Raft_Small_Weights, raft_small

    torch.manual_seed(0)
    net, path = raft_small(weights=None).eval(), tmp_path_factory.mktemp("raft") / "raft.pth"
    torch.save(net.state_dict(), path)
    clip = textured_clips(1, 2, 131, 142, seed=0)[0]
    frames = resize(torch.from_numpy(clip) / 255, (128, 136), antialias=False)
    first, second = Raft_Small_Weights.C_T_V2.transforms()(frames[:1], frames[1:])
    with torch.no_grad():
        flow = net(first, second)[-1]
    return path, clip, flow * torch.tensor([142 / 136, 131 / 128]).reshape(1, 2, 1, 1)


def resized(**settings):
    """Replacement of `interpolate` with other settings."""

    def wrong(x, size, **own):
        merged = own | settings
        return interpolate(x, size, **(settings if "nearest" in settings.values() else merged))

    return wrong


RAFT_INPUT = {
    "none": lambda x: x,
    "blue first": lambda x: x[:, ::-1].copy(),
    "range 0 to 1": lambda x: x / 2 + 127.5,
    "range 0 to 255": lambda x: (x.astype(float) + 1) * 127.5,
    "frames backwards": lambda x: x[::-1].copy(),
}
RAFT_RESIZED = {
    "nearest": resized(mode="nearest"),
    "antialiasing": resized(antialias=True),
    "corners aligned": resized(align_corners=True),
}


RAFT_MISTAKES = [*RAFT_INPUT, *RAFT_RESIZED][1:]


@pytest.mark.parametrize(
    "mistake", ["none", *(pytest.param(name, marks=pytest.mark.slow) for name in RAFT_MISTAKES)]
)
def test_raft_is_torchvisions_and_a_mistake_in_its_input_is_caught(raft, mistake, monkeypatch):
    path, clip, expected = raft
    if mistake in RAFT_RESIZED:
        monkeypatch.setattr(optical_flow, "interpolate", RAFT_RESIZED[mistake])
    frames = RAFT_INPUT.get(mistake, RAFT_INPUT["none"])(clip)
    flow = raft_flow(path)[1](torch.from_numpy(frames))
    error = ((flow - expected).norm() / expected.norm()).item()
    assert error < 1e-4 if mistake == "none" else error > 1e-3


def test_one_scene_at_two_rates_moves_alike_per_second():
    """Half the pace at 16 frames per second is the scene at 8."""
    diagonals = []
    for pace, fps in ((1.0, 8.0), (0.5, 16.0), (0.5, 8.0)):
        frames, prompts = controls.rendered(36, 0, pace)
        scores = Motion().scores(Clips(frames, prompts, list(range(36)), fps), {})
        diagonals.append(next(s.value for s in scores if s.column == "motion_diagonals"))
    assert diagonals[1] == pytest.approx(diagonals[0], rel=0.03)
    assert diagonals[2] == pytest.approx(diagonals[0] / 2, rel=0.03), "a rate taken for 8 shows"
