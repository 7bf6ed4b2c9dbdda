#!/usr/bin/env bash
# Compiles the CUDA code for every architecture the kernels are written for. A warning is an error, and so is a spill.
# Then what tests/test_ops_cuda_build.py reads off machine code is read off each architecture's: exact divisions,
# 16-byte accesses, no atomics. `pytest -m slow tests/test_cuda_archs.py` runs it.
#
#   scripts/cuda_archs.sh     needs nvcc and an environment that builds the package: .venv, or PYTHON; no GPU
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$PWD/.venv/bin/python}
ARCHS=${ARCHS:-80-real;86-real;89-real;90a-real;100-real}
build=build/archs
PATH=$(dirname "$PYTHON"):$PATH

cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DZSQ_CUDA=ON -DZSQ_CUDA_ARCHS="$ARCHS" \
  -DCMAKE_CUDA_FLAGS="-Werror all-warnings -Xptxas --warn-on-spills,--warning-as-error" \
  -DPython_EXECUTABLE="$PYTHON" -Dpybind11_DIR="$("$PYTHON" -m pybind11 --cmakedir)" \
  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/$build" >/dev/null
cmake --build "$build"
echo "compiled for $ARCHS without a warning or a spill"

# Not `python -m pytest`: that would put this folder on sys.path.
export ZSQ_NATIVE_MODULE=$(ls "$PWD/$build"/_C*.so)
exec "$PYTHON" -c 'import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))' -q tests/test_ops_cuda_build.py
