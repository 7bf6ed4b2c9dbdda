// The smallest and the largest value of a channel, and the grid between them, as zsq_ext/ops/reference defines them.
// Shared by the CPU and CUDA.
#pragma once

#include <cmath>

#include "fake_quant.h"

namespace zsq {

// Both ends are NaN once a NaN was seen. Empty, it is turned inside out.
template <class T>
struct Range {
  T lo, hi;
};

template <class T>
ZSQ_HD Range<T> empty_range() {
  return {T(INFINITY), T(-INFINITY)};
}

// No comparison with NaN holds: one that comes is let in by the second condition, and one that is there stays.
template <class T>
ZSQ_HD T smaller(T seen, T v) {
  return v < seen || v != v ? v : seen;
}

template <class T>
ZSQ_HD T larger(T seen, T v) {
  return v > seen || v != v ? v : seen;
}

template <class T>
ZSQ_HD Range<T> with(const Range<T>& seen, T v) {
  return {smaller(seen.lo, v), larger(seen.hi, v)};
}

template <class T>
ZSQ_HD Range<T> united(const Range<T>& a, const Range<T>& b) {
  return {smaller(a.lo, b.lo), larger(a.hi, b.hi)};
}

// For what adds up whatever it is given.
template <class T>
ZSQ_HD Range<T> operator+(const Range<T>& a, const Range<T>& b) {
  return united(a, b);
}

// Which zero is met first must not show: -0 + 0 is 0.
template <class T>
ZSQ_HD Range<T> reported(const Range<T>& r) {
  return {add(r.lo, T(0)), add(r.hi, T(0))};
}

// The signed grid of a min-max quantizer. A range narrower than 1e-8 counts as this wide; a scale below 2^-23 of the
// largest bound would make the zero-point inexact. Symmetric, the range is widened to [-m, m] and the zero-point is 0.
// NaN and infinity make the scale NaN or infinite, and every value of the channel NaN.
template <class T>
ZSQ_HD Grid<T> grid_of_range(Range<T> r, int bits, bool symmetric) {
  const T below = r.lo < T(0) ? -r.lo : r.lo, above = r.hi < T(0) ? -r.hi : r.hi;
  const T bound = below > above ? below : above;
  if (symmetric) r = {-bound, bound};
  const T width = sub(r.hi, r.lo), levels = T((1 << bits) - 1), qmin = T(-(1 << (bits - 1)));
  T scale = div(width < T(1e-8) ? T(1e-8) : width, levels);
  const T finest = mul(bound, T(1.0 / (1 << 23)));
  scale = scale < finest ? finest : scale;
  const T zero_point = symmetric ? T(0) : sub(qmin, round_half_even(div(r.lo, scale)));
  return {scale, zero_point == zero_point ? zero_point : T(0), qmin, add(qmin, levels)};
}

}  // namespace zsq
