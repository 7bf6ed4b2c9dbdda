// kernels/elementary.h for eight, bit for bit.
#pragma once

#include "csrc/cpu/simd.h"

#ifdef ZSQ_HAS_AVX2

namespace zsq {

// p * x + c, rounded twice
ZSQ_AVX2 inline __m256 horner8(__m256 p, __m256 x, float c) {
  return _mm256_add_ps(_mm256_mul_ps(p, x), _mm256_set1_ps(c));
}

ZSQ_AVX2 inline __m256 exp_of8(__m256 t) {
  const __m256 magic = _mm256_set1_ps(12582912.0f);
  const __m256 shifted = _mm256_add_ps(_mm256_mul_ps(t, _mm256_set1_ps(1.44269504088896341f)), magic);
  const __m256 n = _mm256_sub_ps(shifted, magic);
  __m256 r = _mm256_sub_ps(t, _mm256_mul_ps(n, _mm256_set1_ps(0.693359375f)));
  r = _mm256_sub_ps(r, _mm256_mul_ps(n, _mm256_set1_ps(-2.12194440e-4f)));
  __m256 p = _mm256_set1_ps(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    p = horner8(p, r, c);
  }
  p = _mm256_add_ps(_mm256_add_ps(_mm256_mul_ps(p, _mm256_mul_ps(r, r)), r), _mm256_set1_ps(1.0f));
  const __m256i power = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
  return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_add_epi32(power, _mm256_set1_epi32(0x3f800000))));
}

ZSQ_AVX2 inline __m256 log_correction8(__m256 f) {
  __m256 p = _mm256_set1_ps(7.0376836292e-2f);
  for (float c : {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f,
                  2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f}) {
    p = horner8(p, f, c);
  }
  return _mm256_mul_ps(_mm256_mul_ps(p, f), _mm256_mul_ps(f, f));
}

ZSQ_AVX2 inline __m256 log_of8(__m256 a) {
  const __m256i root = _mm256_set1_epi32(0x3f3504f3);
  const __m256i offset = _mm256_sub_epi32(_mm256_castps_si256(a), root);
  const __m256 e = _mm256_cvtepi32_ps(_mm256_srai_epi32(offset, 23));
  const __m256i m = _mm256_add_epi32(_mm256_and_si256(offset, _mm256_set1_epi32(0x007fffff)), root);
  const __m256 f = _mm256_sub_ps(_mm256_castsi256_ps(m), _mm256_set1_ps(1.0f)), z = _mm256_mul_ps(f, f);
  __m256 p = _mm256_add_ps(log_correction8(f), _mm256_mul_ps(e, _mm256_set1_ps(-2.12194440e-4f)));
  p = _mm256_sub_ps(p, _mm256_mul_ps(z, _mm256_set1_ps(0.5f)));
  return _mm256_add_ps(_mm256_add_ps(f, p), _mm256_mul_ps(e, _mm256_set1_ps(0.693359375f)));
}

ZSQ_AVX2 inline __m256 power8(__m256 a, __m256 y) {
  const __m256 t = _mm256_mul_ps(y, log_of8(a));
  // max gives its second operand where one is NaN.
  return exp_of8(_mm256_max_ps(_mm256_set1_ps(-87.0f), t));
}

}  // namespace zsq
#endif
