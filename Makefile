VENV   ?= .venv
PYTHON ?= python3
BIN     = $(VENV)/bin
CONFIG  = tardis/pyproject.toml
INDEX   = doraemon/pyproject.toml
KERNELS = $(wildcard tardis/tardis_llm/runtime/cpu/*.cpp tardis/tardis_llm/runtime/cpu/*.h tardis/tardis_llm/runtime/cpu/*.inc)
# On Linux, PyPI's torch is the CUDA build, several gigabytes with what it needs. For the CPU build say
#   make venv TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# Threads that spin while they wait make small operations many times slower when another program wants the cores.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: venv demo test lint
venv: $(VENV)/.complete

# A change of the kernels' sources builds them anew; without a C++ compiler they are left out.
# torch comes first, and the constraint keeps whatever pip installs afterwards from replacing it.
$(VENV)/.complete: $(CONFIG) tardis/constraints.txt tardis/CMakeLists.txt $(KERNELS) $(INDEX) doraemon/doraemon/_native.c
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(BIN)/pip install -c tardis/constraints.txt -e 'tardis[dev]' -e 'doraemon[dev]'
	touch $@

demo: venv
	$(BIN)/tardis demo

test: venv
	$(BIN)/python -m pytest -q tardis/tests
	$(BIN)/python -m pytest -q -c $(INDEX) doraemon/tests doraemon/doraemon

lint: venv
	$(BIN)/ruff check --config $(CONFIG) --exclude benchmarks/doraemon tardis benchmarks
	$(BIN)/ruff format --check --config $(CONFIG) --exclude benchmarks/doraemon tardis benchmarks
	$(BIN)/mypy --config-file $(CONFIG) tardis/tardis_llm benchmarks/*.py benchmarks/training
	$(BIN)/ruff check --config $(INDEX) doraemon benchmarks/doraemon
	$(BIN)/ruff format --check --config $(INDEX) doraemon benchmarks/doraemon
	$(BIN)/mypy --config-file $(INDEX) doraemon/doraemon
