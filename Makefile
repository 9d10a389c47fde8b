# Two commands matter: `make quickstart` and `make test`. Both set up what they need, once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: setup quickstart finetune-quickstart test lint bench docs lock clean

setup: $(INSTALLED)

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: found $$($(PYTHON) --version), allowed: Python 3.11 or newer (make PYTHON=python3.12 ...)"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps -e .
	@touch $@

quickstart: $(INSTALLED)
	$(BIN)/tunebench run studies/quickstart.yaml

finetune-quickstart: $(INSTALLED)
	$(BIN)/tunebench pretrain studies/pretrain-molecules.yaml
	$(BIN)/tunebench run studies/finetune-quickstart.yaml

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python benchmarks/trial_overhead.py

docs: $(INSTALLED)
	$(BIN)/python -m tunebench.study.document

# Pins what a fresh environment resolves to. torch stays at the version whose CPU build the lock names.
lock:
	rm -rf .lock-venv && $(PYTHON) -m venv .lock-venv
	.lock-venv/bin/python -m pip install -q torch==2.13.0
	.lock-venv/bin/python -m pip install -q -e '.[dev,properties]'
	.lock-venv/bin/python -m pip freeze --exclude-editable --exclude tunebench | sed 's/^torch==\(.*\)+cpu$$/torch==\1/' > requirements.lock
	rm -rf .lock-venv

clean:
	rm -rf runs bases $(VENV) .mypy_cache .ruff_cache .pytest_cache
