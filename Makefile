# Each target creates its environment if it is missing, and updates it when the lock file changes.
PYTHON ?= python3.11
VENV ?= .venv
# The pinned environment: requirements/gpu.lock on a machine with NVIDIA GPUs.
LOCK ?= requirements/cpu.lock
# Extra arguments for pip, e.g. the index that serves PyTorch's CPU wheels: PIP_ARGS="--extra-index-url ..."
PIP_ARGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TRL_VENV ?= .venv-trl
TRL_STAMP := $(TRL_VENV)/.installed
DOCS_VENV ?= .venv-docs
DOCS_STAMP := $(DOCS_VENV)/.installed
export HF_HUB_OFFLINE := 1
# Tests start hundreds of processes; without cached bytecode each of them would compile align's modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test test-fast test-families check compat bench bench-trl docs clean lock smoke image

quickstart: $(STAMP)
	$(BIN)/align run quickstart --resume

# Expected against measured on this machine: fifteen minutes on a GPU, under three on two cores.
smoke: $(STAMP)
	$(BIN)/align smoke

image:
	docker build --tag align .

# Compares align with the CUDA builds of vLLM, which it downloads into build/: `make compat VLLM=0.34.0` for a new one.
VLLM ?=

compat: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.compat $(VLLM)

# pytest-xdist workers, one thread each; small models gain nothing from more threads.
JOBS ?= 2

# tests/conftest.py orders the files, the longest ones first; xdist's own order would start files with few tests last.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# Without vLLM engines and several ranks, for the inner loop.
test-fast: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow and not distributed and not engine"

# All families of docs/families.md against transformers, each in its own process; `rm build/families.json` to start again.
test-families: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.families

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# bench_ppo.py needs a second environment and two hours: `make bench-trl`.
bench: $(STAMP)
	@for script in $(filter-out benchmarks/bench_ppo.py,$(wildcard benchmarks/bench_*.py)); do \
	    echo "$$script"; $(BIN)/python "$$script" || exit 1; done

bench-trl: $(STAMP) $(TRL_STAMP)
	$(BIN)/python benchmarks/bench_ppo.py --trl $(TRL_VENV)/bin/python
	$(BIN)/python benchmarks/bench_ppo.py --trl $(TRL_VENV)/bin/python --curves

# The documentation as a site, in build/site. Its environment is small and has no torch.
docs: $(DOCS_STAMP)
	$(DOCS_VENV)/bin/python docs/make_site.py

$(STAMP): $(LOCK) pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps $(PIP_ARGS) -r $(LOCK)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

$(TRL_STAMP): requirements/bench-trl.lock
	test -x $(TRL_VENV)/bin/python || $(PYTHON) -m venv $(TRL_VENV)
	$(TRL_VENV)/bin/python -m pip install --quiet --no-deps $(PIP_ARGS) -r requirements/bench-trl.lock
	touch $@

$(DOCS_STAMP): requirements/docs.lock
	test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --no-deps $(PIP_ARGS) -r requirements/docs.lock
	touch $@

lock:
	$(PYTHON) requirements/make_lock.py

clean:
	rm -rf $(VENV) $(TRL_VENV) $(DOCS_VENV) .pytest_cache .ruff_cache .mypy_cache build dist
