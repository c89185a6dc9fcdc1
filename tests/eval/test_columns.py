"""Columns of every evaluator: their names, titles, units and directions, as tables show them."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from distill_bench.domain import controls, shapes
from distill_bench.domain.mixture import PROMPTS, motion_mixture
from distill_bench.eval.attributes import AttributeAccuracy
from distill_bench.eval.clip_score import CLIPScore
from distill_bench.eval.diversity import Diversity
from distill_bench.eval.exact_divergence import ExactDivergence
from distill_bench.eval.fidelity import Fidelity
from distill_bench.eval.fvd import FVD
from distill_bench.eval.mixture_truth import MixtureTruth
from distill_bench.eval.motion import Motion
from distill_bench.evaluator import Clips, Evaluator
from distill_bench.networks.pipeline import load_pipeline

README = Path(__file__).parents[2] / "eval" / "README.md"
TEACHER, SEEDS = "to the teacher's clips", "over that of other seeds"
FD = "FD[indomain-r2p1-cls]"
FRAMES = "averages single frames: blind to their order, a clip backwards scores the same"
WHOLE = "sees whole clips: their direction and speed"
PIXELS, LEVELS = "px/frame", "of 255"

WEIGHTS = motion_mixture().weights
ENTROPY = -float((WEIGHTS * WEIGHTS.log()).sum(1).mean())

# column: title, unit, what is better, note
COLUMNS: dict[type[Evaluator], dict[str, tuple[str, str, str | None, str | None]]] = {
    FVD: {
        "fvd": (f"{FD}, {TEACHER}", "", "lower", None),
        "kvd": (f"KVD, {TEACHER}", "", "lower", None),
        "fvd_infinity": (f"{FD} of infinite clips, {TEACHER}", "", "lower", None),
        "fvd_over_floor": (f"{SEEDS}, {TEACHER}", "", "one", None),
        "fvd_data": (f"{FD}, to data", "", "lower", None),
        "kvd_data": ("KVD, to data", "", "lower", None),
        "fvd_infinity_data": (f"{FD} of infinite clips, to data", "", "lower", None),
        "fvd_over_floor_data": (f"{SEEDS}, to data", "", "one", None),
        "fvd_random": (f"FD[random-r2p1], {TEACHER}", "", "lower", None),
        "fvd_random_data": ("FD[random-r2p1], to data", "", "lower", None),
    },
    CLIPScore: {
        "clip_score": ("CLIP score (frames)", "", "higher", FRAMES),
        "clip_r1": ("R@1 of 2 captions, CLIP", "", "higher", FRAMES),
        "clip_video": ("video CLIP score", "", "higher", WHOLE),
        "clip_video_r1": ("R@1 of 6 captions, video CLIP", "", "higher", WHOLE),
    },
    Motion: {
        "motion": ("motion, fastest 5 %", PIXELS, None, None),
        "motion_mean": ("motion, all pixels", PIXELS, None, None),
        "motion_diagonals": ("motion, fastest 5 %", "% of the diagonal/s", None, None),
        "motion_floor": ("motion read off still noisy frames", PIXELS, None, None),
        "flicker": ("change between frames", LEVELS, None, None),
        "dynamic_degree": ("dynamic degree[lucas-kanade]", "", None, None),
        "motion_still": ("share of still clips", "", None, None),
        "motion_still_teacher": ("share of still clips, the teacher's", "", None, None),
        "motion_ratio": ("motion / teacher's", "", "one", None),
        "motion_w1": ("W1 of motion to the teacher's", PIXELS, "lower", None),
        "motion_w1_over_floor": (f"W1 of motion {SEEDS}", "", "one", None),
        "motion_spread_ratio": ("spread of motion within prompts / teacher's", "", "one", None),
        "motion_true": ("speed of the body (oracle)", PIXELS, None, None),
        "motion_still_true": ("share of still clips", "", None, None),
        "motion_still_teacher_true": ("share of still clips, the teacher's", "", None, None),
        "motion_ratio_true": ("speed of the body / teacher's", "", "one", None),
        "motion_w1_true": ("W1 of speed of the body to the teacher's", PIXELS, "lower", None),
        "motion_w1_over_floor_true": (f"W1 of speed of the body {SEEDS}", "", "one", None),
        "motion_spread_ratio_true": (
            "spread of speed of the body within prompts / teacher's",
            "",
            "one",
            None,
        ),
    },
    Diversity: {
        "copies": ("share of copies", "", "lower", "nearer than 1 of 255"),
        "diversity": ("spread of a prompt's clips", LEVELS, None, None),
        "diversity_ratio": ("diversity / teacher's", "", "one", None),
        "recall": ("teacher's clips within reach", "", "higher", None),
        "coverage": ("teacher's clips with a clip near", "", "higher", None),
    },
    AttributeAccuracy: {
        "attribute_accuracy": ("all attributes right", "", "higher", None),
        "attribute_colour": ("colour right", "", "higher", None),
        "attribute_shape": ("shape right", "", "higher", None),
        "attribute_direction": ("direction right", "", "higher", None),
        "attribute_speed": ("speed right", "", "higher", None),
        "attribute_histogram": (
            "distance of what is shown from what is asked",
            "",
            "lower",
            "total variation of the histograms, mean over colour, shape, direction, speed",
        ),
    },
    Fidelity: {
        f"{name}{suffix}": (f"{name}{title}", unit, better, None)
        for suffix, title, unit, better in (
            ("", "", LEVELS, None),
            ("_ratio", " / teacher's", "", "one"),
        )
        for name in ("saturation", "contrast", "sharpness")
    },
    MixtureTruth: {
        "mode_tv": ("mode weights, total variation to data", "", "lower", None),
        "mode_entropy": ("entropy of mode weights", "nats", None, f"of the data: {ENTROPY:.3f}"),
        "lost_modes": (
            "lost modes per prompt",
            "",
            "lower",
            "with a share below 0.1 of their weight; 17 modes",
        ),
        "mixture_motion_ratio": ("latent motion / data's", "", "one", None),
        "mixture_motion_w1": ("W1 of latent motion to data", "", "lower", None),
        "mixture_motion_spread_ratio": (
            "spread of latent motion within prompts / data's",
            "",
            "one",
            None,
        ),
        "mixture_energy": ("energy distance to data", "", "lower", None),
        "mixture_motion_energy": (
            "energy distance to data, latent motion only",
            "",
            "lower",
            None,
        ),
        "mixture_log_density": (
            "log density under the data",
            "nats",
            None,
            "of exact samples: -18.19",
        ),
        "mode_tv_teacher": ("mode weights, total variation to teacher", "", "lower", None),
        "mixture_motion_ratio_teacher": ("latent motion / teacher's", "", "one", None),
        "mixture_motion_w1_teacher": ("W1 of latent motion to teacher", "", "lower", None),
        "mixture_motion_spread_ratio_teacher": (
            "spread of latent motion within prompts / teacher's",
            "",
            "one",
            None,
        ),
        "mixture_energy_teacher": ("energy distance to teacher", "", "lower", None),
    },
    ExactDivergence: {
        "exact_kl": ("exact KL", "nats", "lower", None),
        "exact_fisher": ("exact Fisher divergence", "", "lower", None),
        "exact_w2": ("exact W2", "", "lower", None),
        "exact_spread": ("spread / target's", "", "one", None),
    },
}
EXTRACTORS = {  # of the columns that a network or an optical flow computes
    "fvd": "indomain-r2p1-cls#",
    "fvd_random": "random-r2p1#",
    "clip_score": "indomain-frameclip#",
    "clip_video_r1": "indomain-videoclip#",
    "motion": "lucas-kanade",
    "motion_mean": "lucas-kanade",
    "motion_diagonals": "lucas-kanade",
    "motion_floor": "lucas-kanade",
    "motion_w1": "lucas-kanade",
    "motion_w1_over_floor": "lucas-kanade",
    "dynamic_degree": "lucas-kanade",
    "motion_ratio_true": "oracle",
    "motion_w1_over_floor_true": "oracle",
    "recall": "random-r2p1#",
    "coverage": "random-r2p1#",
}


def rendered(first: int) -> Clips:
    """Twelve clips of six prompts, all of which name every attribute."""
    prompts = [prompt for prompt in controls.rendered(6, 0)[1] for _ in range(2)]
    frames = np.stack([shapes.render(shapes.parse(p), first + i) for i, p in enumerate(prompts)])
    return Clips(frames, prompts, list(range(first, first + 12)))


def of_mixture(first: int) -> Clips:
    pipeline = load_pipeline("mixture", torch.device("cpu"))
    prompts, keys = [name for name in PROMPTS for _ in range(4)], range(first, first + 20)
    facts = pipeline.facts(None, torch.ones(1), "ode", 1.0)
    return Clips(pipeline.clips(prompts, keys), prompts, list(keys), facts=facts)


def of_gaussian(first: int) -> Clips:
    pipeline = load_pipeline("gaussian", torch.device("cpu"))
    facts = pipeline.facts(pipeline.student(), torch.ones(1), "ode", 1.0)
    frames = np.zeros((2, 2, 3, 8, 8), np.uint8)
    return Clips(frames, ["component 0"] * 2, [first, first + 1], facts=facts)


@pytest.mark.parametrize("evaluator", COLUMNS)
def test_columns_say_what_they_hold_and_what_is_better(evaluator):
    make = {MixtureTruth: of_mixture, ExactDivergence: of_gaussian}.get(evaluator, rendered)
    kinds = ("teacher", "teacher_other", "data", "data_other")
    references = {kind: make(100 * i) for i, kind in enumerate(kinds, 1)}
    settings = {"resamples": 2} if evaluator is FVD else {}
    scores = evaluator(**settings).scores(make(0), references)
    assert {s.column: (s.title, s.unit, s.better, s.note) for s in scores} == COLUMNS[evaluator]
    assert set(evaluator.columns) == set(COLUMNS[evaluator]), "a sweep checks contrasts by these"
    name = evaluator.__module__.rpartition(".")[2]
    columns = README.read_text().split("## Columns")[1].partition("\n## ")[0]
    (row,) = re.findall(rf"^\| `{name}` .*(?:\n\| \| .*)*", columns, re.MULTILINE)
    assert {s.column for s in scores if s.headline} == set(re.findall(r"\*\*`(\w+)`\*\*", row))
    stated = evaluator(**settings).extractors(make(0))
    assert stated is None or stated == {s.extractor for s in scores} - {None}
    for score in scores:
        expected = EXTRACTORS.get(score.column)
        if expected is not None:
            assert score.extractor.startswith(expected), score.column
        assert score.per_clip is None or len(score.per_clip) == len(make(0).frames)
