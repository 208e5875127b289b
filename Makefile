# VENV is the environment that everything runs in; with `VENV=` (empty) the targets use the current environment's python
# and the source tree, and install nothing.
VENV ?= .venv
PYTHON ?= python3
# Installed first, so that nothing else chooses torch's version; pip options may stand here too (--index-url ...).
TORCH ?= torch==2.13.0
# The version whose machine code tests/triton_budget.json holds; torch for CUDA brings its own (then TRITON=).
TRITON ?= triton==3.9.0

ifeq ($(strip $(VENV)),)
STAMP :=
PARALLEL :=
PY := PYTHONPATH="$(CURDIR):$(CURDIR)/python$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON)
else
STAMP := $(VENV)/.voco-installed
# The tests of a file stay together: some share what is expensive to make.
PARALLEL := -n 2 --dist loadfile
PY := $(VENV)/bin/python
endif

# Of the benchmarks: PART names suites, RESULTS a file for the results, COMMIT the commit outside of git.
RUN = $(if $(PART),--part $(PART)) $(if $(RESULTS),--results "$(RESULTS)") $(if $(COMMIT),--commit "$(COMMIT)")

.DEFAULT_GOAL := help
.PHONY: help env demo retention train-demo test test-full lint bench gpu-bench gpu-check wheel clean

help: ## print this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | awk -F'|' '{ printf "make %-12s %s\n", $$1, $$2 }'

env: $(STAMP) ## create the environment in VENV (default .venv), or bring it up to date

ifneq ($(STAMP),)
$(STAMP): pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install $(TORCH) $(TRITON)
	$(PY) -m pip install -e ".[demo,train,test]"
	touch $@
endif

demo: $(STAMP) ## the whole two-stage path on a small model
	$(PY) -m voco_llama.cli demo

retention: $(STAMP) ## train all systems on digits and write the paper's tables; SMOKE=1 for a trial, ARGS="--minutes 60"
	$(PY) -m voco_llama.retention --out "$(or $(OUT),voco-retention$(if $(SMOKE),-smoke))" $(if $(SMOKE),--smoke) $(ARGS)

train-demo: $(STAMP) ## train the demo's model again
	$(PY) -m voco_llama.demo.train

test: lint ## lint and the quick tests: what CI runs
	$(PY) -m pytest $(PARALLEL)

test-full: lint ## every test, also the slow ones and, on a GPU, those that need one
	$(PY) -m pytest -m ""

lint: $(STAMP) ## check the style
	$(PY) -m ruff check

bench: $(STAMP) ## measure this machine's CPU, about ten minutes; PART="kv plan" for some suites
	$(PY) -m bench.run --device cpu --fresh $(RUN)

gpu-bench: $(STAMP) ## measure an NVIDIA GPU, suite by suite; again goes on where it was ended
	$(PY) -m bench.run --device cuda $(RUN)

gpu-check: $(STAMP) ## test, check and time the kernels on an NVIDIA GPU, and record it; COMMIT=... outside of git
	$(PY) -m bench.gpu_check $(if $(COMMIT),--commit "$(COMMIT)")

wheel: $(STAMP) ## build the wheel into dist/
	rm -rf build/lib* build/bdist*
	$(PY) -m pip wheel --no-deps --wheel-dir dist .

clean: ## remove what builds and tests left behind; the next `make env` installs again
	rm -rf build dist .benchmarks .hypothesis .pytest_cache .ruff_cache *.egg-info voco_kernels/_cuda*.so $(STAMP)
