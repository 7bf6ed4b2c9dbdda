// Eight floats at a time on x86-64 with AVX2: loads that widen, stores that narrow, and who may use them.
//
// Functions marked ZSQ_AVX2 are compiled for AVX2 in an otherwise portable build; simd_enabled() says at run
// time whether this machine may enter them. FMA is left out of the target, so nothing can be contracted.
#pragma once

#include "csrc/cpu/half.h"

namespace zsq {

bool simd_enabled();
// For tests: false sends every kernel down its scalar path. Returns what was in force before.
bool set_simd(bool on);

}  // namespace zsq

#if defined(__x86_64__) && defined(__GNUC__)
#define ZSQ_HAS_AVX2 1
#define ZSQ_AVX2 __attribute__((target("avx2,f16c")))
// For what a loop does with eight elements, where a call takes a third as long again. A compiler that inlines as much
// as it deems fit stops somewhere among many instances.
#define ZSQ_AVX2_INLINE ZSQ_AVX2 __attribute__((always_inline))
#include <immintrin.h>

namespace zsq {

// How far ahead a stream asks for what it comes to: dividing between the loads would leave the memory idle.
constexpr int64_t kAheadBytes = 2048;

// Past the end of a tensor it does nothing.
template <class T>
ZSQ_AVX2 inline void ahead(const T* p, int64_t bytes = kAheadBytes) {
  _mm_prefetch(reinterpret_cast<const char*>(p) + bytes, _MM_HINT_T0);
}

ZSQ_AVX2 inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }

ZSQ_AVX2 inline __m256 load8(const f16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

ZSQ_AVX2 inline __m256 load8(const bf16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

ZSQ_AVX2 inline void store8(float* p, __m256 v) { _mm256_storeu_ps(p, v); }

ZSQ_AVX2 inline void store8(f16* p, __m256 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

ZSQ_AVX2 inline void store8(bf16* p, __m256 v) {
  const __m256i u = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i h = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  h = _mm256_blendv_epi8(h, _mm256_set1_epi32(0x7fc0), nan);
  // packus works within 128-bit halves: gather the two low quarters.
  h = _mm256_permute4x64_epi64(_mm256_packus_epi32(h, h), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(h));
}

}  // namespace zsq
#endif
