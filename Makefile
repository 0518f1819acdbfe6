# Every target sets itself up from nothing: a virtual environment with torch, then pyargs with its extension.
#   make demo | test | fuzz | docs | reproduce | artefacts | kernels | bench | sanitize | sanitize-threads | test-matrix |
#        cuda-check | lint | clean   (VENV=, TORCH=)
PYTHON ?= python3
VENV ?= .venv
# torch comes first and by itself: what depends on it (peft, accelerate ...) would otherwise choose another one, gigabytes large.
TORCH ?= torch==2.13.0
# What `make bench` writes; benchmarks/results keeps the runs that documents cite.
RESULTS ?= build/benchmarks

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.pyargs-installed
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/* csrc/*/* csrc/*/*/*)
BENCHMARKS := $(wildcard benchmarks/bench_*.py)

.PHONY: help setup demo reproduce artefacts kernels test fuzz docs bench sanitize sanitize-threads test-matrix cuda-check lint clean
help:
	@sed -n '1,3p' Makefile

setup: $(INSTALLED)

$(VENV)/.torch-installed:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	@touch $@

# Editable: Python files are used as they are; a change of the C++ or CUDA sources builds the extension again.
$(INSTALLED): $(VENV)/.torch-installed $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[all,dev,docs]"
	@touch $@

demo: $(INSTALLED)
	$(BIN)/pyargs demo

# The paper's evaluation on two cores, hours long; goes on where it was killed. PROFILE=gpu and PROFILE=paper want other machines.
PROFILE ?= cpu
reproduce: $(INSTALLED)
	$(BIN)/python -m experiments reproduce $(PROFILE)

# Heads, users and answers of the committed cells as folders for the hub, in build/artefacts. It trains nothing.
artefacts: $(INSTALLED)
	$(BIN)/python -m experiments artefacts

# The CPU's ops as the `kernels` library loads them, in build/kernels.
kernels: $(INSTALLED)
	$(BIN)/python setup.py -q kernels

# One thread per worker: two workers that each start a thread per core only wait for each other.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses=8 --durations=10

# Hostile input for everything that reads what others wrote: 50,000 inputs for each cheap entry point, 2,000 for each that loads a
# model, with the branches that they reach; hours long. ENTRIES="'keys of a service'" for some, INPUTS="500 50" for fewer.
INPUTS ?= 50000 2000
fuzz: $(INSTALLED)
	PYTHONPATH=.:tests OMP_NUM_THREADS=1 $(BIN)/python -m fuzz $(ENTRIES) --inputs $(INPUTS) --out build/fuzz.json

# The site, in build/docs: open build/docs/index.html. A warning is an error.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

bench: $(INSTALLED)
	@set -e; for file in $(BENCHMARKS); do \
	  echo "== $$file"; $(BIN)/python $$file --json $(RESULTS)/$$(basename $$file .py).json; \
	done

# Ops, CPU stack and C++ package under AddressSanitizer and UndefinedBehaviorSanitizer, in builds of their own. Python's own leaks do
# not count. `make cuda-check` has the CUDA kernels.
SANITIZED := build/sanitize
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -g
sanitize: $(INSTALLED)
	CXXFLAGS="$(SANITIZERS)" $(BIN)/pytest -m "nightly or not nightly" tests/integrations/test_cxx.py
	CXXFLAGS="$(SANITIZERS)" PYARGS_CUDA=OFF \
	  $(BIN)/python setup.py -q build --build-lib $(SANITIZED)/lib --build-temp $(SANITIZED)/temp
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	  OMP_NUM_THREADS=2 $(BIN)/pytest -o pythonpath="$(SANITIZED)/lib tests" -n auto --maxprocesses=8 \
	  -k "not emulated and not fake_device" tests/ops tests/lm/stack tests/lm/test_bits.py tests/decode/backends/test_cpu.py \
	  tests/decode/test_unguided.py tests/test_scoring.py tests/invariants/test_not_numbers.py tests/invariants/test_fewer_bits.py

# The C++ package and its threads under ThreadSanitizer, without Python: torch's threads tell it nothing of their order. MORE="" leaves
# out what is long. GCC's needs addresses that are not drawn from too wide a range, which `setarch -R` sees to where it may.
MORE := -m "nightly or not nightly"
sanitize-threads: $(INSTALLED)
	CXXFLAGS="-fsanitize=thread -g" $$(setarch -R true 2> /dev/null && echo setarch -R) \
	  $(BIN)/pytest -n 0 $(MORE) tests/integrations/test_cxx.py

# What is numeric, on every code path that this processor has, with the oldest and the newest transformers; the extension against the
# headers of every torch that is allowed.
test-matrix: $(INSTALLED)
	PYTHON=$(BIN)/python .ci/capabilities matrix
	$(BIN)/python .ci/torch_headers.py

# The CUDA kernels without a GPU: emulated under sanitizers, and what the compiler makes of them.
cuda-check: $(INSTALLED)
	$(BIN)/python .ci/emulate.py
	$(BIN)/python .ci/kernels.py
	$(BIN)/python .ci/executed.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror \
	  $(filter %.h %.cpp %.cu %.cuh,$(SOURCES) $(wildcard tests/ops/emulate/* tests/*/cxx/* examples/cxx/*))

# What these targets made in the tree. The user's cache (models, features) stays: `pyargs models` says where it is.
clean:
	rm -rf build dist *.egg-info pyargs/*.so .venv demo-output .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -prune -exec rm -rf {} +
