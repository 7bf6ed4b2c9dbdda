// How what is gathered per channel is cut over threads: into parts, whose results a second stage unites. The cut
// depends on sizes and dtype alone.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace zsq {

constexpr int kThreads = 256;
// Packs of a thread, unless there would be more parts than kParts.
constexpr int kSteps = 8;
// What one block of the second stage sums in 4 additions per thread.
constexpr int64_t kParts = 1024;
// Rows this short are taken by 8 neighbouring threads: 8 packs are 128 bytes, a whole cache line.
constexpr int64_t kShortRow = 1024;
constexpr int kShortGroup = 8;

// How memory is cut. A part is what one group of threads, or one block, sums for a channel.
struct Plan {
  bool columns;    // channels last: a block takes some channels of many rows; else a group takes a stretch of a row
  bool wide;       // whole packs; else element by element, where a pack would cross rows
  int64_t rows;    // [rows, inner], or [rows, channels] for columns
  int64_t chunk;   // elements of a row, or rows, that make a part
  int64_t chunks;  // parts of a row, or of all rows
  int64_t parts;   // per channel
  int width;       // columns: threads side by side
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The smallest multiple of step * kSteps that cuts n into no more than kParts chunks.
inline int64_t chunk_of(int64_t n, int64_t step) {
  return ceil_div(ceil_div(n, kParts), step * kSteps) * step * kSteps;
}

inline Plan plan_of(int64_t n, int64_t channels, int64_t inner, DType dtype) {
  const int pack = dtype == DType::f32 ? 4 : 8;
  Plan p{};
  p.columns = inner == 1 && channels > 1;
  if (p.columns) {
    p.wide = channels % pack == 0;
    const int64_t lanes = channels / (p.wide ? pack : 1);
    for (p.width = 1; p.width < 32 && p.width < lanes; p.width *= 2) {
    }
    p.rows = n / channels;
    p.chunk = chunk_of(p.rows, kThreads / p.width);
    p.chunks = p.parts = ceil_div(p.rows, p.chunk);
  } else {
    p.rows = n / inner;
    p.wide = p.rows == 1 || inner % pack == 0;
    p.chunk = inner < kShortRow ? inner : chunk_of(inner, int64_t{kThreads} * (p.wide ? pack : 1));
    p.chunks = ceil_div(inner, p.chunk);
    p.parts = p.rows / channels * p.chunks;
  }
  return p;
}

// The sum, by operator+, of the values of threads t, t + stride, t + 2 * stride, ..., in thread t < stride.
template <class V>
__device__ V across_block(V sum, int stride) {
  __shared__ V shared[kThreads];
  const int t = threadIdx.x;
  shared[t] = sum;
  __syncthreads();
  for (int half = kThreads / 2; half >= stride; half /= 2) {
    if (t < half) shared[t] = shared[t] + shared[t + half];
    __syncthreads();
  }
  sum = shared[t];
  __syncthreads();
  return sum;
}

}  // namespace zsq
