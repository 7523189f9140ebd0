# Two commands: `make demo` and `make test`. Either sets everything up first.
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
TORCH  ?= torch
# What the demo and the tests need beyond the package; pyproject.toml names the versions.
EXTRAS ?= test,lint
NATIVE := $(shell find csrc -type f)
EMULATION := $(wildcard tests/cuda_emulation/*.h tests/cuda_emulation/*.cpp)
SOURCES := $(filter %.cpp %.h %.cu,$(NATIVE)) $(EMULATION)
CUDA_TOOLKIT := build/cuda-toolkit/.installed

.PHONY: demo test test-long setup cuda bench parity lint format docs gpu clean
.DEFAULT_GOAL := test
# Two processes: one test's threads, compilers and waiting leave a second core free.
PYTEST := CASVIT_KERNELS_REQUIRE_NATIVE=1 $(BIN)/python -m pytest -n 2 --dist worksteal

demo: setup
	$(BIN)/python -m casvit_kernels demo $(ARGS)

# In two runs: after all other tests in one process, LLVM (Triton's, Inductor's) ended it three times with a
# general protection fault in some test_t*.py. Not seen in fresh processes; the cause is not found.
test: setup
ifeq ($(strip $(ARGS)),)
	$(PYTEST) -m "not long" --ignore-glob="*/test_t*.py"
	$(PYTEST) -m "not long" tests/test_t*.py
else
	$(PYTEST) -m "not long" $(ARGS)
endif

# What builds environments, starts many processes or sweeps.
test-long: setup
	$(PYTEST) -m long $(ARGS)

bench: setup
	$(BIN)/python -m pytest bench/ --benchmark-only --json-dir bench/results $(ARGS)
	$(BIN)/python bench/report

parity: setup
	$(BIN)/python -m casvit_kernels parity $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)
	$(BIN)/python bench/report --check
	$(BIN)/python csrc/cpu/simd/gelu_table.py --check
	$(BIN)/python bench/static/triton_kernels.py --check
	$(BIN)/python bench/static/triton_traffic.py --check
	$(BIN)/python bench/static/cuda_kernels.py --check

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

# The site, in build/docs. Warnings are errors, and every link inside it leads somewhere.
docs: setup $(VENV)/.docs
	rm -rf build/docs
	$(BIN)/python -m sphinx -W --keep-going -q -E -c docs -d build/doctrees . build/docs
	$(BIN)/python docs/check_links.py build/docs

# Needs no network: where a Python that is there sees a GPU with its torch, that one runs it. Again to go on.
gpu:
	@for python in $(BIN)/python $(PYTHON) python3; do \
	  $$python -c 'import torch; raise SystemExit(not torch.cuda.is_available())' 2>/dev/null \
	    && found=$$python && break; \
	done; \
	if test -z "$$found"; then $(MAKE) setup && found=$(BIN)/python; fi && \
	PYTHONPATH="$(CURDIR):$$PYTHONPATH" $$found bench/gpu $(ARGS)

# nvcc from PyPI (276 MB), and the library with CUDA kernels; every later build has them.
cuda: $(CUDA_TOOLKIT) setup

$(CUDA_TOOLKIT): csrc/cuda/toolkit.txt | $(VENV)/.packages
	rm -rf build/cuda-toolkit
	$(BIN)/python -m pip install --quiet --no-deps --target build/cuda-toolkit -r $<
	rm -f $(VENV)/.native
	touch $@

clean:
	rm -rf $(VENV) build dist casvit_kernels.egg-info casvit_kernels/_C.so .pytest_cache .mypy_cache .ruff_cache .benchmarks

setup: $(VENV)/.packages $(VENV)/.native

# The packages; again when the list of them changes. torch is named twice: extras would bring the newest.
$(VENV)/.packages: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH) "setuptools>=77" wheel "cmake>=3.24" ninja
	CASVIT_KERNELS_REQUIRE_NATIVE=1 $(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[$(EXTRAS)]" $(TORCH)
	touch $@

# What builds the site; only `make docs` needs it.
$(VENV)/.docs: $(VENV)/.packages
	$(BIN)/python -m pip install --quiet "casvit-kernels[docs]"
	touch $@

# The native library; again when a source of it changes, and then only what depends on that.
$(VENV)/.native: $(VENV)/.packages setup.py $(NATIVE)
	CASVIT_KERNELS_REQUIRE_NATIVE=1 $(BIN)/python setup.py --quiet build_ext --inplace
	touch $@
