"""Which corruption moves which score: writes the table of eval/README.md, and fails where one moves that should not, or stays.

    python tests/benchmarks/sensitivity.py [--clips 432]

Clips are rendered, two or more a prompt; the reference ("teacher") are others of the same captions. A score has moved where it is
further from the mean of clean sets than 5 of their standard deviations and than 2 % of its scale.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from distill_bench.domain import controls, shapes  # noqa: E402
from distill_bench.evaluator import Clips  # noqa: E402
from distill_bench.registry import evaluators  # noqa: E402

README = Path(__file__).parents[2] / "eval" / "README.md"
BEGIN, END = "<!-- sensitivity: begin -->", "<!-- sensitivity: end -->"
NULLS = 4
TIME = {"frozen", "half speed", "shuffled", "backwards"}
PICTURE = {"noise", "blur"}
# score -> the sets that must move it; those that may, but need not, are in MAY
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
    "diversity_ratio": {"one clip a prompt"},
    "copies": {"one clip a prompt"},
    "coverage": {"frozen", "noise", "one clip a prompt"},
    "saturation_ratio": {"noise"},
    "contrast_ratio": PICTURE,
    "sharpness_ratio": PICTURE,
    "attribute_accuracy": TIME | {"blur", "one colour missing"},
    "attribute_histogram": {"frozen", "half speed", "shuffled", "blur", "one colour missing"},
}
MAY = {
    "fvd": {"one clip a prompt"},  # copies add bias; what they lack is the diversity's to see
    "fvd_random": TIME | {"one clip a prompt"},
    "motion_true": {"noise"},
    "diversity_ratio": {
        "shuffled",
        "blur",
        "half speed",
        "noise",
    },  # less motion, softer pictures: nearer clips
    "coverage": {"blur", "half speed", "shuffled", "one colour missing"},
    "contrast_ratio": {"one colour missing"},
    "saturation_ratio": {"one colour missing"},
    "attribute_histogram": {"backwards"},
    "motion_ratio": {"one colour missing"},  # the flow of a colour depends on its contrast
    "flicker": {"one colour missing"},
}


def sets(count: int, cache: Path) -> tuple[dict[str, Clips], dict[str, Clips]]:
    """The sets to score by name, clean ones first, and the references; what networks make of them is kept in `cache`."""

    def clips(first: int, **how) -> Clips:
        frames, prompts = controls.rendered(count, first, **how)
        return Clips(frames, prompts, list(range(first, first + count)), cache=cache)

    clean = clips(0)
    found = {f"clean {i}": clips((2 + i) * count) for i in range(NULLS)}
    found["half speed"] = clips(0, pace=0.5)
    for name, corrupt in controls.CORRUPTIONS.items():
        found[name] = Clips(corrupt(clean.frames, 0), clean.prompts, clean.seeds, cache=cache)
    found["one colour missing"] = clips(0, without="red")
    first = {prompt: i for i, prompt in reversed(list(enumerate(clean.prompts)))}
    copied = clean.frames[[first[prompt] for prompt in clean.prompts]]
    found["one clip a prompt"] = Clips(copied, clean.prompts, clean.seeds, cache=cache)
    return found, {"teacher": clips(count), "teacher_other": clips((2 + NULLS) * count)}


def measure(count: int, cache: Path) -> dict[str, dict[str, float]]:
    """Column -> set -> value."""
    found, references = sets(count, cache)
    values: dict[str, dict[str, float]] = {}
    for name, some in found.items():
        print(name, file=sys.stderr, flush=True)
        applicable = [
            e for e in (made() for made in evaluators().values()) if e.reason_to_skip(some) is None
        ]
        for evaluator in applicable:
            for score in evaluator.scores(some, references):
                values.setdefault(score.column, {})[name] = score.value
    return values


def moved(row: dict[str, float]) -> set[str]:
    """The sets whose value is away from the clean ones'."""
    null = np.array([value for name, value in row.items() if name.startswith("clean")])
    far = max(5 * null.std(ddof=1), 0.02 * max(abs(null.mean()), 1e-3))
    return {
        name
        for name, value in row.items()
        if not name.startswith("clean") and abs(value - null.mean()) > far
    }


def table(values: dict[str, dict[str, float]], count: int) -> str:
    """Markdown: one line a score, one column a set, in bold what has moved."""
    names = [name for name in next(iter(values.values())) if not name.startswith("clean")]
    lines = [
        f"| score ({count} clips) | clean | " + " | ".join(names) + " |",
        "|---|" + "---|" * (len(names) + 1),
    ]
    for column in MUST:
        row, away = values[column], moved(values[column])
        null = np.array([row[f"clean {i}"] for i in range(NULLS)])
        cells = [f"**{row[name]:.3g}**" if name in away else f"{row[name]:.3g}" for name in names]
        lines.append(
            f"| `{column}` | {null.mean():.3g} ± {null.std(ddof=1):.1g} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines)


def wrong(values: dict[str, dict[str, float]]) -> list[str]:
    """What should have moved and did not, or moved and should not."""
    found = []
    for column, must in MUST.items():
        away = moved(values[column])
        found += [f"{column} does not see {name}" for name in sorted(must - away)]
        found += [
            f"{column} is moved by {name}" for name in sorted(away - must - MAY.get(column, set()))
        ]
    return found


def main() -> int:
    """Measure, write the table, and say what is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=432)
    count, least = parser.parse_args().clips, 2 * len(shapes.all_attributes())
    if count < least:
        parser.error(f"--clips {count}: at least {least}, two of every caption")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        values = measure(count, Path(cache))
    text = README.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n{table(values, count)}\n{END}{after}")
    problems = wrong(values)
    print("\n".join(problems) or "every corruption moves what it should, and nothing else")
    return int(bool(problems))


if __name__ == "__main__":
    raise SystemExit(main())
