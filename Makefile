# Two targets set everything up on a fresh machine with Python: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TORCHAO := $(shell sed -n 's/^adamw8bit = \["\(.*\)"\]/\1/p' pyproject.toml)

# Where this is set, each of hundreds of processes compiles the package anew, and pytest all tests.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-fast test-long test-oldest test-8bit lint format docs clean

demo: $(INSTALLED)
	$(BIN)/python -m vfun_cli.demo.tour

test: lint test-fast test-8bit
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=worksteal --ignore=tests/integration -m "slow and not long"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/integration -m "slow and not long"

test-fast: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow and not long"

# What needs torchao, which diffusers and peft would import in every other test.
test-8bit: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/torchao "$(TORCHAO)"
	PYTHONPATH=$(CURDIR)/$(VENV)/torchao OMP_NUM_THREADS=1 $(BIN)/python -m pytest -k "8bit or 8_bit" tests/training/test_optimizers.py tests/training/test_optimizers_sharded.py tests/training/test_hybrid_sharding.py

test-long: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long

# The fast tests with the oldest of every package that pyproject.toml admits; torch takes gigabytes.
test-oldest:
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet --constraint tests/oldest.txt --editable ".[dev]"
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n auto -m "not slow and not long"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)
	$(BIN)/python docs/generate.py

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) vfun-demo .pytest_cache .mypy_cache .ruff_cache
