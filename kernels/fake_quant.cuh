// fake_quant and its backwards on CUDA. Contract: zsq_ext/ops/reference.py.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "dtype.h"

namespace zsq {

// A dense tensor in memory order, seen as [outer, channels, inner]: element i belongs to channel
// (i / inner) % channels.
struct CudaFakeQuantArgs {
  const void* grad;        // [n] in x's dtype; null in the forward
  const void* x;           // [n]
  void* out;               // [n]
  const float* scale;      // [channels]
  const void* zero_point;  // [channels] int32, or float and rounded here
  bool learned;            // zero_point is float
  int64_t n, channels, inner;
  float qmin, qmax;
  DType dtype;
};

// The forward where grad is null, else the straight-through gradient. Launches nothing for n = 0.
cudaError_t cuda_fake_quant(const CudaFakeQuantArgs& args, cudaStream_t stream);

// LSQ's gradient: the straight-through gradient into out, and two sums per channel. Launches nothing for n = 0, and
// then writes nothing. workspace holds as many bytes as cuda_fake_quant_lsq_workspace says.
cudaError_t cuda_fake_quant_lsq_backward(const CudaFakeQuantArgs& args, float* dscale, float* dzero_point,
                                         void* workspace, cudaStream_t stream);

int64_t cuda_fake_quant_lsq_workspace(int64_t n, int64_t channels, int64_t inner, DType dtype);

}  // namespace zsq
