# Every command of the project; `make` alone lists them.
#
# PYTHON       the interpreter that .venv is made with, 3.10 to 3.13
# VENV         where the packages are installed
# WORKERS      how many tests run at a time; 0 runs them in one process
# PYTEST_ARGS  further arguments of pytest, e.g. PYTEST_ARGS="-k quantizer"
# CONFIG, RUN  what `make train` trains and where it writes; `make evaluate` reads RUN
# UPGRADE      UPGRADE=--upgrade lets `make lock` take newer versions

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
PYTEST_ARGS ?=
CONFIG ?= configs/digits_aib_qt.flags
RUN ?= runs/digits
UPGRADE ?=

LOCK ?= requirements/lock.txt
NEWEST_PYTHON ?= 13

# TensorFlow then prints errors only; a value of your own wins.
export TF_CPP_MIN_LOG_LEVEL ?= 2

python := "$(VENV)/bin/python"
pip := $(python) -m pip --disable-pip-version-check -qq
uv := $(python) -m uv pip compile --quiet --universal --python-version 3.10 \
	--custom-compile-command "make lock" $(UPGRADE)
# The processes share the cores, so that each computes on one.
pytest := OMP_NUM_THREADS=1 TF_NUM_INTRAOP_THREADS=1 TF_NUM_INTEROP_THREADS=1 \
	$(python) -m pytest -n $(WORKERS) --dist=loadfile

.DELETE_ON_ERROR:
.PHONY: help setup train evaluate test test-backends test-versions lint format lock benchmark clean

help: ## list the commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1@\2/p' Makefile \
		| while IFS=@ read -r name text; do printf '%-20s %s\n' "$$name" "$$text"; done

setup: $(VENV)/.ready ## create .venv with the locked packages and this one; nothing to do when it is there

# The two stamps are written last, so that an interrupted set-up starts over.
$(VENV)/.packages: $(LOCK)
	@"$(PYTHON)" -c 'import sys; v = sys.version_info[:2]; sys.exit((3, 10) > v or v > (3, $(NEWEST_PYTHON)))' \
		2>/dev/null || { echo "make: '$(PYTHON)' is no Python 3.10 to 3.$(NEWEST_PYTHON);" \
		"name one with PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "make: '$(PYTHON)' has no venv module;" \
		"install it (Debian and Ubuntu: python3-venv) or name another with PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "Installing the packages of $(LOCK) into $(VENV): one to three minutes, once"
	@rm -f "$(VENV)/.packages" "$(VENV)/.ready"
	@"$(PYTHON)" -m venv --clear "$(VENV)"
	@$(pip) install -r $(LOCK)
	@touch "$@"

$(VENV)/.ready: $(VENV)/.packages pyproject.toml setup.py aib_tf/__init__.py
	@echo "Installing aib_tf into $(VENV), as a link to this folder"
	@$(pip) install --no-deps --no-build-isolation --editable .
	@touch "$@"

# Beside the other packages, not among them: TensorFlow and Keras import JAX where they find it.
$(VENV)/jax/.ready: $(VENV)/.packages requirements/jax.txt
	@echo "Installing the packages of requirements/jax.txt into $(VENV)/jax: half a minute, once"
	@rm -rf "$(VENV)/jax"
	@$(pip) install --no-deps --target "$(VENV)/jax" -r requirements/jax.txt
	@touch "$@"

train: setup ## train the default model on handwritten digits, and draw where it looks
	@echo "Training $(CONFIG) into $(RUN)"
	@$(python) scripts/train.py --flagfile="$(CONFIG)" --output_dir="$(RUN)"

evaluate: setup ## print how well the trained model classifies and localises
	@echo "Evaluating $(RUN)"
	@$(python) scripts/evaluate.py --run="$(RUN)"

test: setup ## run the tests
	@echo "Running the tests, $(WORKERS) at a time"
	@$(pytest) $(PYTEST_ARGS)

test-backends: setup $(VENV)/jax/.ready ## run the conformance tests on the JAX backend of Keras
	@echo "Running the conformance tests on JAX"
	@KERAS_BACKEND=jax JAX_PLATFORMS=cpu PYTHONPATH="$$(cd "$(VENV)/jax" && pwd)" \
		$(pytest) tests/test_conformance.py $(PYTEST_ARGS)

test-versions: ## run the tests with the oldest versions that are supported (Python 3.10 to 3.12)
	@$(MAKE) --no-print-directory test VENV=$(VENV)-oldest LOCK=requirements/oldest.txt NEWEST_PYTHON=12

lint: setup ## check style and likely mistakes
	@echo "Checking style"
	@$(python) -m ruff check .
	@$(python) -m ruff format --check .

format: setup ## rewrite the code in the project's style
	@echo "Formatting"
	@$(python) -m ruff check --fix .
	@$(python) -m ruff format .

lock: setup ## write the exact versions of requirements/ from pyproject.toml
	@echo "Resolving the versions of requirements/"
	@$(uv) pyproject.toml --group dev --output-file requirements/lock.txt >/dev/null
	@$(uv) pyproject.toml --group dev --resolution lowest-direct \
		--constraint requirements/oldest.in --output-file requirements/oldest.txt >/dev/null
	@$(uv) --group jax --constraint requirements/lock.txt --no-annotate \
		--no-emit-package ml-dtypes --no-emit-package numpy \
		--no-emit-package opt-einsum --no-emit-package scipy \
		--output-file requirements/jax.txt >/dev/null

benchmark: setup ## measure the input pipeline
	@echo "Measuring the input pipeline"
	@$(python) benchmarks/pipeline.py

clean: ## remove what these commands installed or cached; trained models stay
	@echo "Removing environments, builds and caches"
	@rm -rf "$(VENV)" "$(VENV)-oldest" .build dist ./*.egg-info .pytest_cache .ruff_cache .hypothesis
	@find aib_tf benchmarks scripts tests -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
