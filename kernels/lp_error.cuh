// lp_error on CUDA. Contract: zsq_ext/ops/reference/lp_error.py.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "dtype.h"

namespace zsq {

// Channels that follow one another in memory, each beside several grids.
struct CudaLpErrorArgs {
  const void* x;              // [channels, length]
  const float* scale;         // [channels, candidates]
  const int32_t* zero_point;  // [channels, candidates]
  double* error;              // [channels, candidates]
  int64_t channels, length, candidates;
  float qmin, qmax;
  double p;
  DType dtype;
  double* workspace;  // as many bytes as _workspace says
};

cudaError_t cuda_lp_error(const CudaLpErrorArgs& args, cudaStream_t stream);
int64_t cuda_lp_error_workspace(const CudaLpErrorArgs& args);

}  // namespace zsq
