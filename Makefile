PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: sweep ground test test-fast test-slurm soak mutants bench bench-gpu lint types install

sweep: install  ## the ten-minute sweep, to results/quick/report.html
	$(BIN)/python -m distill_bench.sweep sweeps/quick.yaml

ground: install  ## the benchmark itself, more than an hour on two cores: results/ground
	$(BIN)/python -m distill_bench.sweep sweeps/ground_mini_wan.yaml --out results/ground
	$(BIN)/python -m distill_bench.sweep sweeps/ground_mixture.yaml --out results/ground
	$(BIN)/python -m distill_bench.sweep sweeps/ground_gaussian.yaml --out results/ground
	$(BIN)/distill-bench pretrain --measure 3 > results/ground/quality.csv.new
	mv results/ground/quality.csv.new results/ground/quality.csv

test: install  ## the whole test suite, on two cores, and its slowest tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=20

test-fast: install  ## the tests to run while writing: 90 seconds on two cores
	$(BIN)/python -m pytest -m "not slow"

test-slurm: export SLURM_CONF := /var/lib/distill-bench-slurm/etc/slurm.conf
test-slurm: install  ## sweeps on a real SLURM of four simulated nodes, brought up and taken down; needs root on Debian
	SLURM_ARRAY=101 SLURM_NODES=4 tests/slurm/up.sh
	$(BIN)/python -m pytest -m slurm -n 4 --dist worksteal --durations=10; code=$$?; tests/slurm/down.sh && exit $$code

soak: install  ## a hundred SIGKILLs at random moments, half an hour: results/soak.log
	$(BIN)/python -m pytest -m soak -s

mutants: install  ## small mistakes planted in the code, and the tests that miss them: results/mutants.md
	$(BIN)/python -m pip install --quiet -e '.[mutants]' -c constraints.txt
	nice $(BIN)/python tests/mutation/mutants.py $(ONLY)

bench: install  ## a trainer step over its network passes, runs on the mixture, evaluators' speed, ten thousand runs
	$(BIN)/python tests/benchmarks/trainer_step.py
	$(BIN)/python tests/benchmarks/mixture_run.py
	$(BIN)/python tests/benchmarks/evaluators.py
	$(BIN)/python -m pytest -s tests/sweep/test_status.py -k thousand
	$(BIN)/python tests/benchmarks/large_sweeps.py

bench-gpu: install  ## on one GPU, at most 8 minutes: resuming, scoring, updates at Wan2.1-1.3B's shape: results/bench_gpu.md
	$(BIN)/python tests/benchmarks/gpu/bench_gpu.py

lint: install  ## ruff: rules and format
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: install  ## mypy on the public contracts
	$(BIN)/python -m mypy

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[test]' -c constraints.txt
	touch $@
