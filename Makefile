# make quickstart   from a fresh clone to a graded student: installs, runs the whole pipeline
# make test         the test suite        make lint        ruff and mypy
# make test-slow    tests that take minutes; make test-gpu: tests that need a CUDA device
# make gpu-check    one page on this device: exactness, speed, memory (benchmarks/gpu_check.py)
# make docs         the documentation site, into build/docs; make docs-serve shows it while you write
# make lock         pin the newest versions that pyproject.toml and requirements/*.in allow
# make clean        remove caches and build products; make distclean: .venv too (never outputs/)
#
# PYTHON=python3.12 picks the interpreter; JOBS=8 runs the tests in 8 processes instead of 2;
# HARDWARE=gpu_8gb is the profile of gpu-check; ARGS=... is passed on to rlt or pytest, for example
#   make quickstart ARGS="seed=1"        make test ARGS="tests/training -x" JOBS=1

PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
ARGS   ?=
HARDWARE ?= gpu_24gb

BIN       := $(VENV)/bin
PIP       := $(BIN)/python -m pip --disable-pip-version-check
LOCKED    := install -qq --require-hashes --no-deps
INSTALLED := $(VENV)/.installed
UV_VENV   := build/uv

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help install quickstart test test-slow test-gpu gpu-check lint format docs docs-serve lock clean distclean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

# --- environment -------------------------------------------------------------------------------

install: $(INSTALLED)

# The stamp is touched last: an install that fails or is interrupted is taken up again by the next
# make. Build tools come first and build the few source distributions, so all but torch is hashed.
$(INSTALLED): pyproject.toml requirements/build.lock requirements/main.lock requirements/torch.in
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit( \
	  f"rlt needs Python 3.11 or newer, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	@echo "Installing into $(VENV) (one to five minutes) ..."
	@rm -f $@
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m ensurepip >/dev/null
	@$(PIP) $(LOCKED) -r requirements/build.lock
	@$(PIP) $(LOCKED) --no-build-isolation -r requirements/main.lock
	@$(PIP) install -qq -r requirements/torch.in
	@$(PIP) install -qq --no-deps --no-build-isolation -e .
	@if $(PIP) check | grep '^rlt '; then echo "The lock is behind pyproject.toml: make lock"; exit 1; fi
	@touch $@

# --- running -----------------------------------------------------------------------------------

quickstart: $(INSTALLED)
	$(BIN)/rlt experiment=quickstart $(ARGS)

# --- checks ------------------------------------------------------------------------------------

# Tests never ask a model hub for anything.
test test-slow test-gpu: export HF_HUB_OFFLINE = 1

# A file's tests stay in one process, as they share its fixtures.
test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses=$(JOBS) --dist=loadfile $(ARGS)

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m "slow and not gpu" $(ARGS)

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu $(ARGS)

gpu-check: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu_check hardware=$(HARDWARE) $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# --- documentation -----------------------------------------------------------------------------

# A broken link, a missing anchor or a name that no module defines fails the build.
docs: $(INSTALLED)
	$(BIN)/zensical build --strict --clean $(ARGS)

docs-serve: $(INSTALLED)
	$(BIN)/zensical serve $(ARGS)

# --- lock --------------------------------------------------------------------------------------

UV_COMPILE := $(UV_VENV)/bin/uv pip compile --quiet --no-config --upgrade --universal \
  --python-version 3.11 --fork-strategy fewest --generate-hashes --no-annotate \
  --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock"

lock:
	$(PYTHON) -m venv $(UV_VENV)
	$(UV_VENV)/bin/python -m pip install -qq uv==0.13.9
	$(UV_COMPILE) requirements/build.in --output-file requirements/build.lock
	$(UV_COMPILE) requirements/main.in pyproject.toml --extra dev --extra docs --extra sweep \
	  --extra qlora --extra submitit --output-file requirements/main.lock \
	  --constraints requirements/build.lock --excludes requirements/excluded.in

# --- cleaning ----------------------------------------------------------------------------------

clean:
	rm -rf build dist .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find rlt tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
