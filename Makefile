PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: sweep test bench lint install

sweep: install  ## the ten-minute sweep, to results/quick/report.html
	$(BIN)/python -m distill_bench.sweep sweeps/quick.yaml

test: install  ## the whole test suite
	$(BIN)/python -m pytest

bench: install  ## what a trainer step costs beyond its network passes
	$(BIN)/python tests/benchmarks/trainer_step.py

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[test]' -c constraints.txt
	touch $@
