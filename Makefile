# Each target stands alone on a fresh machine with Python >= 3.11, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO ?= demo

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow test-slurm slurm-lab lint types check clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

venv: $(VENV)/.installed  ## make .venv and install everything

$(VENV)/.installed: pyproject.toml requirements/tokenizers.txt requirements/tokenizers-needs.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Braid needs Python >= 3.11; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@echo "Installing Braid into $(VENV): some minutes the first time ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]' -r requirements/tokenizers-needs.txt
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -r requirements/tokenizers.txt
	@touch $@

demo: venv  ## from raw pictures, voices and text to generated ones, in demo/
	@$(BIN)/python -m pipelines.demo --out $(DEMO) $(if $(PACKAGES),--packages $(PACKAGES))

test: venv  ## the default tests (under 10 minutes on 2 cores)
	@$(BIN)/python -m pytest

test-slow: venv  ## the tests that take longer
	@$(BIN)/python -m pytest -m 'slow and not slurm'

test-slurm: venv  ## the tests on a real SLURM, which they start here (root, Debian or Ubuntu; else they skip)
	@bash tests/slurm/install.sh || echo "The tests that need SLURM will skip."
	@$(BIN)/python -m pytest -m slurm -rs

slurm-lab: venv  ## a private SLURM of four nodes on this machine, and a shell in it (root)
	@bash tests/slurm/install.sh
	@$(BIN)/python -m tests.slurm.cluster

lint: venv  ## style
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: venv  ## types
	@$(BIN)/mypy

check: test lint types  ## default tests, style, types

clean:  ## remove what the other targets made, the venv too
	rm -rf $(VENV) $(DEMO) .pytest_cache .ruff_cache .mypy_cache .hypothesis
