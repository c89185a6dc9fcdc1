"""Sensitivity of the scores to corrupted clips: writes the tables of eval/README.md.

    python tests/benchmarks/sensitivity.py [--clips 432] [--evaluators motion,fvd]

Clips are rendered, two or more per prompt; the reference ("teacher") has other clips of the same
captions. The first table has captions that name all motion, the second captions that leave it free.
A score moves if its distance from the mean of clean sets is over 5 of their standard deviations and
over 2 % of its scale. The command fails if a score moves unexpectedly, or fails to move. With
--evaluators, the tables are printed and the README is left alone.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from distill_bench.domain import controls, shapes
from distill_bench.evaluator import Clips
from distill_bench.registry import evaluators, find_evaluator

NAMED, FREE = "all motion named", "motion free"  # captions of the two tables
README = Path(__file__).parents[2] / "eval" / "README.md"
BEGIN, END = "<!-- sensitivity: begin -->", "<!-- sensitivity: end -->"
NULLS = 4
TIME = {"frozen", "half speed", "shuffled", "backwards"}
PICTURE = {"noise", "blur"}
COPIES = {"one colour missing", "one clip per prompt"}
SPEED = {"slowed", "slowed by blending", "a quarter stilled", "equalised"}
# Captions -> score -> sets of clips that must move it. MAY has the sets that may, but need not.
MUST = {
    NAMED: {
        "fvd": TIME | PICTURE | {"jitter", "one colour missing"},
        "fvd_random": {"frozen", "noise", "blur", "one colour missing"},
        "clip_score": PICTURE | {"one colour missing"},
        "clip_r1": PICTURE | {"one colour missing"},
        "clip_video": TIME | PICTURE | {"one colour missing"},
        "clip_video_r1": TIME | PICTURE | {"one colour missing"},
        "motion_ratio": {"frozen", "half speed", "shuffled"},
        "motion_w1": {"frozen", "half speed", "shuffled"},
        "flicker": {"frozen", "half speed", "shuffled", "jitter", "noise", "blur"},
        "motion_true": {"frozen", "half speed", "shuffled"},
        "diversity_ratio": {"one clip per prompt"},
        "copies": {"one clip per prompt"},
        "coverage": {"frozen", "noise", "one clip per prompt"},
        "saturation_ratio": {"noise"},
        "contrast_ratio": PICTURE,
        "sharpness_ratio": PICTURE,
        "attribute_accuracy": TIME | {"blur", "one colour missing"},
        "attribute_histogram": {"frozen", "half speed", "shuffled", "blur", "one colour missing"},
    },
    FREE: {
        "fvd": SPEED,
        "motion_ratio": SPEED - {"equalised"},
        "motion_w1": SPEED,
        "motion_spread_ratio": SPEED - {"a quarter stilled"},
        "motion_still": {"a quarter stilled", "equalised"},
        "motion_ratio_true": SPEED - {"equalised"},
        "motion_w1_true": SPEED,
        "motion_spread_ratio_true": SPEED - {"a quarter stilled"},
        "motion_still_true": {"a quarter stilled", "equalised"},
        "flicker": {"slowed", "slowed by blending", "a quarter stilled"},
        "attribute_accuracy": set(),
    },
}
MAY = {
    NAMED: {
        "fvd": {"one clip per prompt"},  # copies add bias; diversity scores detect missing clips
        "fvd_random": TIME | {"jitter", "one clip per prompt"},
        "clip_score": {"jitter"},  # jitter softens the picture
        "clip_video": {"jitter"},
        "clip_video_r1": {"jitter"},
        "motion_true": {"noise", "jitter"},
        # less motion or softer pictures bring clips nearer to each other
        "diversity_ratio": {"shuffled", "blur", "half speed", "noise"},
        "coverage": {"blur", "half speed", "shuffled", "jitter", "one colour missing"},
        "contrast_ratio": {"jitter", "one colour missing"},
        "saturation_ratio": {"one colour missing"},
        "sharpness_ratio": {"jitter"},
        "attribute_histogram": {"backwards"},
        # contrast and noise change the optical flow a little
        "motion_ratio": {"jitter", "noise", "blur", "one colour missing"},
        # named speeds vary by 5 %, so that clean sets are a few thousandths apart
        "motion_w1": {"jitter", "noise", "blur", "backwards"} | COPIES,
        "flicker": {"one colour missing"},
    },
    FREE: {
        "motion_spread_ratio": {"a quarter stilled"},
        "motion_spread_ratio_true": {"a quarter stilled"},
        # a free speed of at most twice the threshold, halved, counts as still
        "motion_still": {"slowed", "slowed by blending"},
        "motion_still_true": {"slowed", "slowed by blending"},
        "flicker": {"equalised"},
    },
}


def sets(kind: str, count: int, cache: Path) -> tuple[dict[str, Clips], dict[str, Clips]]:
    """Sets of clips by name, clean ones first, and the references; `cache` keeps features."""

    def clips(first: int, **options) -> Clips:
        caption_kind = "named" if kind == NAMED else "free"
        frames, prompts = controls.rendered(count, first, kind=caption_kind, **options)
        return Clips(frames, prompts, list(range(first, first + count)), cache=cache)

    clean = clips(0)

    def changed(frames: np.ndarray) -> Clips:
        return Clips(frames, clean.prompts, clean.seeds, cache=cache)

    by_name = {f"clean {i}": clips((2 + i) * count) for i in range(NULLS)}
    if kind == FREE:
        by_name["slowed"] = clips(0, pace=0.5)
        by_name["slowed by blending"] = changed(controls.slowed(clean.frames))
        by_name["a quarter stilled"] = changed(controls.stilled(clean.frames))
        by_name["equalised"] = clips(0, equalised=True)
    else:
        by_name["half speed"] = clips(0, pace=0.5)
        for name, corrupt in controls.CORRUPTIONS.items():
            by_name[name] = changed(corrupt(clean.frames, 0))
        by_name["one colour missing"] = clips(0, without="red")
        first = {prompt: i for i, prompt in reversed(list(enumerate(clean.prompts)))}
        by_name["one clip per prompt"] = changed(
            clean.frames[[first[prompt] for prompt in clean.prompts]]
        )
    return by_name, {"teacher": clips(count), "teacher_other": clips((2 + NULLS) * count)}


def measure(kind: str, count: int, cache: Path, names: list[str]) -> dict[str, dict[str, float]]:
    """Scores of the named evaluators as column -> set -> value."""
    by_name, references = sets(kind, count, cache)
    values: dict[str, dict[str, float]] = {}
    for name, clips in by_name.items():
        print(f"{kind}: {name}", file=sys.stderr, flush=True)
        for evaluator_class in map(find_evaluator, names):
            evaluator = evaluator_class()
            if evaluator.reason_to_skip(clips) is not None:
                continue
            for score in evaluator.scores(clips, references):
                values.setdefault(score.column, {})[name] = score.value
    return values


def moved(row: dict[str, float]) -> set[str]:
    """Sets whose value differs from that of the clean sets."""
    clean = np.array([value for name, value in row.items() if name.startswith("clean")])
    threshold = max(5 * clean.std(ddof=1), 0.02 * max(abs(clean.mean()), 1e-3))
    return {
        name
        for name, value in row.items()
        if not name.startswith("clean") and abs(value - clean.mean()) > threshold
    }


def table(kind: str, values: dict[str, dict[str, float]], count: int) -> str:
    """Markdown table: one line per score, one column per set, values that moved in bold."""
    names = [name for name in next(iter(values.values())) if not name.startswith("clean")]
    lines = [
        f"| score ({count} clips, {kind}) | clean | " + " | ".join(names) + " |",
        "|---|" + "---|" * (len(names) + 1),
    ]
    for column in MUST[kind]:
        if column not in values:
            continue
        row = values[column]
        bold = moved(row)
        clean = np.array([row[f"clean {i}"] for i in range(NULLS)])
        cells = [f"`{column}`", f"{clean.mean():.3g} ± {clean.std(ddof=1):.1g}"]
        cells += [f"**{row[name]:.3g}**" if name in bold else f"{row[name]:.3g}" for name in names]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def unexpected(kind: str, values: dict[str, dict[str, float]]) -> list[str]:
    """Describe scores that move unexpectedly, or fail to move."""
    problems = []
    for column, must in MUST[kind].items():
        if column not in values:
            continue
        sets_that_move = moved(values[column])
        may = MAY[kind].get(column, set())
        problems += [f"{column} does not see {name}" for name in sorted(must - sets_that_move)]
        problems += [f"{column} is moved by {name}" for name in sorted(sets_that_move - must - may)]
    return [f"{kind}: {problem}" for problem in problems]


def main() -> int:
    """Measure, write the tables, and print unexpected scores; returns 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=432)
    parser.add_argument("--evaluators", help="print the tables of these only")
    options = parser.parse_args()
    count, least = options.clips, 2 * len(shapes.all_attributes())
    if count < least:
        parser.error(f"--clips {count}: needs at least {least}, two per caption")
    names = options.evaluators.split(",") if options.evaluators else list(evaluators())
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        values = {kind: measure(kind, count, Path(cache), names) for kind in MUST}
    tables = "\n\n".join(table(kind, of_kind, count) for kind, of_kind in values.items())
    if options.evaluators:
        print(tables)
    else:
        text = README.read_text()
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        README.write_text(f"{before}{BEGIN}\n{tables}\n{END}{after}")
    problems = [text for kind, of_kind in values.items() for text in unexpected(kind, of_kind)]
    print("\n".join(problems) or "every corruption moves the scores that it should, and no others")
    return int(bool(problems))


if __name__ == "__main__":
    raise SystemExit(main())
