// Fake-quantization of a stretch of elements: what fake_quant and fake_quant_minmax do with a row.
#pragma once

#include "csrc/cpu/elementwise.h"

namespace zsq {

template <class T>
struct Forward {
  const T* x;
  T* out;
  int64_t distance = kAheadBytes;  // of what it asks for

  template <class C>
  void one(int64_t i, const Grid<C>& q) const {
    narrow(fake_quant(static_cast<C>(widen(x[i])), q), out[i]);
  }

#ifdef ZSQ_HAS_AVX2
  ZSQ_AVX2 void eight(int64_t i, const Grid8& q) const {
    ahead(x + i, distance), ahead(out + i, distance);
    const __m256 code = code8(_mm256_div_ps(load8(x + i), q.scale), q);
    store8(out + i, _mm256_mul_ps(_mm256_sub_ps(code, q.zero_point), q.scale));
  }
#endif
};

}  // namespace zsq
