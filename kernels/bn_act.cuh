// bn_act, channel_sums and their backwards on CUDA. Contract: zsq_ext/ops/reference/bn_act.py.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "bn_act.h"
#include "dtype.h"

namespace zsq {

// Null means absent.
struct CudaBnActArgs {
  const void* u;         // [n] in its dtype, as residual and y
  const void* residual;  // [n]
  void* y;               // [n]; without it only the sums are taken
  uint8_t* mask;         // one bit per element where relu or relu6 passes a gradient; every row starts a byte
  const float* mean;     // [channels], as var, gamma and beta
  const float* var;
  const float* gamma;
  const float* beta;
  float* s1;  // [groups][channels], groups = samples where per_sample, else 1; as s2; both or neither
  float* s2;
  float eps;
  BnActShape shape;
  Act act;
  DType dtype;
  float* workspace;  // where sums are taken: partial ones, as many bytes as _workspace says
};

int64_t cuda_bn_act_workspace(const CudaBnActArgs& args);
cudaError_t cuda_bn_act(const CudaBnActArgs& args, cudaStream_t stream);

struct CudaBnActBackwardArgs {
  const void* u;         // [n] in its dtype, as grad, residual, du and dr
  const void* grad;      // [n], of y
  const void* residual;  // [n], where the activation is smooth
  const uint8_t* mask;   // as the forward left it
  const float* mean;     // [channels], as var, gamma and beta
  const float* var;
  const float* gamma;
  const float* beta;
  const float* grad_s1;  // [groups][channels], as grad_s2; both or neither
  const float* grad_s2;
  void* du;       // [n]
  void* dr;       // [n]
  float* dgamma;  // [channels], as dbeta; both or neither
  float* dbeta;
  float eps;
  BnActShape shape;
  Act act;
  DType dtype;
  float* workspace;  // where sums are taken: partial ones, as many bytes as _workspace says
};

int64_t cuda_bn_act_backward_workspace(const CudaBnActBackwardArgs& args);
cudaError_t cuda_bn_act_backward(const CudaBnActBackwardArgs& args, cudaStream_t stream);

}  // namespace zsq
