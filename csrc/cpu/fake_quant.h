// fake_quant and its backward on the CPU. Contract: zsq_ext/ops/reference.py.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace zsq {

// A dense tensor in memory order, seen as [outer, channels, inner]: element i belongs to channel
// (i / inner) % channels.
struct FakeQuantArgs {
  const void* grad;           // [n] in x's dtype; null in the forward
  const void* x;              // [n]
  void* out;                  // [n]; may be x or grad
  const void* scale;          // [channels] float, or double where x is double
  const int32_t* zero_point;  // [channels]
  int64_t n, channels, inner;
  int64_t qmin, qmax;
  DType dtype;
  int threads;
};

// The forward where grad is null, else the straight-through gradient: grad inside the range, 0 outside.
void fake_quant(const FakeQuantArgs& args);

}  // namespace zsq
