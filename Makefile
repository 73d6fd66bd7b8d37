SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
# Known-good versions, for Python 3.11 and newer. `make install CONSTRAINTS=/dev/null` takes the newest ones instead.
CONSTRAINTS ?= constraints.txt
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

BIN := $(VENV)/bin
# What `make faults` has tried of each argument
ARGUMENTS := $(VENV)/arguments.md
STAMP := $(VENV)/.installed
SOURCES := sb3_algd sb3_algd_runtime.py benchmarks examples tests docs/conf.py setup.py

.PHONY: help install train pytest doc package wheel-test faults benchmark type lint format check-codestyle commit-checks clean

help:
	@echo "make train            train ALGD on a safety task (10 minutes), leaves model, CSV and figure in runs/"
	@echo "make pytest           run the tests"
	@echo "make doc              build the documentation site in docs/_build/html"
	@echo "make package          build wheel and source distribution in dist/ and check them"
	@echo "make wheel-test       install the wheel in a fresh environment outside this folder and use it as a user does"
	@echo "make faults           kill runs and damage their files, 312 faults (2 to 10 minutes); a short form is among the tests"
	@echo "make benchmark        measure the speed of updates and of acting against SB3's SAC (15 minutes)"
	@echo "make install          create $(VENV) with everything; the others do this by themselves"
	@echo "make type lint check-codestyle format commit-checks"

install: $(STAMP)

# The stamp stands for a complete installation, so it is written last.
$(STAMP): setup.py $(CONSTRAINTS)
	@test $(CONSTRAINTS) != constraints.txt || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is older than Python 3.11, for which constraints.txt was made."; \
		echo "Name another one: make install PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
		echo "Could not create $(VENV). On Debian and Ubuntu: apt-get install python3-venv"; rm -rf $(VENV); exit 1; }
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[all]"
# Without its dependencies, because the versions that it pins fit nothing else (see setup.py).
	$(BIN)/python -m pip install --quiet --no-deps safety-gymnasium==1.0.0
	@touch $@

# With one thread, unless OMP_NUM_THREADS says otherwise: see docs/performance.md
train: install
	$(BIN)/python -m sb3_algd.train $(ARGS)

# One thread per worker: the networks are small, and workers that share cores only slow each other down.
pytest: install
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --cov $(ARGS)

# Warnings are errors
doc: install
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

package: install
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

wheel-test: package
	PYTHON=$(PYTHON) CONSTRAINTS=$(abspath $(CONSTRAINTS)) bash .ci/wheel-test dist/*.whl

faults: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults --jobs $(JOBS) $(ARGS)
	@rm -f $(ARGUMENTS)
	OMP_NUM_THREADS=1 SB3_ALGD_EXAMPLES=40 SB3_ALGD_TABLE=$(ARGUMENTS) $(BIN)/python -m pytest -n $(JOBS) -q tests/test_argument_rules.py
	@printf '| algorithm | argument | trained | refused |\n| --- | --- | --- | --- |\n'; sort $(ARGUMENTS)

# What was measured is not measured again: rm -r benchmarks/results/speed to start anew
benchmark: install
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.speed $(ARGS)
	OMP_NUM_THREADS=2 $(BIN)/python -m benchmarks.speed --parts updates acting $(ARGS)
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks.speed --parts updates --models sac ve ve-compiled-bf16 $(ARGS)
	$(BIN)/python -m benchmarks.speed --parts --page docs/performance.md

type: install
	$(BIN)/mypy

lint: install
	$(BIN)/ruff check $(SOURCES)

format: install
	$(BIN)/ruff check --select I --fix $(SOURCES)
	$(BIN)/black $(SOURCES)

check-codestyle: install
	$(BIN)/ruff check --select I $(SOURCES)
	$(BIN)/black --check $(SOURCES)

commit-checks: format type lint

clean:
	rm -rf build dist docs/_build *.egg-info .mypy_cache .ruff_cache .pytest_cache .coverage*
