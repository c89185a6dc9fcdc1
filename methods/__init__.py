"""One file an objective; the file name is the registry (`distill_bench.registry`)."""
