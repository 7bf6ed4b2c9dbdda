// channel_range on the CPU. Contract: zsq_ext/ops/reference/channel_range.py.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace zsq {

// A dense tensor in memory order, seen as [outer, channels, inner], with n > 0.
struct ChannelRangeArgs {
  const void* x;  // [n]
  void* lo;       // [channels] float, or double where x is double; as hi
  void* hi;
  int64_t n, channels, inner;
  DType dtype;
};

void channel_range(const ChannelRangeArgs& args, int threads);

}  // namespace zsq
