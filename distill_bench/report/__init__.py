"""Tables, figures and page of a sweep; results as data frames. Imports no torch."""

from distill_bench.report.results import Results, ResultsError, load

__all__ = ["Results", "ResultsError", "load"]
