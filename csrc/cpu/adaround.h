// adaround and its backward on the CPU. Contract: zsq_ext/ops/reference/adaround.py.
#pragma once

#include <vector>

#include "kernels/adaround_weight.h"
#include "kernels/dtype.h"

namespace zsq {

// "compute" is float, or double where v is double. Null means absent.
struct AdaRoundArgs {
  std::vector<AdaRoundWeight> weights;
  const void* beta;      // compute; without it there is no regulariser
  void* reg;             // compute: the regulariser's value, in the forward
  const void* grad_reg;  // compute: its upstream gradient, in the backward
  bool hard;             // the forward's rounding
  DType dtype;
};

// Forward where the weights have no grad. Sums are the same bits for any number of threads.
void adaround(const AdaRoundArgs& args, int threads);

}  // namespace zsq
