PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export HF_HUB_OFFLINE := 1
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1

.PHONY: help install demo test lint types format clean

help:
	@echo "make demo    three silos, a coordinator, a gateway and one deletion, on this machine"
	@echo "make test    the whole test suite"
	@echo "make lint    ruff and the import rules        make types   mypy"
	@echo "make format  apply ruff's formatting          make clean   remove the virtual environment"

install: $(STAMP)

# torch comes first and alone: resolved together with the rest, pip may prefer a newer build with CUDA libraries. What
# is imported is compiled then; pip would compile all of it, which takes longer than installing it.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/seqr demo $(ARGS)

# Three workers of one thread each: on two processors, as one of them often waits for a server. Of pytest's
# plugins those that are used: the others are loaded, and their packages rewritten, in every worker.
test: export OMP_NUM_THREADS ?= 1
test: export PYTEST_DISABLE_PLUGIN_AUTOLOAD := 1
test: $(STAMP)
	$(BIN)/python -m pytest -p xdist -p timeout -p hypothesispytest \
	  -n 3 --dist loadscope --no-loadscope-reorder $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(STAMP)
	$(BIN)/mypy seqr policy silo_client coordinator inference_gateway

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info
