"""Write a commented file of an evaluator: `distill-bench new-evaluator NAME`."""

from distill_bench.cli.new_file import write_from

TEMPLATE = '''\
"""One line: the metric of $name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from distill_bench.evaluator import (
    Clips,
    Evaluator,
    Score,
    mean_score,
    pairing_warnings,
    require_same_frames,
)


@dataclass(frozen=True)
class $title(Evaluator):
    """Share of bright pixels of each clip, and its ratio to the teacher's (1 is best)."""

    # A `Citation` (distill_bench/evaluator.py) lets `distill-bench cite` print BibTeX.
    paper: ClassVar[str] = "none"
    # Raise it when the same clips get other values: scores of unlike versions share no table.
    version: ClassVar[int] = 1

    # A setting: `--set $place.threshold=100`.
    threshold: Annotated[int, Field(ge=0, le=255)] = 128

    def reason_to_skip(self, clips: Clips) -> str | None:
        """Reason why these clips have no score, or None; asked before anything runs."""
        return None

    def scores(self, clips: Clips, references: Mapping[str, Clips]) -> list[Score]:
        # One value per clip (N,): tables then have intervals over seeds and clips. `headline=True`
        # adds the column to the tables.
        values = self.bright_share(clips)
        scores = [mean_score("$name", values, "share of bright pixels", headline=True)]
        # References may be absent. `teacher` has the prompts and seeds of the clips.
        if "teacher" in references:
            teacher = references["teacher"]
            require_same_frames(clips, teacher, "teacher")
            expected = self.bright_share(teacher).mean()
            if expected > 0:
                scores.append(
                    mean_score(
                        "${name}_ratio",
                        values / expected,
                        "bright pixels / teacher's",
                        better="one",
                        warnings=pairing_warnings(clips, teacher),
                    )
                )
        return scores

    def bright_share(self, clips: Clips) -> np.ndarray:
        """Share of values above the threshold, (N,); frames are uint8 (N, T, 3, H, W)."""
        # One clip at a time keeps memory bounded. Features of a network go through
        # distill_bench/evaluate/cache.py, which batches, shares between ranks and caches.
        return np.array([(clip > self.threshold).mean() for clip in clips.frames])
'''


def main(argv: list[str] | None = None) -> int:
    """Write the file; returns the exit code."""
    use = "distill-bench evaluate clips/ --evaluators $place"
    return write_from("new-evaluator", TEMPLATE, use, argv)


if __name__ == "__main__":
    raise SystemExit(main())
