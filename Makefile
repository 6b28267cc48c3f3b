# vitprune: everything a newcomer needs; `make help` lists it.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# two test processes of one thread each: more threads than cores make torch crawl
TESTS  := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow browser test-oldest lint format types imports docs package clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(VENV)/.installed  ## Create .venv with vitprune and what its development needs

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	rm -rf $(VENV)/timm $(VENV)/torchao  # pip replaces nothing in a target folder
	# torchvision comes with no other package: it has no build for every machine, timm's and torchao's tests only import it
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --target $(VENV)/timm timm torchvision
	# torchao talks on stderr wherever transformers finds it
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --target $(VENV)/torchao torchao
	touch $@

demo: install  ## Prune, fine-tune, compare and save a small ViT; offline, three to six minutes
	HF_HUB_OFFLINE=1 $(BIN)/vitprune apply recipes/quickstart.yaml --set output.overwrite=true

test: install  ## Run the tests, but for the slow ones
	$(TESTS) --ignore tests/slow

test-slow: install  ## Run tests that start processes, kill runs, compile; timm's, torchao's and gradio's
	$(TESTS) --dist loadfile tests/slow  # one at a time of those that want the same port
	$(TESTS) integrations/timm
	$(TESTS) integrations/torchao
	$(TESTS) integrations/gradio

browser:  ## Install Chromium for the tests of pages, where it isn't there (Debian, as root)
	command -v chromium > /dev/null || (apt-get update -q && apt-get install -q -y --no-install-recommends chromium)

test-oldest: install  ## Run the tests with the oldest versions that pyproject.toml allows, in .venv-oldest
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable '.[dev]'
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 .venv-oldest/bin/python -m pytest -n 2 --ignore tests/slow

lint: install  ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install  ## Put the code in form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install  ## Check types
	$(BIN)/pyright --pythonpath $(BIN)/python

imports: install  ## Check that imports only go down
	$(BIN)/lint-imports --no-cache

docs: install  ## Build the documentation site
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

package: install  ## Build the wheel
	$(BIN)/python -m build --wheel

clean:  ## Remove what make made
	rm -rf $(VENV) .venv-oldest dist runs site .ruff_cache
