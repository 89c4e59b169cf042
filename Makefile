# Needs python3 (3.11 or newer, with its venv module). Each target does its own set-up, in .venv; what
# is done already is not done again. `make test` also wants two programs, see $(VENV)/programs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
SPEC := pyproject.toml constraints.txt setup.py fxopt/page/libraries.py

# Two test processes with one thread each: more threads than cores make everything slower.
WORKERS ?= 2
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.PHONY: help demo test check format bench-smoke clean
.DEFAULT_GOAL := help

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/vision ## Compile ResNet-18 to ONNX, run it, and show what each pass did
	$(BIN)/fxopt compile torchvision.models:resnet18 --backend onnx -o resnet18.onnx --benchmark
	$(BIN)/fxopt view torchvision.models:resnet18 -o resnet18.html

test: $(VENV)/dev $(VENV)/programs ## Run the whole test suite (TESTS=path for a part of it)
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(TESTS)

check: $(VENV)/dev ## Run the linter and the type checker
	$(BIN)/ruff check .
	$(BIN)/python -m mypy

format: $(VENV)/dev ## Sort imports and apply the linter's safe fixes
	$(BIN)/ruff check --fix .

bench-smoke: $(VENV)/dev ## Look for what made fxopt slower, by counts: about a minute
	$(ONE_THREAD) $(BIN)/python tools/bench_smoke.py

clean: ## Remove the virtual environment, caches and build products
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# -- set-up ------------------------------------------------------------------------------------------

# torch goes first and pinned: whatever depends on torch would otherwise bring the newest.
$(VENV)/torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "fxopt needs Python 3.11 or newer; set PYTHON=, for instance make test PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python -a -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) \
	  || { rm -rf $(VENV); echo "python3 has no venv module; on Debian: apt-get install python3-venv"; exit 1; }
	@echo "installing torch into $(VENV)"
	@$(PIP) torch
	@touch $@

$(VENV)/vision: $(VENV)/torch $(SPEC)
	@echo "installing fxopt with torchvision"
	@$(PIP) --editable '.[vision]'
	@touch $@

$(VENV)/dev: $(VENV)/torch $(SPEC)
	@echo "installing fxopt with what tests and checks need"
	@$(PIP) --editable '.[dev]'
	@touch $@

# Two programs that no Python package holds: Graphviz draws pictures, Chromium opens the page.
# Where they cannot be installed here, the tests that need them are skipped, and say so.
$(VENV)/programs: $(VENV)/torch
	@{ command -v dot && command -v chromium; } > /dev/null \
	  || { command -v apt-get > /dev/null && test "$$(id -u)" = 0 \
	       && echo "installing Graphviz and Chromium" && apt-get update -qq \
	       && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends \
	            graphviz chromium fonts-dejavu-core > /dev/null; } \
	  || echo "Some tests will be skipped: install Graphviz (dot) and Chromium to run them."
	@touch $@
