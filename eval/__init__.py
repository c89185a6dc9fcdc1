"""One file an evaluator; the file name is the registry (`distill_bench.registry`)."""
