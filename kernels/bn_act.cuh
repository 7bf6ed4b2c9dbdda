// bn_act, channel_sums and their backwards on CUDA. Contract: zsq_ext/ops/reference.py.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "bn_act.h"
#include "dtype.h"

namespace zsq {

// Dense tensors in memory order: [samples, places, channels] where the channels are last, else
// [samples, channels, places]. Sums are per sample and channel where per_sample, else per channel.
struct CudaBnActShape {
  int64_t samples, channels, places;
  bool last, per_sample;
};

// How many partial sums a channel leaves behind: [2][chunks][channels] floats of memory are needed where sums are
// taken.
int64_t cuda_bn_act_chunks(const CudaBnActShape& shape);

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
  float* partials;  // where sums are taken
  float eps;
  CudaBnActShape shape;
  Act act;
  DType dtype;
};

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
  float* partials;  // where these are taken
  float eps;
  CudaBnActShape shape;
  Act act;
  DType dtype;
};

cudaError_t cuda_bn_act_backward(const CudaBnActBackwardArgs& args, cudaStream_t stream);

}  // namespace zsq
