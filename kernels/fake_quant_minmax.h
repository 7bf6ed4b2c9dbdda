// What fake_quant_minmax is told about a tensor, on the CPU and on CUDA.
#pragma once

#include <cstdint>

namespace zsq {

// A tensor whose channels follow one another in memory.
struct MinMaxTensor {
  const void* x;             // [channels, length]
  void* out;                 // as x; may be x
  int64_t channels, length;  // both > 0
  int64_t bits;
};

}  // namespace zsq
