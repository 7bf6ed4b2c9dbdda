// The extremes of a stretch of elements on the CPU.
#pragma once

#include <cmath>
#include <type_traits>

#include "csrc/cpu/simd.h"
#include "kernels/channel_range.h"

namespace zsq {

#ifdef ZSQ_HAS_AVX2

// min and max give their second operand where one is NaN: a NaN that is there stays, and one that comes is blended in.
ZSQ_AVX2 inline void take8(__m256 v, __m256& lo, __m256& hi) {
  const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
  lo = _mm256_blendv_ps(_mm256_min_ps(v, lo), v, nan);
  hi = _mm256_blendv_ps(_mm256_max_ps(v, hi), v, nan);
}

// The ends of eight lanes, of numbers alone: a comparison with NaN keeps what was there, and `nan` says where it came.
struct Ends8 {
  __m256 lo, hi, nan;
};

ZSQ_AVX2 inline Ends8 no_ends8() { return {_mm256_set1_ps(INFINITY), _mm256_set1_ps(-INFINITY), _mm256_setzero_ps()}; }

ZSQ_AVX2 inline void take8(__m256 v, Ends8& ends) {
  ends.lo = _mm256_min_ps(v, ends.lo);
  ends.hi = _mm256_max_ps(v, ends.hi);
  ends.nan = _mm256_or_ps(ends.nan, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
}

// With all bits set, as `nan` has them, an end is NaN.
ZSQ_AVX2 inline void put_ends8(const Ends8& ends, float* lo, float* hi) {
  _mm256_storeu_ps(lo, _mm256_or_ps(ends.lo, ends.nan));
  _mm256_storeu_ps(hi, _mm256_or_ps(ends.hi, ends.nan));
}

ZSQ_AVX2 inline Ends8 ends8_at(const float* lo, const float* hi) {
  const __m256 lo8 = _mm256_loadu_ps(lo);
  return {lo8, _mm256_loadu_ps(hi), _mm256_cmp_ps(lo8, lo8, _CMP_UNORD_Q)};
}

// `range` widened to two times eight lanes.
ZSQ_AVX2 inline Range<float> across8(const Ends8& a, const Ends8& b, Range<float> range) {
  if (_mm256_movemask_ps(_mm256_or_ps(a.nan, b.nan))) return {NAN, NAN};
  const __m256 lo8 = _mm256_min_ps(a.lo, b.lo), hi8 = _mm256_max_ps(a.hi, b.hi);
  __m128 lo = _mm_min_ps(_mm256_castps256_ps128(lo8), _mm256_extractf128_ps(lo8, 1));
  __m128 hi = _mm_max_ps(_mm256_castps256_ps128(hi8), _mm256_extractf128_ps(hi8, 1));
  lo = _mm_min_ps(lo, _mm_movehl_ps(lo, lo)), hi = _mm_max_ps(hi, _mm_movehl_ps(hi, hi));
  lo = _mm_min_ss(lo, _mm_movehdup_ps(lo)), hi = _mm_max_ss(hi, _mm_movehdup_ps(hi));
  return united(range, {_mm_cvtss_f32(lo), _mm_cvtss_f32(hi)});
}

template <class T>
ZSQ_AVX2 Range<float> range_avx2(const T* x, int64_t n, Range<float> range) {
  // Two chains of comparisons, and NaN noted on the side: a chain alone would wait for itself.
  __m256 lo[2], hi[2], nan = _mm256_setzero_ps();
  for (int k = 0; k < 2; ++k) lo[k] = _mm256_set1_ps(range.lo), hi[k] = _mm256_set1_ps(range.hi);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m256 a = load8(x + i), b = load8(x + i + 8);
    lo[0] = _mm256_min_ps(lo[0], a), hi[0] = _mm256_max_ps(hi[0], a);
    lo[1] = _mm256_min_ps(lo[1], b), hi[1] = _mm256_max_ps(hi[1], b);
    nan = _mm256_or_ps(nan, _mm256_cmp_ps(a, b, _CMP_UNORD_Q));
  }
  range = across8({lo[0], hi[0], nan}, {lo[1], hi[1], nan}, range);
  for (; i < n; ++i) range = with(range, widen(x[i]));
  return range;
}

template <class T>
ZSQ_AVX2 void ranges_avx2(const T* x, int64_t n, float* lo, float* hi) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    __m256 lo8 = _mm256_loadu_ps(lo + i), hi8 = _mm256_loadu_ps(hi + i);
    take8(load8(x + i), lo8, hi8);
    _mm256_storeu_ps(lo + i, lo8);
    _mm256_storeu_ps(hi + i, hi8);
  }
  for (; i < n; ++i) lo[i] = smaller(lo[i], widen(x[i])), hi[i] = larger(hi[i], widen(x[i]));
}

#endif

// `range` widened to n elements.
template <class T, class C>
Range<C> range_of(const T* x, int64_t n, Range<C> range, bool simd) {
#ifdef ZSQ_HAS_AVX2
  if constexpr (std::is_same_v<C, float>) {
    if (simd) return range_avx2(x, n, range);
  }
#endif
  (void)simd;
  for (int64_t i = 0; i < n; ++i) range = with(range, static_cast<C>(widen(x[i])));
  return range;
}

// n neighbours, each of which widens a range of its own.
template <class T, class C>
void ranges_of(const T* x, int64_t n, C* lo, C* hi, bool simd) {
#ifdef ZSQ_HAS_AVX2
  if constexpr (std::is_same_v<C, float>) {
    if (simd) return ranges_avx2(x, n, lo, hi);
  }
#endif
  (void)simd;
  for (int64_t i = 0; i < n; ++i) {
    const C v = widen(x[i]);
    lo[i] = smaller(lo[i], v), hi[i] = larger(hi[i], v);
  }
}

}  // namespace zsq
