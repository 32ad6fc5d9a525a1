# Two commands: `make book` and `make test`. `make help` lists the others.

PROFILE ?= laptop
SEED ?= 0
SEEDS ?= $(SEED)
OVERRIDES ?=
CORES ?= all
VENV ?= .venv
TORCH_FLAGS ?=
TESTS ?=

# The first Python at hand for which the packages are pinned.
SUITABLE := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,\
	$(shell $(p) -c '$(SUITABLE)' 2>/dev/null && echo $(p))))

BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Another project's packages must not get in front of the pinned ones.
unexport PYTHONPATH PYTHONHOME

.DEFAULT_GOAL := help
.PHONY: help book dry-run test lab sync times lint format lock clean clean-runs

help: ## Show this list
	@echo "make TARGET [PROFILE=smoke|laptop|colab|paper] [SEED=0] [SEEDS=\"0 1 2\"]"
	@echo "            [OVERRIDES=\"epochs=3 latent_dim=32\"] [CORES=2] [TORCH_FLAGS=...]"
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-18s%s\n", $$1, $$2}'

# PyTorch goes first: its build (CPU or CUDA) is chosen by TORCH_FLAGS, and the rest follows it.
$(READY): requirements.lock
	@test -x "$(BIN)/python" || test -n "$(PYTHON)" || \
		{ echo "No Python 3.11, 3.12 or 3.13 was found. Install one, or name it: make PYTHON=/path/to/python3"; exit 1; }
	@test -x "$(BIN)/python" || { echo "Making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv "$(VENV)"; }
	$(PIP) install $(TORCH_FLAGS) $$(grep '^torch==' requirements.lock)
	$(PIP) install -r requirements.lock
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@touch $@

SNAKEMAKE = $(BIN)/python -m snakemake --cores $(CORES) --nolock --rerun-incomplete \
	--quiet rules host progress reason --config profile=$(PROFILE) seeds="$(SEEDS)" overrides="$(OVERRIDES)"

book: $(READY) ## Run every chapter and build the book (default: PROFILE=laptop)
	@$(SNAKEMAKE)
	@echo "The book is ready in each folder $${TWO_LATENTS_RUNS:-runs}/$(PROFILE)*/seed-*/book: open its index.html"

dry-run: $(READY) ## Show what `make book` would run, and why
	@$(SNAKEMAKE) --dry-run

test: $(READY) ## Run all tests, with the smoke profile's book among them
	$(BIN)/python -m pytest -n $(if $(filter all,$(CORES)),auto,$(CORES)) --cov \
		--cov-report=term --cov-fail-under=90 $(TESTS)

lab: $(READY) ## Open JupyterLab on the chapters
	$(BIN)/python -m jupyterlab notebooks

sync: $(READY) ## Make each notebook from its script (the .py wins)
	$(BIN)/python notebooks/sync.py

times: $(READY) ## Measure the chapters' run times afresh, from an empty folder
	rm -rf runs/.times
	@$(SNAKEMAKE) runs=runs/.times -- all_chapters
	$(BIN)/python book/run_times.py runs/.times
	$(BIN)/python notebooks/sync.py

lint: $(READY) ## Check style, and that the pairs agree
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python notebooks/sync.py --check

format: $(READY) ## Put the code into its usual form
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

lock: $(READY) ## Pin the packages anew, as pyproject.toml allows
	$(BIN)/python .ci/lock.py

clean: ## Remove the environment and what tools leave behind; runs stay
	rm -rf .venv .snakemake .pytest_cache .ruff_cache .hypothesis .coverage .coverage.* *.egg-info

clean-runs: ## Remove all runs: cohorts, models, results, books
	rm -rf runs
