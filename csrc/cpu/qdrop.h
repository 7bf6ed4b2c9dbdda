// qdrop and its backward on the CPU. Contract: zsq_ext/ops/reference/qdrop.py.
#pragma once

#include <cstdint>

#include "kernels/qdrop.h"

namespace zsq {

// Where an element is kept, out gets x and rest gets x_hat; elsewhere out gets x_hat and rest gets x. The forward has
// no rest; in the backward x is the gradient, and x_hat is absent. Null means absent, and 0 where it is read.
struct QDropArgs {
  const void* x;  // [n] of `size` bytes, as all others: nothing is computed
  const void* x_hat;
  void* out;
  void* rest;
  const int64_t* key;  // [2]: the key, and the offset
  QDropShape shape;
  int32_t threshold;
  int size;  // 2, 4 or 8
};

void qdrop(const QDropArgs& args, int threads);

}  // namespace zsq
