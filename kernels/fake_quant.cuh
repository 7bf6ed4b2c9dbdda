// fake_quant and its backward on CUDA. Contract: zsq_ext/ops/reference.py.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "dtype.h"

namespace zsq {

// A dense tensor in memory order, seen as [outer, channels, inner]: element i belongs to channel
// (i / inner) % channels.
struct CudaFakeQuantArgs {
  const void* grad;           // [n] in x's dtype; null in the forward
  const void* x;              // [n]
  void* out;                  // [n]
  const float* scale;         // [channels]
  const int32_t* zero_point;  // [channels]
  int64_t n, channels, inner;
  float qmin, qmax;
  DType dtype;
};

// The forward where grad is null, else the straight-through gradient. Launches nothing for n = 0.
cudaError_t cuda_fake_quant(const CudaFakeQuantArgs& args, cudaStream_t stream);

}  // namespace zsq
