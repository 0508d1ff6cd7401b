# `make demo` and `make test` are all that a newcomer needs; both make .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

export OMP_NUM_THREADS ?= 1

.PHONY: help
help: ## Say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml constraints.txt
	@echo "installing gradwatch, torch and the development tools into $(VENV) (once, a minute or two)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[torch,dev]'
	@touch $@

.PHONY: venv
venv: $(INSTALLED) ## Make the virtual environment

.PHONY: demo
demo: $(INSTALLED) ## Train a small GPT, corrupt one rank's data, and see who is named
	@$(BIN)/gradwatch demo

.PHONY: test
test: $(INSTALLED) ## Run all tests, real training jobs among them
	@$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: check
check: $(INSTALLED) ## Format, lint, types, layers, stubs
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@scripts/stubs.sh --check

.PHONY: format
format: $(INSTALLED) ## Format the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

.PHONY: stubs
stubs: ## Make the protobuf stubs from the schema
	@scripts/stubs.sh

.PHONY: bench
bench: $(INSTALLED) ## What watching costs, as ratios in one run (about twenty minutes)
	@$(BIN)/torchrun --nproc-per-node 2 -m benchmarks.overhead
	@$(BIN)/python -m benchmarks.restart
	@$(BIN)/python -m benchmarks.ray_restart
	@$(BIN)/python -m benchmarks.checkpoint_scan
	@$(BIN)/python -m benchmarks.scrape
	@$(BIN)/python -m benchmarks.alert_latency

.PHONY: campaign
campaign: $(INSTALLED) ## 300 random faults and 100 clean models: are all named right?
	@$(BIN)/python -m tests.campaign.run

.PHONY: ray-campaign
ray-campaign: $(INSTALLED) ## 10 Ray Train runs with a fault at a random step: do all go back, and end finite?
	@$(BIN)/python -m tests.campaign.ray

.PHONY: kills
kills: $(INSTALLED) ## SIGKILL ranks, sidecar and collector 20 times each: is any event lost?
	@KILLS=20 $(BIN)/python -m pytest tests/e2e/test_loses_nothing.py

.PHONY: attribution
attribution: $(INSTALLED) ## The catalogue of faults at random places: a table of what is named
	@$(BIN)/python -m tests.campaign.attribution

.PHONY: field
field: $(INSTALLED) ## Programs after public reports, plain and watched: is every verdict right?
	@$(BIN)/python -m tests.field.run

.PHONY: campaign-rollbacks
campaign-rollbacks: $(INSTALLED) ## 50 rollbacks on one node, 20 on two (half an hour; needs root and iproute2)
	@$(BIN)/python -m tests.campaign.rollbacks --count 50
	@$(BIN)/python -m tests.campaign.rollbacks --nodes 2 --count 20

.PHONY: screenshots
screenshots: $(INSTALLED) ## Pictures of the page, of real jobs (wants chromium and chromium-driver)
	@$(BIN)/python -m scripts.screenshots

.PHONY: clean
clean: ## Remove what was made here
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis dist
