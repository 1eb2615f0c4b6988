# Every target sets up what it needs from nothing: a virtual environment with the pinned versions of
# constraints.txt, and the native kernels (CUDA too if nvcc is found; no GPU is needed to build them).
#
#   make demo    the main job on the shipped images and model: a table and an HTML report
#   make test    lint and all tests
#   make bench   time the ops on this machine's CPU, in at most three minutes
#   make gpu     build, check and time the kernels on a GPU, in at most ten minutes; needs no network: it uses the
#                environment in .venv or else PYTHON, with torch >= 2.11 for CUDA, cmake, ninja and pybind11 in it
#   make lint    ruff, mypy, clang-format
#   make format  rewrite the sources as 'make lint' wants them
#   make docs    refresh the generated parts of the README, check links
#   make clean   remove what was built (the environment, too)
#
#   PYTHON=python3.12   the interpreter that makes the environment
#   CAPT_CUDA=ON        fail if CUDA kernels cannot be built; OFF: do not try

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

# One thread pool waits for the other by spinning otherwise, which costs more than the work on few cores.
export GOMP_SPINCOUNT := 0
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# cmake and ninja come from the environment.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

RUN_PACKAGES := torch torchvision triton numpy safetensors tyro rich pillow open_clip_torch timm Jinja2 \
	setuptools wheel pybind11 ninja cmake
DEVELOP_PACKAGES := transformers matplotlib scipy scikit-learn faiss-cpu pytest pytest-benchmark pytest-xdist hypothesis mypy ruff clang-format

RUN_STAMP := $(VENV)/.packages-to-run
DEVELOP_STAMP := $(VENV)/.packages-to-develop
BUILD_STAMP := $(VENV)/.built
NATIVE := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml
CXX_SOURCES = $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.hpp')

.NOTPARALLEL:
.PHONY: demo test bench gpu lint format docs clean

demo: $(RUN_STAMP) $(BUILD_STAMP)
	$(PY) -m capt demo

test: lint $(BUILD_STAMP)
	$(PY) -m pytest -q --durations=10 -n auto --dist loadfile

bench: $(DEVELOP_STAMP) $(BUILD_STAMP)
	$(PY) -m pytest -q benchmarks --benchmark-only

gpu:
	$(if $(wildcard $(PY)),$(PY),$(PYTHON)) -m benchmarks.gpu --build

lint: $(DEVELOP_STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_SOURCES)

format: $(DEVELOP_STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_SOURCES)

docs: $(RUN_STAMP) $(BUILD_STAMP)
	$(PY) scripts/docs.py

clean:
	rm -rf $(VENV) build dist capt.egg-info capt/*.so .mypy_cache .pytest_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	$(PYTHON) -m venv $(VENV)

# All packages are named in one command: a later, looser request could replace torch by another build.
$(RUN_STAMP): constraints.txt | $(PY)
	$(PY) -m pip install -q -c constraints.txt $(RUN_PACKAGES)
	touch $@

$(DEVELOP_STAMP): constraints.txt | $(PY)
	$(PY) -m pip install -q -c constraints.txt $(RUN_PACKAGES) $(DEVELOP_PACKAGES)
	touch $(RUN_STAMP) $@

$(BUILD_STAMP): $(NATIVE)
	$(PY) -m pip install -q --no-build-isolation --no-deps -e .
	touch $@
