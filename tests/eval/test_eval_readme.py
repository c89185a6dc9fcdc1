"""The evaluator that eval/README.md shows is found by its path and scores clips."""

import re
import sys
from pathlib import Path

import numpy as np

from distill_bench.evaluator import Clips
from distill_bench.registry import evaluators, find_evaluator

README = Path(__file__).parents[2] / "eval" / "README.md"


def test_the_evaluator_of_the_readme_scores_the_mean_brightness(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (tmp_path / "brightness.py").write_text(example)
    evaluator = find_evaluator(f"{tmp_path}/brightness.py:Brightness")()
    frames = np.full((2, 2, 3, 4, 4), 100, np.uint8)
    frames[1] = 200
    (score,) = evaluator.scores(Clips(frames, ["a", "b"], [0, 1]), {})
    assert (score.column, score.value, score.per_clip) == ("brightness", 150.0, (100.0, 200.0))


def test_the_readme_names_the_environment_variables_of_the_evaluators():
    modules = [sys.modules[kind.__module__] for kind in evaluators().values()]
    texts = [text for module in modules for text in vars(module).values()]
    names = {text for text in texts if isinstance(text, str) and "DISTILL_BENCH_" in text[:16]}
    assert len(names) > 5
    assert names <= set(re.findall(r"`(DISTILL_BENCH_\w+)[=`]", README.read_text()))
