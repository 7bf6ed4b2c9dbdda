// adaround and its backward on CUDA. Contract: zsq_ext/ops/reference/adaround.py.
#pragma once

#include <cuda_runtime.h>

#include <vector>

#include "adaround_weight.h"
#include "dtype.h"

namespace zsq {

// Null means absent.
struct CudaAdaRoundArgs {
  std::vector<AdaRoundWeight> weights;
  const float* beta;      // without it there is no regulariser
  float* reg;             // the regulariser's value, in the forward
  const float* grad_reg;  // its upstream gradient, in the backward
  bool hard;              // the forward's rounding
  DType dtype;
  double* workspace;  // where sums are taken: partial ones, as many bytes as _workspace says
};

// Forward where the weights have no grad. A launch for every 32 weights, and one more where sums are taken.
cudaError_t cuda_adaround(const CudaAdaRoundArgs& args, cudaStream_t stream);
int64_t cuda_adaround_workspace(const CudaAdaRoundArgs& args);

}  // namespace zsq
