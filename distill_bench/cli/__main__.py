"""`python -m distill_bench.cli`, the same as `distill-bench`."""

from distill_bench.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
