// The exponential of eight floats.
#pragma once

#include "csrc/cpu/simd.h"

#ifdef ZSQ_HAS_AVX2
#include <cmath>

namespace zsq {

// Within 2 units in the last place: 2^n * e^r with |r| <= ln(2) / 2, ln(2) in two parts of which the first has 9 bits,
// so that its product with n is exact. The polynomial is Cephes' (S. Moshier, expf). Beyond 88.37 it is infinite, as
// the true value is beyond 88.72; below -87.33 it is 0; of NaN it is NaN.
ZSQ_AVX2 inline __m256 exp8(__m256 x) {
  const __m256 top = _mm256_set1_ps(88.3762626647949f), bottom = _mm256_set1_ps(-87.3365447505531f);
  // min and max give their second operand where one is NaN: x goes second.
  const __m256 t = _mm256_max_ps(bottom, _mm256_min_ps(top, x));
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(t, _mm256_set1_ps(1.44269504088896341f)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_sub_ps(t, _mm256_mul_ps(n, _mm256_set1_ps(0.693359375f)));
  r = _mm256_sub_ps(r, _mm256_mul_ps(n, _mm256_set1_ps(-2.12194440e-4f)));
  __m256 p = _mm256_set1_ps(1.9875691500e-4f);
  for (float term : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    p = _mm256_add_ps(_mm256_mul_ps(p, r), _mm256_set1_ps(term));
  }
  p = _mm256_add_ps(_mm256_add_ps(_mm256_mul_ps(p, _mm256_mul_ps(r, r)), r), _mm256_set1_ps(1.0f));
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  p = _mm256_mul_ps(p, _mm256_castsi256_ps(power));
  p = _mm256_blendv_ps(p, _mm256_set1_ps(HUGE_VALF), _mm256_cmp_ps(x, top, _CMP_GT_OQ));
  p = _mm256_andnot_ps(_mm256_cmp_ps(x, bottom, _CMP_LT_OQ), p);
  return _mm256_blendv_ps(p, x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}

}  // namespace zsq
#endif
