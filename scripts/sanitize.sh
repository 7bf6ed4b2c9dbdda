#!/usr/bin/env bash
# The CPU backend's parity tests on a native module with AddressSanitizer and UndefinedBehaviorSanitizer.
#
#   scripts/sanitize.sh [pytest arguments]     needs an environment that runs the tests: .venv, or PYTHON
#
# The module is built in build/sanitize and takes the place of the installed one (tests/conftest.py).
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$PWD/.venv/bin/python}
build=build/sanitize
PATH=$(dirname "$PYTHON"):$PATH

cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DZSQ_CUDA=OFF -DZSQ_SANITIZE=ON \
  -DPython_EXECUTABLE="$PYTHON" -Dpybind11_DIR="$("$PYTHON" -m pybind11 --cmakedir)" \
  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/$build" >/dev/null
cmake --build "$build" >/dev/null

# Python itself is not instrumented, so the sanitizer's runtime has to be there first. Its leak check would report
# the interpreter, and torch's deliberate ones.
export LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
export ZSQ_REQUIRE=cpu
export ZSQ_NATIVE_MODULE=$(ls "$PWD/$build"/_C*.so)
# SIMD and scalar paths, threads and poisoned memory are all in here; what compiles or needs a process of its own is not
exec "$PYTHON" -c 'import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))' -q -p no:cacheprovider -n auto \
  --dist loadfile tests/test_ops_*.py \
  -k "not triton and not cuda and (reference_bits or agrees_with or scalar or of_threads or nor_threads or misaligned)" "$@"
