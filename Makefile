# Each target does its own set-up: a virtual environment with pinned versions, and the packaged models.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
export EXPERTSTEER_CACHE ?= $(HOME)/.cache/expertsteer_nnsight

# tests start many processes: with compiled modules kept, each saves a second or more
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
NDIF := build/ndif
NDIF_SERVER := $(NDIF)/server/bin/python

.PHONY: demo test recipes fast lint models benchmark evidence live docs notebooks ndif ndif-client ndif-setup clean

demo: models
	$(BIN)/python -m recipes.demo $(ARGS)

# two processes of one thread each take little more than half the time of one with two; a module stays in one, for its fixtures
test: lint models
	$(PYTEST) -m "not recipes and not ndif" $(ARGS)

# every recipe and notebook on the packaged pair
recipes: models
	$(PYTEST) -m recipes $(ARGS)

# without the real models: under two minutes on two cores
fast: $(VENV)/.ready
	$(PYTEST) -m "not real and not recipes and not ndif" $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/pyright --pythonpath $(BIN)/python

models: $(VENV)/.ready
	$(BIN)/python -m expertsteer_nnsight.models.packaged

benchmark: models
	$(BIN)/python -m benchmarks.ratios $(ARGS)

# the study over concepts: hours; `make evidence ARGS="--data FOLDER"`, and again to go on
evidence: models
	$(BIN)/python -m evidence $(ARGS)

# what a live expert passes on, task by task: hours; `make live ARGS="--data FOLDER"`, and again to go on
live: models
	$(BIN)/python -m evidence.live $(ARGS)

docs: $(VENV)/.ready
	$(BIN)/python -m mkdocs build --strict

# the notebooks with fresh outputs
notebooks: models
	TQDM_DISABLE=1 PYTHONWARNINGS="ignore:IProgress not found" $(BIN)/jupyter-execute --inplace notebooks/*.ipynb

# torch first and alone: asked for within a range, pip would take a newer build with gigabytes of CUDA packages
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet -c constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

# the tests against a real NDIF server, which is started for them and stopped after them, once for either way it runs blocks
ndif: ndif-setup ndif-client
	for actor in process sandbox; do \
		NDIF_ACTOR=$$actor $(NDIF_SERVER) -m ndif_server run --actor $$actor -- \
			$(NDIF)/client/bin/python -P -m pytest -m ndif -o pythonpath=tests/helpers -o addopts="-p no:anyio --strict-markers" \
			tests/ndif_server $(ARGS) || exit 1; \
	done

# a server's environment, which must lack this package, and models for it
ndif-setup: models $(NDIF)/server/.ready
	$(NDIF_SERVER) -m ndif_server.models

$(NDIF)/server/.ready: ndif_server/requirements.txt
	$(PYTHON) -m venv $(NDIF)/server
	$(NDIF_SERVER) -m pip install --quiet --upgrade "pip>=24"
	$(NDIF_SERVER) -m pip install --quiet "torch==2.13.0"
	$(NDIF_SERVER) -m pip install --quiet -r ndif_server/requirements.txt
	$(NDIF_SERVER) -m pip install --quiet --no-deps --ignore-requires-python "ndif==0.1.2"
	touch $@

# a client as a user has it: the package installed from its wheel, beside the development environment's libraries
ndif-client: $(VENV)/.ready
	rm -rf $(NDIF)/client $(NDIF)/wheel
	$(PYTHON) -m venv --without-pip $(NDIF)/client
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $(NDIF)/development.pth
	cp $(NDIF)/development.pth $$($(NDIF)/client/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir $(NDIF)/wheel .
	$(BIN)/python -m pip --python $(NDIF)/client/bin/python install --quiet --no-deps $(NDIF)/wheel/*.whl

clean:
	rm -rf $(VENV) build runs
