// qdrop and its backward on CUDA. Contract: zsq_ext/ops/reference/qdrop.py.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "qdrop.h"

namespace zsq {

// Where an element is kept, out gets x and rest gets x_hat; elsewhere out gets x_hat and rest gets x. The forward has
// no rest; in the backward x is the gradient, and x_hat is absent. Null means absent, and 0 where it is read.
struct CudaQDropArgs {
  const void* x;  // [n] of `size` bytes, as all others: nothing is computed
  const void* x_hat;
  void* out;
  void* rest;
  const int64_t* key;  // [2]: the key, and the offset
  QDropShape shape;
  int32_t threshold;
  int size;  // 2 or 4
};

// Launches nothing without elements.
cudaError_t cuda_qdrop(const CudaQDropArgs& args, cudaStream_t stream);

}  // namespace zsq
