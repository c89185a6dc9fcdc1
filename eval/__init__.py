"""Evaluators, one per file; the file name is the evaluator's name (`distill_bench.registry`)."""
