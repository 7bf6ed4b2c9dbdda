// Passes over the elements of a dense tensor, each of which meets the grid of its channel.
//
// What is done with an element is an operation: a struct of pointers with
//     one(i, q)        element i, in scalar code
//     eight(i, q8)     elements i to i + 7, marked ZSQ_AVX2; only where float computes
#pragma once

#include <algorithm>
#include <type_traits>

#include "csrc/cpu/grid.h"
#include "csrc/cpu/parallel.h"

namespace zsq {

// 64 Ki elements take one core 10 to 30 us, several times what it costs to wake another.
constexpr int64_t kGrain = 1 << 16;

#ifdef ZSQ_HAS_AVX2

template <class Op>
ZSQ_AVX2 void row_avx2(const Op& op, int64_t i, int64_t end, const Grid<float>& q) {
  const Grid8 q8 = grid8_of(q);
  for (; i + 8 <= end; i += 8) op.eight(i, q8);
  for (; i < end; ++i) op.one(i, q);
}

template <class Op>
ZSQ_AVX2 void columns_avx2(const Op& op, int64_t i, int64_t end, const FakeQuantArgs& a, int64_t c) {
  for (; i + 8 <= end; i += 8, c += 8) op.eight(i, grid8_of(a, c));
  for (; i < end; ++i, ++c) op.one(i, grid_of<float>(a, c));
}

#endif

// Elements i to end share a grid.
template <class C, class Op>
void row(const Op& op, int64_t i, int64_t end, const Grid<C>& q, bool simd) {
#ifdef ZSQ_HAS_AVX2
  if constexpr (std::is_same_v<C, float>) {
    if (simd) return row_avx2(op, i, end, q);
  }
#endif
  (void)simd;
  for (; i < end; ++i) op.one(i, q);
}

// Channels last: elements i to end belong to channels c, c + 1, ... and end with the last channel or before it.
template <class C, class Op>
void columns(const Op& op, int64_t i, int64_t end, const FakeQuantArgs& a, int64_t c, bool simd) {
#ifdef ZSQ_HAS_AVX2
  if constexpr (std::is_same_v<C, float>) {
    if (simd) return columns_avx2(op, i, end, a, c);
  }
#endif
  (void)simd;
  for (; i < end; ++i, ++c) op.one(i, grid_of<C>(a, c));
}

// Elements i to end of a tensor.
template <class C, class Op>
void stretch(const Op& op, const FakeQuantArgs& a, int64_t i, int64_t end, bool simd) {
  const bool last = a.inner == 1 && a.channels > 1;
  const int64_t length = last ? a.channels : a.channels == 1 ? a.n : a.inner;
  while (i < end) {
    const int64_t stop = std::min(end, (i / length + 1) * length);
    if (last) {
      columns<C>(op, i, stop, a, i % a.channels, simd);
    } else {
      row(op, i, stop, grid_of<C>(a, i / length % a.channels), simd);
    }
    i = stop;
  }
}

template <class C, class Op>
void for_each_element(const Op& op, const FakeQuantArgs& a, int threads) {
  const bool simd = simd_enabled();
  parallel_for(a.n, kGrain, threads, [&](int64_t i, int64_t end) { stretch<C>(op, a, i, end, simd); });
}

}  // namespace zsq
