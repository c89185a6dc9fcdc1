"""Conformance checks for any method or evaluator, and the gradient of a method's loss at x0.

    from distill_bench.testing import check_methods

    def test_my_method_conforms(tmp_path):
        check_methods("path/to/my_method.py:MyMethod", folder=tmp_path)

`distill-bench check path/to/my_method.py:MyMethod` prints a report. The checks of a method run the
real trainer on a tiny Wan pipeline with random weights, on the CPU, in seconds.
"""

from distill_bench.testing.checks import CHECKS, check_methods
from distill_bench.testing.gradient import student_gradient
from distill_bench.testing.ranks import check_two_ranks
from distill_bench.testing.runs import Runs
from distill_bench.testing.tiny import tiny_clips, tiny_pipeline

__all__ = [
    "CHECKS",
    "Runs",
    "check_methods",
    "check_two_ranks",
    "student_gradient",
    "tiny_clips",
    "tiny_pipeline",
]
