# Every target makes what it needs: a fresh clone needs only Python 3.11 or newer and a C++ compiler.
#   make demo   a data-free quantization, start to finish     make test   the test suite
#   make lint   style and types                               make bench  the ops beside their peers
#   make wheel  dist/*.whl                                    make gpu-check  everything that needs a GPU

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
NATIVE := CMakeLists.txt setup.py $(wildcard csrc/*.* csrc/*/*.* kernels/*.cu kernels/*.cuh kernels/*.h)

# Where no GPU is visible the demo does not wait for the CUDA compiler; every other target does.
QUICK_CUDA := $(if $(ZSQ_CUDA),$(ZSQ_CUDA),$(if $(shell nvidia-smi -L 2>/dev/null),AUTO,OFF))

.PHONY: demo test lint bench wheel gpu-check clean

demo: $(VENV)/.quick
	$(BIN)/zsq demo

test: $(VENV)/.native
	$(BIN)/pytest -n auto --dist loadfile

lint: $(VENV)/.native
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(filter %.cpp %.h %.cu %.cuh,$(NATIVE))
	$(BIN)/mypy

bench: $(VENV)/.native
	$(BIN)/zsq bench --suite families --json runs/bench/families.json

wheel: $(VENV)/.native
	$(PIP) wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

gpu-check:
	scripts/gpu_check.sh

clean:
	rm -rf build dist *.egg-info zsq_ext/_C*.so $(VENV)/.native $(VENV)/.quick

# The environment. torch comes first and alone, so that nothing after it has a say in its version.
$(VENV)/.packages: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt setuptools wheel pybind11 cmake ninja torch numpy
	ZSQ_CUDA=$(QUICK_CUDA) $(PIP) install --quiet --no-build-isolation -c constraints.txt -e .
	touch $@ $(VENV)/.quick

# The native module, by an incremental build, and what testing and linting need; .quick is for those who only run it.
$(VENV)/.native: $(VENV)/.packages $(NATIVE)
	$(PIP) install --quiet --no-build-isolation -c constraints.txt -e ".[test,lint]"
	touch $@ $(VENV)/.quick

$(VENV)/.quick: $(VENV)/.packages $(NATIVE)
	ZSQ_CUDA=$(QUICK_CUDA) $(PIP) install --quiet --no-build-isolation --no-deps -e .
	touch $@
