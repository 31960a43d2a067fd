# Everything a developer does. `make help` lists it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NAME ?= accuracy
DATA ?= ../shared
SECONDS ?= 60

.PHONY: help demo test test-slow test-gpu check format fuzz bench docs setup clean

help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: $(STAMP)  ## Make the virtual environment with everything in it

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)  ## Train a small network on handwritten digits and compress it (2 minutes on two idle cores, no download of data)
	$(BIN)/sekron-search demo --out runs/demo

test: $(STAMP)  ## Run the tests (but the slow ones)
	$(BIN)/python -m pytest -q --numprocesses 2 --dist loadfile --durations 25

test-slow: $(STAMP)  ## Run the slow tests too: kills and resumes, the whole demonstration
	$(BIN)/python -m pytest -q -m 'not gpu'

test-gpu: $(STAMP)  ## Run the tests that need a CUDA device, with a build of torch that has CUDA
	$(BIN)/python -m pytest -q -m gpu

check: $(STAMP)  ## Run the linters: ruff, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

fuzz: $(STAMP)  ## Fuzz by a test of tests/fuzz: make fuzz NAME=test_configs SECONDS=600
	$(BIN)/pip install --quiet -c constraints.txt -e '.[fuzz]'
	$(BIN)/python -m tests.fuzz $(NAME) --seconds $(SECONDS)

bench: $(STAMP)  ## Run a benchmark: make bench NAME=accuracy DATA=folder-with-the-data
	$(BIN)/python -m benchmarks.$(NAME) --data $(DATA)

docs: $(STAMP)  ## Build the reference of the Python interface from its docstrings, in build/docs
	$(BIN)/python docs/reference.py build/docs

clean:  ## Delete the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
