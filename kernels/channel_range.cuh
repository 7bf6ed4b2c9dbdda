// channel_range on CUDA. Contract: zsq_ext/ops/reference/channel_range.py.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "dtype.h"

namespace zsq {

// A dense tensor in memory order, seen as [outer, channels, inner], with n > 0.
struct CudaChannelRangeArgs {
  const void* x;  // [n]
  float* lo;      // [channels], as hi
  float* hi;
  int64_t n, channels, inner;
  DType dtype;
  void* workspace;  // as many bytes as _workspace says
};

cudaError_t cuda_channel_range(const CudaChannelRangeArgs& args, cudaStream_t stream);
int64_t cuda_channel_range_workspace(const CudaChannelRangeArgs& args);

}  // namespace zsq
