// kernels/philox.h for eight counters.
#pragma once

#include "csrc/cpu/simd.h"
#include "kernels/philox.h"

#ifdef ZSQ_HAS_AVX2

namespace zsq {

struct Words8 {
  __m256i word[4];
};

struct Product8 {
  __m256i high, low;
};

ZSQ_AVX2 inline Product8 product8(__m256i a, __m256i b) {
  // AVX2 multiplies every second lane.
  const __m256i even = _mm256_mul_epu32(a, b), odd = _mm256_mul_epu32(a, _mm256_srli_epi64(b, 32));
  return {_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa),
          _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa)};
}

// Counters low + (high << 32) beside the same upper half.
ZSQ_AVX2 inline Words8 philox8(__m256i low, __m256i high, uint64_t upper, uint64_t key) {
  const auto all = [](uint32_t v) ZSQ_AVX2 { return _mm256_set1_epi32(static_cast<int>(v)); };
  const __m256i a = all(kPhiloxA), b = all(kPhiloxB);
  __m256i c0 = low, c1 = high, c2 = all(static_cast<uint32_t>(upper)), c3 = all(static_cast<uint32_t>(upper >> 32));
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const Product8 first = product8(b, c2), second = product8(a, c0);
    c0 = _mm256_xor_si256(_mm256_xor_si256(first.high, c1), all(k0));
    c2 = _mm256_xor_si256(_mm256_xor_si256(second.high, c3), all(k1));
    c1 = first.low;
    c3 = second.low;
    k0 += kPhiloxKeyA;
    k1 += kPhiloxKeyB;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace zsq
#endif
