# `make help` lists the targets. `make venv` is enough to start with: every other target makes it when it is missing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Read by the demo: Hugging Face folders or hub ids to use instead of the models it fetches, and where its results go.
SPEECH_MODEL ?=
TEXT_MODEL ?=
OUTPUT_DIR ?=
DEMO_ARGUMENTS = $(if $(SPEECH_MODEL),--speech-model "$(SPEECH_MODEL)") \
	$(if $(TEXT_MODEL),--text-model "$(TEXT_MODEL)") \
	$(if $(OUTPUT_DIR),--output-dir "$(OUTPUT_DIR)")

.DEFAULT_GOAL := help
.PHONY: help venv test test-slow quality style demo bench experiment clean

help:  ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

venv: $(INSTALLED)  ## Make .venv with the pinned requirements and this package

# The stamp comes last, so that an interrupted installation is taken up again.
# torch goes first and alone: a CPU build at hand then satisfies its pin, and nothing later pulls another.
$(INSTALLED): requirements.txt setup.py tools/mend_torchaudio.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install "$$(grep '^torch==' requirements.txt)"
	$(BIN)/python -m pip install -r requirements.txt
	$(BIN)/python -m pip install --no-deps -e .
	$(BIN)/python tools/mend_torchaudio.py
	touch $@

test: venv  ## Run the fast tests
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not slow"

test-slow: venv  ## Run the slow tests: real models, whole training runs
	$(BIN)/python -m pip install -q -r experiments/tiny/requirements.txt
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

quality: venv  ## Check lint and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: venv  ## Mend what of lint and formatting can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: venv  ## Compose, augment, train, evaluate and ask a small LSM (SPEECH_MODEL=, TEXT_MODEL=, OUTPUT_DIR= to choose)
	$(BIN)/python -m demo.run $(DEMO_ARGUMENTS)

bench: venv  ## Measure how fast everything is: training, augmenting, evaluating, answering
	$(BIN)/python -m benchmarks.bench_encoder
	$(BIN)/python -m benchmarks.bench_augment
	$(BIN)/python -m benchmarks.bench_align
	$(BIN)/python -m benchmarks.bench_train
	$(BIN)/python -m benchmarks.bench_eval
	$(BIN)/python -m benchmarks.bench_pipeline

experiment: venv  ## Vanilla against self-powered training, from text to results (SCALE=smoke, small or full)
	$(BIN)/python -m pip install -q -r experiments/tiny/requirements.txt
	$(MAKE) -f experiments/tiny/Makefile PYTHON=$(BIN)/python $(if $(SCALE),SCALE=$(SCALE)) $(if $(OUTPUT_DIR),RUN=$(OUTPUT_DIR)/$(or $(SCALE),small))

clean:  ## Remove the environment and caches
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
