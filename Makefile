# Everything sets itself up: the first target on a fresh machine makes a virtual environment from pinned constraints.
#   make demo       the main job on real data: handwritten digits, then flights
#   make test       the tests; make test-all adds the slow ones
#   make check      format, lint, types, import contracts, commands in the documents
#   make bench      measurements, printed with machine, versions and commit
#   make bench-serve  the server against its peers, side by side; less than an hour
# On Linux without a GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu takes the small build of torch.

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
BIN := $(VENV)/bin

.PHONY: help demo test test-all check bench bench-serve constraints format clean
.DEFAULT_GOAL := help

# Where no target is named.
help:
	@sed -n 's/^# \{0,2\}//p' Makefile | head -7

$(VENV)/.installed: pyproject.toml constraints.txt
	scripts/set-up.sh $(PYTHON) $(VENV) $(TORCH_INDEX)

demo: $(VENV)/.installed
	$(BIN)/modelyard run examples/digits/yard.toml
	$(BIN)/modelyard run examples/flights/yard.toml

test: $(VENV)/.installed
	$(BIN)/pytest

test-all: $(VENV)/.installed
	$(BIN)/pytest -m "slow or not slow"

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest tests/test_docs.py

bench: $(VENV)/.installed
	@status=0; for script in training_loop int8 light; do $(BIN)/python bench/$$script.py || status=1; done; exit $$status

bench-serve: $(VENV)/.installed
	$(BIN)/python -m bench.serve

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Pins what the environment holds now; run after installing something newer on purpose.
constraints: $(VENV)/.installed
	scripts/pin.sh $(BIN) > constraints.new && mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) demo .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist src/*.egg-info
