// bn_act, channel_sums and their backwards on the CPU. Contract: zsq_ext/ops/reference/bn_act.py.
#pragma once

#include <cstdint>

#include "kernels/bn_act.h"
#include "kernels/dtype.h"

namespace zsq {

// Dense tensors in memory order, as the shape says. "compute" is float, or double where u is double. Null means absent.
struct BnActArgs {
  const void* u;         // [n] in its dtype, as residual and y
  const void* residual;  // [n]
  void* y;               // [n]; without it only the sums are taken
  uint8_t* mask;         // one bit per element where a gradient passes; every row starts a byte
  void* s1;  // [groups][channels] compute, groups = samples where per_sample, else 1; as s2; both or neither
  void* s2;
  void* ends;  // [2][channels] compute: the smallest and the largest value that enters the quantizer; n > 0
  BnActNorm norm;
  BnActQuant quant;
  BnActShape shape;
  Act act;
  DType dtype;
};

void bn_act(const BnActArgs& args, int threads);

struct BnActBackwardArgs {
  const void* u;         // [n] in its dtype, as residual, grad, du and dr
  const void* residual;  // [n], where there is no mask to say what passes
  const uint8_t* mask;   // as the forward left it
  const void* grad;      // [n], of y
  const void* grad_s1;   // [groups][channels] compute, as grad_s2; both or neither
  const void* grad_s2;
  void* du;      // [n]
  void* dr;      // [n]
  void* dgamma;  // [channels] compute, as dbeta; both or neither
  void* dbeta;
  BnActNorm norm;
  BnActQuant quant;
  BnActShape shape;
  Act act;
  DType dtype;
};

void bn_act_backward(const BnActBackwardArgs& args, int threads);

}  // namespace zsq
