"""Objectives, one per file; the file name is the method's name (`distill_bench.registry`)."""
