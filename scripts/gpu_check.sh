#!/usr/bin/env bash
# Everything that needs a GPU, in one command: build, tests, compute-sanitizer, benchmarks. Under 9 minutes.
#
#   scripts/gpu_check.sh            results as JSON and logs in $OUT (default gpu_out/)
#
# Uses the Python that is there (PYTHON, default python3), which must hold torch with CUDA, triton, pybind11, cmake,
# ninja, pytest and hypothesis; nothing is downloaded. A step that fails does not stop the next one; the exit status
# says whether all passed, and summary.json which did.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-gpu_out}
mkdir -p "$OUT"
summary="$OUT/summary.json"
status=0
steps=()

# step NAME SECONDS COMMAND...: runs it under a time limit, its output in $OUT/NAME.log
step() {
  local name=$1 limit=$2 begin=$SECONDS code
  shift 2
  echo "== $name"
  timeout "$limit" "$@" >"$OUT/$name.log" 2>&1
  code=$?
  tail -n 4 "$OUT/$name.log"
  echo "== $name: exit $code, $((SECONDS - begin)) s"
  steps+=("{\"step\": \"$name\", \"exit\": $code, \"seconds\": $((SECONDS - begin))}")
  [ "$code" = 0 ] || status=1
  printf '[%s]\n' "$(IFS=,; echo "${steps[*]}")" >"$summary"
  return "$code"
}

# Pytest by its module's main, not `python -m pytest`: that would put this folder on sys.path.
pytest=("$PYTHON" -c 'import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))' -q)
require=(env ZSQ_REQUIRE=cpu,cuda,triton)
export PYTHONPATH=${PYTHONPATH:-} PYTHONUNBUFFERED=1

step build 170 env ZSQ_CUDA=ON "$PYTHON" -m pip install --no-build-isolation --no-deps -e . || exit 1
step backends 60 "$PYTHON" -c '
import torch, zsq_ext
print(torch.cuda.get_device_name(), torch.__version__, zsq_ext.backends())
assert not any(zsq_ext.backends().values())'
# A room whose own needs are not installed here fails to import; the others still run, and the step is red.
step tests_gpu 120 "${require[@]}" "${pytest[@]}" --continue-on-collection-errors -m gpu tests/
step tests_ops 150 "${require[@]}" "${pytest[@]}" -m "not gpu and not slow" \
  --deselect tests/test_ops_triton_ptx.py tests/test_ops_*.py # which compiles much, and needs no GPU

# Memory errors, in a few cases that reach every kernel: the sanitizer slows them some fifty times. That it ran is
# asserted by its own closing line, not only by its exit status.
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
if [ -n "$sanitizer" ]; then
  # Without torch's cache every tensor is an allocation of its own, and a step past its end is seen.
  step sanitizer 100 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 ZSQ_REQUIRE=cuda "$sanitizer" --tool memcheck --error-exitcode 9 \
    "${pytest[@]}" tests/test_ops_*.py \
      -k "cuda and not nan and (reference_bits or reference_codes or one_by_one or (agrees_with and (pieces or tail or misaligned or corners or larger or classes or chunks)))"
  if ! grep -q "ERROR SUMMARY: 0 errors" "$OUT/sanitizer.log" || ! grep -q " passed" "$OUT/sanitizer.log"; then
    echo "compute-sanitizer did not run to its end, or found errors"
    status=1
  fi
else
  echo "compute-sanitizer is not here"
  status=1
fi

for suite in $("$PYTHON" -c 'from zsq_ext.bench import SUITES; print(*SUITES)'); do
  step "bench_$suite" 120 "$PYTHON" -m zsq_ext.bench --suite "$suite" --json "$OUT/bench_$suite.json"
done

echo "== all: exit $status, $SECONDS s"
exit "$status"
