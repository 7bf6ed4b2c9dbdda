// Which elements qdrop keeps, as zsq_ext/ops/reference/qdrop.py defines it. Shared by the CPU and CUDA.
#pragma once

#include "philox.h"

namespace zsq {

// Dense tensors in memory order: [samples, places, channels] where the channels are last, else of any order that is
// also the logical one, [samples, channels, places]. An element's draw belongs to its logical index, whatever the
// memory's.
struct QDropShape {
  int64_t samples, channels, places;
  bool last;
};

struct QDropKey {
  uint64_t key, offset;
};

// The draws of elements 4 * block to 4 * block + 3.
ZSQ_HD Words draws(uint64_t block, const QDropKey& key) { return philox(block, key.offset, key.key); }

// 24 bits of the draw, against the probability times 2^24.
ZSQ_HD bool keeps(uint32_t word, int32_t threshold) { return static_cast<int32_t>(word >> 8) < threshold; }

}  // namespace zsq
