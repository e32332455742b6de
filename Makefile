# Each target sets up its own virtual environment on first use; later calls only check a time stamp.
.DEFAULT_GOAL := demo
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow check docs bench clean

$(READY): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY)  ## the whole path on the embedded model
	$(BIN)/minipuzzle demo --out demo_output --overwrite

test: $(READY)  ## the default test suite
	$(BIN)/python -m pytest -m 'not slow'

test-slow: $(READY)  ## tests that take minutes
	$(BIN)/python -m pytest -m slow

check: $(READY)  ## style, types and generated documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/write_commands.py --check

docs: $(READY)  ## write docs/commands.md from the commands' own help
	$(BIN)/python docs/write_commands.py

bench: $(READY)  ## measure speed and memory; results are written beside the scripts
	$(BIN)/python examples/benchmarks/run_all.py

clean:
	rm -rf $(VENV) demo_output
