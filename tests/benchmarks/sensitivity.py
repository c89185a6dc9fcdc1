"""Sensitivity of the scores to corrupted clips: writes the table of eval/README.md.

    python tests/benchmarks/sensitivity.py [--clips 432]

Clips are rendered, two or more per prompt; the reference ("teacher") has other clips of the same
captions. A score moves if its distance from the mean of clean sets is over 5 of their standard
deviations and over 2 % of its scale. The command fails if a score moves unexpectedly, or fails to
move.
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
from distill_bench.registry import evaluators

README = Path(__file__).parents[2] / "eval" / "README.md"
BEGIN, END = "<!-- sensitivity: begin -->", "<!-- sensitivity: end -->"
NULLS = 4
TIME = {"frozen", "half speed", "shuffled", "backwards"}
PICTURE = {"noise", "blur"}
# Score -> sets of clips that must move it. MAY has the sets that may, but need not.
MUST = {
    "fvd": TIME | PICTURE | {"one colour missing"},
    "fvd_random": {"frozen", "noise", "blur", "one colour missing"},
    "clip_score": PICTURE | {"one colour missing"},
    "clip_r1": PICTURE | {"one colour missing"},
    "clip_video": TIME | PICTURE | {"one colour missing"},
    "clip_video_r1": TIME | PICTURE | {"one colour missing"},
    "motion_ratio": {"frozen", "half speed", "shuffled", "noise", "blur"},
    "flicker": {"frozen", "half speed", "shuffled", "noise", "blur"},
    "motion_true": {"frozen", "half speed", "shuffled"},
    "diversity_ratio": {"one clip per prompt"},
    "copies": {"one clip per prompt"},
    "coverage": {"frozen", "noise", "one clip per prompt"},
    "saturation_ratio": {"noise"},
    "contrast_ratio": PICTURE,
    "sharpness_ratio": PICTURE,
    "attribute_accuracy": TIME | {"blur", "one colour missing"},
    "attribute_histogram": {"frozen", "half speed", "shuffled", "blur", "one colour missing"},
}
MAY = {
    "fvd": {"one clip per prompt"},  # copies add bias; diversity scores detect the missing clips
    "fvd_random": TIME | {"one clip per prompt"},
    "motion_true": {"noise"},
    # less motion or softer pictures bring clips nearer to each other
    "diversity_ratio": {"shuffled", "blur", "half speed", "noise"},
    "coverage": {"blur", "half speed", "shuffled", "one colour missing"},
    "contrast_ratio": {"one colour missing"},
    "saturation_ratio": {"one colour missing"},
    "attribute_histogram": {"backwards"},
    "motion_ratio": {"one colour missing"},  # optical flow depends on a colour's contrast
    "flicker": {"one colour missing"},
}


def sets(count: int, cache: Path) -> tuple[dict[str, Clips], dict[str, Clips]]:
    """Sets of clips by name, clean ones first, and the references; `cache` keeps features."""

    def clips(first: int, **options) -> Clips:
        frames, prompts = controls.rendered(count, first, **options)
        return Clips(frames, prompts, list(range(first, first + count)), cache=cache)

    clean = clips(0)
    by_name = {f"clean {i}": clips((2 + i) * count) for i in range(NULLS)}
    by_name["half speed"] = clips(0, pace=0.5)
    for name, corrupt in controls.CORRUPTIONS.items():
        by_name[name] = Clips(corrupt(clean.frames, 0), clean.prompts, clean.seeds, cache=cache)
    by_name["one colour missing"] = clips(0, without="red")
    first = {prompt: i for i, prompt in reversed(list(enumerate(clean.prompts)))}
    copied = clean.frames[[first[prompt] for prompt in clean.prompts]]
    by_name["one clip per prompt"] = Clips(copied, clean.prompts, clean.seeds, cache=cache)
    return by_name, {"teacher": clips(count), "teacher_other": clips((2 + NULLS) * count)}


def measure(count: int, cache: Path) -> dict[str, dict[str, float]]:
    """Scores as column -> set -> value."""
    by_name, references = sets(count, cache)
    values: dict[str, dict[str, float]] = {}
    for name, clips in by_name.items():
        print(name, file=sys.stderr, flush=True)
        for evaluator_class in evaluators().values():
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


def table(values: dict[str, dict[str, float]], count: int) -> str:
    """Markdown table: one line per score, one column per set, values that moved in bold."""
    names = [name for name in next(iter(values.values())) if not name.startswith("clean")]
    lines = [
        f"| score ({count} clips) | clean | " + " | ".join(names) + " |",
        "|---|" + "---|" * (len(names) + 1),
    ]
    for column in MUST:
        row = values[column]
        bold = moved(row)
        clean = np.array([row[f"clean {i}"] for i in range(NULLS)])
        cells = [f"`{column}`", f"{clean.mean():.3g} ± {clean.std(ddof=1):.1g}"]
        cells += [f"**{row[name]:.3g}**" if name in bold else f"{row[name]:.3g}" for name in names]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def unexpected(values: dict[str, dict[str, float]]) -> list[str]:
    """Describe scores that move unexpectedly, or fail to move."""
    problems = []
    for column, must in MUST.items():
        sets_that_move = moved(values[column])
        may = MAY.get(column, set())
        problems += [f"{column} does not see {name}" for name in sorted(must - sets_that_move)]
        problems += [f"{column} is moved by {name}" for name in sorted(sets_that_move - must - may)]
    return problems


def main() -> int:
    """Measure, write the table, and print unexpected scores; returns 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=432)
    count, least = parser.parse_args().clips, 2 * len(shapes.all_attributes())
    if count < least:
        parser.error(f"--clips {count}: needs at least {least}, two per caption")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        values = measure(count, Path(cache))
    text = README.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n{table(values, count)}\n{END}{after}")
    problems = unexpected(values)
    print("\n".join(problems) or "every corruption moves the scores that it should, and no others")
    return int(bool(problems))


if __name__ == "__main__":
    raise SystemExit(main())
