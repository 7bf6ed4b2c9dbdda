// fake_quant and its backwards on the CPU. Contract: zsq_ext/ops/reference/fake_quant.py.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace zsq {

// A dense tensor in memory order, seen as [outer, channels, inner]: element i belongs to channel
// (i / inner) % channels.
struct FakeQuantArgs {
  const void* grad;        // [n] in x's dtype; null in the forward
  const void* x;           // [n]
  void* out;               // [n]; may be x or grad
  const void* scale;       // [channels] float, or double where x is double
  const void* zero_point;  // [channels] int32, or of scale's type and rounded here
  bool learned;            // zero_point is of scale's type
  int64_t n, channels, inner;
  int64_t qmin, qmax;
  DType dtype;
};

// The forward where grad is null, else the straight-through gradient: grad inside the range, 0 outside.
void fake_quant(const FakeQuantArgs& args, int threads);

struct FakeQuantLsqArgs {
  FakeQuantArgs fq;
  void* dscale;  // [channels] of scale's type, as dzero_point
  void* dzero_point;
};

// LSQ's gradient: the straight-through gradient into out, and the two sums per channel. The sums are the same bits for
// any number of threads. Writes nothing for n = 0.
void fake_quant_lsq_backward(const FakeQuantLsqArgs& args, int threads);

}  // namespace zsq
