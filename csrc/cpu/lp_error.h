// lp_error on the CPU. Contract: zsq_ext/ops/reference/lp_error.py.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace zsq {

// Channels that follow one another in memory, each beside several grids. "compute" is float, or double for double x.
struct LpErrorArgs {
  const void* x;              // [channels, length]
  const void* scale;          // [channels, candidates] compute
  const int32_t* zero_point;  // [channels, candidates]
  double* error;              // [channels, candidates]
  int64_t channels, length, candidates;
  int64_t qmin, qmax;
  double p;
  DType dtype;
};

// The sum of |x - x_hat|^p over each channel, for each grid. The same bits for any number of threads.
void lp_error(const LpErrorArgs& args, int threads);

}  // namespace zsq
