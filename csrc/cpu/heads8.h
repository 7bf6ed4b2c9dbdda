// The functions of kernels/heads.h, for eight classes at a time.
#pragma once

#include "csrc/cpu/exp8.h"
#include "csrc/cpu/simd.h"
#include "kernels/heads.h"

#ifdef ZSQ_HAS_AVX2

namespace zsq {

ZSQ_AVX2 inline __m256 all8(float v) { return _mm256_set1_ps(v); }

ZSQ_AVX2 inline float sum8(__m256 v) {
  alignas(32) float lane[8];
  _mm256_store_ps(lane, v);
  return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
}

// All bits in the lane of a label that lies `at` places ahead, nothing where that is not one of these eight.
ZSQ_AVX2 inline __m256 lane8(int64_t at) {
  const int lane = at >= 0 && at < 8 ? static_cast<int>(at) : -1;
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_set1_epi32(lane), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
}

struct Growth8 {
  __m256 growth, excess;
};

ZSQ_AVX2 inline Growth8 growth8(__m256 r) {
  __m256 p = all8(coefficient<float>(kTerms<float> - 1));
  for (int k = kTerms<float> - 2; k >= 0; --k) p = _mm256_add_ps(_mm256_mul_ps(p, r), all8(coefficient<float>(k)));
  p = _mm256_mul_ps(p, _mm256_mul_ps(r, r));
  const __m256 g = _mm256_add_ps(p, r), size = _mm256_andnot_ps(all8(-0.0f), r);
  const __m256 large = _mm256_cmp_ps(size, all8(1.0f), _CMP_NLE_UQ);  // and NaN
  if (_mm256_movemask_ps(large) == 0) return {g, p};
  const __m256 far = _mm256_sub_ps(exp8(r), all8(1.0f));
  return {_mm256_blendv_ps(g, far, large), _mm256_blendv_ps(p, _mm256_sub_ps(far, r), large)};
}

struct Ratio8 {
  __m256 p, r, bounded;
};

ZSQ_AVX2 inline Ratio8 ratio8(__m256 s, __m256 t, __m256 temperature, __m256 base, __m256 shift) {
  const __m256 floor = all8(kLogFloor);
  const __m256 log_p = _mm256_sub_ps(_mm256_div_ps(t, temperature), base);
  const __m256 bounded = _mm256_cmp_ps(log_p, floor, _CMP_LT_OQ);
  __m256 r = _mm256_sub_ps(_mm256_div_ps(_mm256_sub_ps(s, t), temperature), shift);
  if (_mm256_movemask_ps(bounded)) {
    const __m256 log_q = _mm256_sub_ps(_mm256_div_ps(s, temperature), _mm256_add_ps(base, shift));
    r = _mm256_blendv_ps(r, _mm256_sub_ps(log_q, floor), bounded);
  }
  return {exp8(_mm256_blendv_ps(log_p, floor, bounded)), r, bounded};
}

// Eight running peaks, each of every eighth class.
struct Peak8 {
  __m256 value;
  __m256i at;

  ZSQ_AVX2 void meet(__m256 v, __m256i k) {
    const __m256 known = _mm256_cmp_ps(value, value, _CMP_ORD_Q);
    const __m256 higher = _mm256_and_ps(_mm256_cmp_ps(v, value, _CMP_NLE_UQ), known);  // NaN is higher, once
    value = _mm256_blendv_ps(value, v, higher);
    at = _mm256_blendv_epi8(at, k, _mm256_castps_si256(higher));
  }

  ZSQ_AVX2 Peak<float> highest() const {
    alignas(32) float v[8];
    alignas(32) int32_t k[8];
    _mm256_store_ps(v, value);
    _mm256_store_si256(reinterpret_cast<__m256i*>(k), at);
    Peak<float> top{v[0], k[0]};
    for (int i = 1; i < 8; ++i) top = higher(top, {v[i], k[i]});
    return top;
  }
};

}  // namespace zsq
#endif
