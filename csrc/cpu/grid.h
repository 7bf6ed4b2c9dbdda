// Where the CPU's loops of the fake_quant family get their numbers: the grid of one channel, or of eight neighbours.
#pragma once

#include "csrc/cpu/fake_quant.h"
#include "csrc/cpu/simd.h"
#include "kernels/fake_quant.h"

namespace zsq {

template <class C>
inline Grid<C> grid_of(const FakeQuantArgs& a, int64_t c) {
  const C zero_point = a.learned ? round_half_even(static_cast<const C*>(a.zero_point)[c])
                                 : static_cast<C>(static_cast<const int32_t*>(a.zero_point)[c]);
  return {static_cast<const C*>(a.scale)[c], zero_point, static_cast<C>(a.qmin), static_cast<C>(a.qmax)};
}

#ifdef ZSQ_HAS_AVX2

struct Grid8 {
  __m256 scale, zero_point, qmin, qmax;
};

ZSQ_AVX2 inline __m256 round_half_even8(__m256 v) {
  return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// NaN fails both comparisons and is not inside.
ZSQ_AVX2 inline __m256 inside8(__m256 unrounded_code, const Grid8& q) {
  return _mm256_and_ps(_mm256_cmp_ps(unrounded_code, q.qmin, _CMP_GE_OQ),
                       _mm256_cmp_ps(unrounded_code, q.qmax, _CMP_LE_OQ));
}

ZSQ_AVX2 inline __m256 code8(__m256 ratio, const Grid8& q) {
  const __m256 code = _mm256_add_ps(round_half_even8(ratio), q.zero_point);
  // max and min give their second operand where one is NaN: code goes second, so NaN stays NaN.
  return _mm256_min_ps(q.qmax, _mm256_max_ps(q.qmin, code));
}

ZSQ_AVX2 inline Grid8 grid8_of(const Grid<float>& q) {
  return {_mm256_set1_ps(q.scale), _mm256_set1_ps(q.zero_point), _mm256_set1_ps(q.qmin), _mm256_set1_ps(q.qmax)};
}

// Channels c to c + 7.
ZSQ_AVX2 inline Grid8 grid8_of(const FakeQuantArgs& a, int64_t c) {
  const __m256i raw =
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const int32_t*>(a.zero_point) + c));
  const __m256 zero_point = a.learned ? round_half_even8(_mm256_castsi256_ps(raw)) : _mm256_cvtepi32_ps(raw);
  return {_mm256_loadu_ps(static_cast<const float*>(a.scale) + c), zero_point,
          _mm256_set1_ps(static_cast<float>(a.qmin)), _mm256_set1_ps(static_cast<float>(a.qmax))};
}

#endif

}  // namespace zsq
