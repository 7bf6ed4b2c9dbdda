// bn_act, channel_sums and their backwards on CUDA. Contract: zsq_ext/ops/reference/bn_act.py.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "bn_act.h"
#include "dtype.h"

namespace zsq {

// Null means absent. What the norm and the quantizer point to is float.
struct CudaBnActArgs {
  const void* u;         // [n] in its dtype, as residual and y
  const void* residual;  // [n]
  void* y;               // [n]; without it only the sums are taken
  uint8_t* mask;         // one bit per element where a gradient passes; every row starts a byte
  float* s1;             // [groups][channels], groups = samples where per_sample, else 1; as s2; both or neither
  float* s2;
  float* ends;  // [2][channels]: the smallest and the largest value that enters the quantizer; n > 0
  BnActNorm norm;
  BnActQuant quant;
  BnActShape shape;
  Act act;
  DType dtype;
  float* workspace;  // where sums or ends are taken: partial ones, as many bytes as _workspace says
};

int64_t cuda_bn_act_workspace(const CudaBnActArgs& args);
cudaError_t cuda_bn_act(const CudaBnActArgs& args, cudaStream_t stream);

struct CudaBnActBackwardArgs {
  const void* u;         // [n] in its dtype, as residual, grad, du and dr
  const void* residual;  // [n], where there is no mask to say what passes
  const uint8_t* mask;   // as the forward left it
  const void* grad;      // [n], of y
  const float* grad_s1;  // [groups][channels], as grad_s2; both or neither
  const float* grad_s2;
  void* du;       // [n]
  void* dr;       // [n]
  float* dgamma;  // [channels], as dbeta; both or neither
  float* dbeta;
  BnActNorm norm;
  BnActQuant quant;
  BnActShape shape;
  Act act;
  DType dtype;
  float* workspace;  // where sums are taken: partial ones, as many bytes as _workspace says
};

int64_t cuda_bn_act_backward_workspace(const CudaBnActBackwardArgs& args);
cudaError_t cuda_bn_act_backward(const CudaBnActBackwardArgs& args, cudaStream_t stream);

}  // namespace zsq
