// What adaround is told of a weight, on the CPU and on CUDA. Contract: zsq_ext/ops/reference/adaround.py.
#pragma once

#include <cstdint>

namespace zsq {

// One weight of several: rows of `inner` elements in memory, a channel each. "compute" is float, or double for double
// v.
struct AdaRoundWeight {
  const void* grad;           // [channels, inner] in v's dtype; null in the forward
  const void* v;              // [channels, inner]
  const int16_t* base;        // [channels, inner]
  void* out;                  // [channels, inner] in v's dtype: w_hat, or v's gradient
  const void* scale;          // [channels] compute
  const int32_t* zero_point;  // [channels]
  void* dscale;               // [channels] compute; null where it is not wanted
  int64_t channels, inner;
  int64_t qmin, qmax;
};

}  // namespace zsq
