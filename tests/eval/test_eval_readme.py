"""The evaluator that eval/README.md shows is found by its path and scores clips."""

import re
from pathlib import Path

import numpy as np

from distill_bench.evaluator import Clips
from distill_bench.registry import find_evaluator

README = Path(__file__).parents[2] / "eval" / "README.md"


def test_the_evaluator_of_the_readme_scores_the_mean_brightness(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (tmp_path / "brightness.py").write_text(example)
    evaluator = find_evaluator(f"{tmp_path}/brightness.py:Brightness")()
    frames = np.full((2, 2, 3, 4, 4), 100, np.uint8)
    frames[1] = 200
    (score,) = evaluator.scores(Clips(frames, ["a", "b"], [0, 1]), {})
    assert (score.column, score.value, score.per_clip) == ("brightness", 150.0, (100.0, 200.0))
