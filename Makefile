# Every command of the project; `make` alone lists them.
#
# PYTHON       the interpreter that .venv is made with, 3.10 to 3.13
# VENV         where the packages are installed
# WORKERS      how many tests run at a time; 0 runs them in one process
# PYTEST_ARGS  further arguments of pytest, e.g. PYTEST_ARGS="-k quantizer"
# CONFIG, RUN  what `make train` trains and where it writes; `make evaluate` reads RUN
# PYTORCH      a Python that has PyTorch, for `make benchmark` to compare with
# PYSALIENCY   a Python that has pysaliency, for the same
# UPGRADE      UPGRADE=--upgrade lets `make lock` take newer versions
# BAZEL, BAZEL_ARGS  e.g. BAZEL="bazel --output_user_root=DIR"; BAZEL_ARGS= lets a current Bazel download its rules
# CXX, AIB_TF_CUDA, ...  what the ops are compiled with; custom_ops/compile.py lists them

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
PYTEST_ARGS ?=
CONFIG ?= configs/digits_aib_qt.flags
RUN ?= runs/digits
UPGRADE ?=
BAZEL ?= bazel
BAZEL_ARGS ?= --config=offline

LOCK ?= requirements/lock.txt
NEWEST_PYTHON ?= 13

# TensorFlow then prints errors only; a value of your own wins.
export TF_CPP_MIN_LOG_LEVEL ?= 2

python := "$(VENV)/bin/python"
pip := $(python) -m pip --disable-pip-version-check -qq
uv := $(python) -m uv pip compile --quiet --universal --python-version 3.10 \
	--custom-compile-command "make lock" $(UPGRADE)
# The processes share the cores, so that each computes on one.
one_thread := OMP_NUM_THREADS=1 TF_NUM_INTRAOP_THREADS=1 TF_NUM_INTEROP_THREADS=1
pytest := $(one_thread) $(python) -m pytest -n $(WORKERS) --dist=loadfile

compiled := aib_tf/ops/_build.json
compiled_for := $(VENV) $(AIB_TF_CUDA) $(AIB_TF_CUDA_ARCHITECTURES)

.DELETE_ON_ERROR:
.PHONY: docs tutorial help setup train evaluate test test-backends test-bazel test-large test-loaders
.PHONY: test-native test-races test-versions test-wheel lint format lock benchmark benchmark-scaling precision soak clean

help: ## list the commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1@\2/p' Makefile \
		| while IFS=@ read -r name text; do printf '%-20s %s\n' "$$name" "$$text"; done

setup: $(VENV)/.ready $(compiled) ## create .venv with the locked packages and this one; nothing to do when it is there

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

# It lies beside the sources, for one environment at a time.
ifneq ($(shell cat .build/compiled-for 2>/dev/null),$(compiled_for))
.PHONY: $(compiled)
endif
# A compiler that refuses is as good as none, until tests are to run.
test test-backends test-wheel: strict := --strict
$(compiled): $(VENV)/.packages custom_ops/compile.py $(wildcard custom_ops/*/*.h custom_ops/*/*.cc)
	@echo "Compiling custom_ops/ for the TensorFlow in $(VENV): about a minute"
	@$(python) custom_ops/compile.py --output=aib_tf/ops $(strict)
	@mkdir -p .build && echo "$(compiled_for)" >.build/compiled-for
	@touch "$@"

# An editable install compiles as well, and has nothing to do after it.
$(VENV)/.ready: $(VENV)/.packages pyproject.toml setup.py aib_tf/__init__.py | $(compiled)
	@echo "Installing aib_tf into $(VENV), as a link to this folder"
	@rm -rf ./*.egg-info # of an older pyproject.toml, which would be read first
	@$(pip) install --no-deps --no-build-isolation --editable .
	@touch "$@"

# Beside the other packages, not among them: TensorFlow and Keras import JAX where they find it.
$(VENV)/jax/.ready: $(VENV)/.packages requirements/jax.txt
	@echo "Installing the packages of requirements/jax.txt into $(VENV)/jax: half a minute, once"
	@rm -rf "$(VENV)/jax"
	@$(pip) install --no-deps --target "$(VENV)/jax" -r requirements/jax.txt
	@touch "$@"

# Environments of their own: the loaders' TensorFlow is another one, and the site is made from the sources alone.
$(VENV)-loaders/.ready $(VENV)-docs/.ready: $(VENV)-%/.ready: requirements/%.txt | $(VENV)/.packages
	@echo "Installing the packages of $< into $(VENV)-$*: up to three minutes, once"
	@rm -f "$@"
	@$(python) -m venv --clear "$(VENV)-$*"
	@"$(VENV)-$*/bin/python" -m pip --disable-pip-version-check -qq install -r "$<"
	@touch "$@"

train: setup ## train the default model on handwritten digits, and draw where it looks
	@echo "Training $(CONFIG) into $(RUN)"
	@$(python) scripts/train.py --flagfile="$(CONFIG)" --output_dir="$(RUN)"

evaluate: setup ## measure the trained model in every way there is, and write a report: a few minutes
	@echo "Evaluating $(RUN)"
	@$(python) scripts/evaluate.py --run="$(RUN)" --report="$(RUN)/report"

test: setup ## run the tests
	@echo "Running the tests, $(WORKERS) at a time"
	@$(pytest) $(PYTEST_ARGS)

test-backends: setup $(VENV)/jax/.ready ## run the conformance tests on the JAX backend of Keras
	@echo "Running the conformance tests on JAX"
	@KERAS_BACKEND=jax JAX_PLATFORMS=cpu PYTHONPATH="$$(cd "$(VENV)/jax" && pwd)" \
		$(pytest) --dist=load tests/test_conformance.py $(PYTEST_ARGS) # one file, for all processes

# `make test` runs the same tests in the TensorFlow of $(VENV).
test-loaders: setup $(VENV)-loaders/.ready ## run exported models in the oldest TensorFlow and in OpenVINO
	@echo "Running exported models in the oldest TensorFlow and in OpenVINO"
	@AIB_TF_LOADERS_PYTHON="$$(cd "$(VENV)-loaders/bin" && pwd)/python" \
		$(pytest) tests/loaders -k "oldest_tensorflow or openvino" $(PYTEST_ARGS)

test-bazel: $(VENV)/.packages ## build the ops with Bazel and run their tests on what it built
	@command -v $(firstword $(BAZEL)) >/dev/null || { echo "make: there is no Bazel; install it (Debian:" \
		"apt-get install bazel-bootstrap) or name one with BAZEL=/path/to/bazel" >&2; exit 1; }
	@echo "Building and testing the ops with Bazel"
	@PYTHON_BIN_PATH="$$(cd "$(VENV)/bin" && pwd)/python" $(BAZEL) test $(BAZEL_ARGS) //...

test-native: $(VENV)/.packages ## run the C++ tests, also with sanitizers, on each instruction set of this processor
	@echo "Compiling and running the C++ tests"
	@$(python) custom_ops/compile.py --tests --output=.build/native
	@$(python) custom_ops/compile.py --tests --output=.build/sanitized --sanitize=address,undefined
	@set -e; for folder in native sanitized; do for instructions in baseline avx2 avx512; do \
		AIB_TF_CPU=$$instructions .build/$$folder/nearest_anchor_test; done; \
		.build/$$folder/nearest_anchor_cuda_test; done

test-races: $(VENV)/.packages ## look for data races in the CUDA kernels, in their emulation on the CPU
	@echo "Compiling the CUDA kernels for the CPU, and looking for data races"
	@$(python) custom_ops/compile.py --tests --output=.build/threads --sanitize=thread
	@.build/threads/nearest_anchor_cuda_test
	@echo "No data race was found"

test-large: $(VENV)/.packages ## run the C++ tests with more than 2^31 elements, for which they need 17 GB of memory
	@$(python) custom_ops/compile.py --tests --output=.build/native
	@.build/native/nearest_anchor_test --large

# From the source archive, so that what is missing there shows. The environment sees the packages of $(VENV), but not
# the link to this folder, and the tests run in a folder that has nothing else of it.
test-wheel: setup ## build a wheel, install it in an environment of its own and test it there
	@echo "Building a wheel from the source archive, and testing it in .build/wheel: three minutes"
	@rm -rf .build/wheel
	@mkdir -p .build/wheel
	@$(python) setup.py -q sdist --dist-dir .build/wheel
	@$(pip) wheel --no-cache-dir --no-deps --wheel-dir .build/wheel .build/wheel/*.tar.gz
	@$(python) -m venv --without-pip .build/wheel/venv
	@$(python) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		>"$$(echo .build/wheel/venv/lib/python*/site-packages)/packages.pth"
	@$(python) -m pip --python .build/wheel/venv/bin/python -qq install --no-deps --ignore-installed .build/wheel/*.whl
	@cp -R pyproject.toml tests .build/wheel
	@cd .build/wheel && export AIB_TF_OPS=custom && venv/bin/python -c 'import sys, aib_tf; \
		print(aib_tf.__file__, aib_tf.ops.implementation()); \
		sys.exit(not aib_tf.__file__.startswith(sys.prefix))' \
		&& $(one_thread) venv/bin/python -m pytest -n $(WORKERS) --dist=loadfile \
		tests/ops tests/layers/test_anchor_quantizer.py $(PYTEST_ARGS)

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

# The theme announces its successor on each build.
docs: $(VENV)-docs/.ready ## build the documentation as a site, .build/site/index.html, and check its links
	@echo "Building .build/site"
	@NO_MKDOCS_2_WARNING=1 "$(VENV)-docs/bin/python" -m mkdocs build --strict

tutorial: setup ## run docs/tutorial.ipynb from top to bottom and keep what it shows: a few minutes
	@echo "Running docs/tutorial.ipynb"
	@$(python) docs/run_tutorial.py

lock: setup ## write the exact versions of requirements/ from pyproject.toml
	@echo "Resolving the versions of requirements/"
	@$(uv) pyproject.toml --group dev --output-file requirements/lock.txt >/dev/null
	@$(uv) pyproject.toml --group dev --resolution lowest-direct \
		--constraint requirements/oldest.in --output-file requirements/oldest.txt >/dev/null
	@$(uv) --group jax --constraint requirements/lock.txt --no-annotate \
		--no-emit-package ml-dtypes --no-emit-package numpy \
		--no-emit-package opt-einsum --no-emit-package scipy \
		--output-file requirements/jax.txt >/dev/null
	@$(uv) --group loaders --no-annotate --output-file requirements/loaders.txt >/dev/null
	@$(uv) --group docs --no-annotate --output-file requirements/docs.txt >/dev/null

benchmark: setup ## measure the input pipeline, a training step, an exported model and the compiled op
	@echo "Measuring the input pipeline"
	@$(python) benchmarks/pipeline.py
	@echo "Measuring a training step and inference; PYTORCH=PYTHON names a Python that has the rival"
	@$(python) benchmarks/training.py $(if $(PYTORCH),--pytorch="$(PYTORCH)")
	@echo "Measuring an exported model"
	@$(python) benchmarks/serving.py $(if $(PYTORCH),--pytorch="$(PYTORCH)")
	@echo "Measuring the comparison with gaze; PYSALIENCY=PYTHON names a Python that has the rival"
	@$(python) benchmarks/saliency.py $(if $(PYSALIENCY),--pysaliency="$(PYSALIENCY)")
	@echo "Measuring the compiled op"
	@$(python) benchmarks/nearest_anchor.py

benchmark-scaling: setup ## measure training on two devices and in two processes: about seven minutes
	@$(python) benchmarks/scaling.py

soak: setup ## train for 200 epochs, and see that memory and open files stay flat: about five minutes
	@$(python) benchmarks/soak.py

precision: setup ## train the default model in half precision and with XLA: about two hours on two cores
	@for seed in 0 1 2; do for flags in --precision=float32 --precision=mixed_bfloat16 --jit_compile=true 		"--precision=mixed_float16 --jit_compile=true"; do 		$(python) scripts/train.py --flagfile=configs/digits_aib_qt.flags $$flags --seed=$$seed 		--output_dir="$(RUN)-precision/$$(echo $$flags | tr -dc a-z0-9)-$$seed" || exit 1; done; done

clean: ## remove what these commands installed or cached; trained models stay
	@echo "Removing environments, builds and caches"
	@rm -rf "$(VENV)" "$(VENV)-docs" "$(VENV)-loaders" "$(VENV)-oldest" .build dist ./*.egg-info .pytest_cache .ruff_cache .hypothesis
	@if [ -L bazel-out ]; then $(BAZEL) clean --expunge; fi
	@rm -f aib_tf/ops/_build.json aib_tf/ops/*.so aib_tf/ops/*.partial
	@find aib_tf benchmarks custom_ops docs scripts tests -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
