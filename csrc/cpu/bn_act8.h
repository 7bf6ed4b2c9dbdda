// The functions of kernels/bn_act.h for eight elements, and the numbers that eight neighbours meet.
#pragma once

#include "csrc/cpu/exp8.h"
#include "csrc/cpu/grid.h"
#include "csrc/cpu/simd.h"
#include "kernels/bn_act.h"

#ifdef ZSQ_HAS_AVX2

namespace zsq {

// Of eight elements of one channel, or of eight channels.
struct Channel8 {
  __m256 a, b, mean, slope, offset;
  Grid8 grid;
};

ZSQ_AVX2 inline __m256 one_plus_exp_of_minus(__m256 v) {
  return _mm256_add_ps(_mm256_set1_ps(1.0f), exp8(_mm256_xor_ps(v, _mm256_set1_ps(-0.0f))));
}

template <Act kAct>
ZSQ_AVX2 inline __m256 activated8(__m256 v) {
  const __m256 zero = _mm256_setzero_ps(), six = _mm256_set1_ps(6.0f);
  if constexpr (kAct == Act::relu) return _mm256_max_ps(zero, v);
  if constexpr (kAct == Act::relu6) return _mm256_min_ps(six, _mm256_max_ps(zero, v));
  if constexpr (kAct == Act::silu) return _mm256_div_ps(v, one_plus_exp_of_minus(v));
  if constexpr (kAct == Act::hardswish) {
    const __m256 gate = _mm256_min_ps(six, _mm256_max_ps(zero, _mm256_add_ps(v, _mm256_set1_ps(3.0f))));
    return _mm256_mul_ps(_mm256_mul_ps(v, gate), _mm256_set1_ps(static_cast<float>(1.0 / 6)));
  }
  return v;
}

// Only of what is a clip, or nothing at all.
template <Act kAct>
ZSQ_AVX2 inline __m256 passes8(__m256 v) {
  if constexpr (kAct == Act::none) return _mm256_castsi256_ps(_mm256_set1_epi32(-1));
  const __m256 above = _mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NLE_UQ);
  if constexpr (kAct == Act::relu6) return _mm256_and_ps(above, _mm256_cmp_ps(v, _mm256_set1_ps(6.0f), _CMP_NGE_UQ));
  return above;
}

template <Act kAct>
ZSQ_AVX2 inline __m256 through8(__m256 g, __m256 v) {
  const __m256 one = _mm256_set1_ps(1.0f), three = _mm256_set1_ps(3.0f);
  if constexpr (kAct == Act::relu || kAct == Act::relu6) return _mm256_and_ps(g, passes8<kAct>(v));
  if constexpr (kAct == Act::silu) {
    const __m256 s = _mm256_div_ps(one, one_plus_exp_of_minus(v));
    const __m256 slope = _mm256_mul_ps(s, _mm256_add_ps(one, _mm256_mul_ps(v, _mm256_sub_ps(one, s))));
    return _mm256_mul_ps(g, slope);
  }
  if constexpr (kAct == Act::hardswish) {
    const __m256 third = _mm256_set1_ps(static_cast<float>(1.0 / 3));
    const __m256 slope = _mm256_add_ps(_mm256_mul_ps(v, third), _mm256_set1_ps(0.5f));
    const __m256 inside = _mm256_cmp_ps(v, three, _CMP_LT_OQ);
    const __m256 out = _mm256_blendv_ps(g, _mm256_mul_ps(g, slope), inside);
    return _mm256_andnot_ps(_mm256_cmp_ps(v, _mm256_set1_ps(-3.0f), _CMP_LE_OQ), out);
  }
  return g;
}

ZSQ_AVX2 inline __m256 quantized8(__m256 y, const Grid8& q) {
  return _mm256_mul_ps(_mm256_sub_ps(code8(_mm256_div_ps(y, q.scale), q), q.zero_point), q.scale);
}

ZSQ_AVX2 inline __m256 passes_quantizer8(__m256 y, const Grid8& q) {
  return inside8(_mm256_add_ps(_mm256_div_ps(y, q.scale), q.zero_point), q);
}

// What is left of v once it was stored in T.
ZSQ_AVX2 inline __m256 as_stored8(__m256 v, const float*) { return v; }

template <class T>
ZSQ_AVX2 inline __m256 as_stored8(__m256 v, const T*) {
  alignas(16) T stored[8];
  store8(stored, v);
  return load8(stored);
}

ZSQ_AVX2 inline __m256 lanes_of(uint8_t byte) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(byte), bit), bit));
}

}  // namespace zsq

#endif
