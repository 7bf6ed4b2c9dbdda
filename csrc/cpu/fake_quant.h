// The fake_quant family on the CPU. Contract: zsq_ext/ops/reference/fake_quant.py and fake_quant_minmax.py.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/dtype.h"
#include "kernels/fake_quant_minmax.h"

namespace zsq {

// A dense tensor in memory order, seen as [outer, channels, inner]: element i belongs to channel
// (i / inner) % channels.
struct FakeQuantArgs {
  const void* grad;        // [n] in x's dtype; null in the forward
  const void* x;           // [n]
  void* out;               // [n]; may be x or grad; null where a gradient is not wanted
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
  void* dscale;  // [channels] of scale's type, as dzero_point; both null where they are not wanted
  void* dzero_point;
};

// LSQ's gradient: the straight-through gradient into out, and the two sums per channel. The sums are the same bits for
// any number of threads.
void fake_quant_lsq_backward(const FakeQuantLsqArgs& args, int threads);

struct FakeQuantManyArgs {
  std::vector<FakeQuantLsqArgs> tensors;
  bool backward;
  DType dtype;  // of all
};

// The forward of every tensor, or LSQ's gradient of every tensor: the bits of one after the other.
void fake_quant_many(const FakeQuantManyArgs& args, int threads);

struct CodesArgs {
  FakeQuantArgs fq;  // x holds values and out codes, or `back` the other way round; dtype is that of the values
  CodeType code;
  bool back;
};

// Values to codes, NaN to the code of 0; or codes to values.
void fake_quant_codes(const CodesArgs& args, int threads);

struct MinMaxArgs {
  const MinMaxTensor* tensors;  // [count]
  int64_t count;
  void* scale;          // [all channels] float, or double where the tensors are double
  int32_t* zero_point;  // [all channels]
  bool symmetric;
  DType dtype;
};

// Every channel quantized on the grid between its own extremes.
void fake_quant_minmax(const MinMaxArgs& args, int threads);

}  // namespace zsq
