// To codes and back: the two halves of fake_quant.
#include "csrc/cpu/elementwise.h"
#include "csrc/cpu/fake_quant.h"

namespace zsq {
namespace {

#ifdef ZSQ_HAS_AVX2

ZSQ_AVX2 inline __m256i load8(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
ZSQ_AVX2 inline __m256i load8(const int8_t* p) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
ZSQ_AVX2 inline __m256i load8(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}

// Nothing saturates below: codes fit into the type they are stored as.
ZSQ_AVX2 inline __m128i to_16_bits(__m256i v) {
  return _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
}
ZSQ_AVX2 inline void store8(int32_t* p, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
ZSQ_AVX2 inline void store8(int8_t* p, __m256i v) {
  const __m128i h = to_16_bits(v);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(h, h));
}
ZSQ_AVX2 inline void store8(uint8_t* p, __m256i v) {
  const __m128i h = to_16_bits(v);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(h, h));
}

#endif

template <class T, class Code>
struct Quantize {
  const T* x;
  Code* out;

  template <class C>
  void one(int64_t i, const Grid<C>& q) const {
    out[i] = static_cast<Code>(code_of(static_cast<C>(widen(x[i])), q));
  }

#ifdef ZSQ_HAS_AVX2
  ZSQ_AVX2 void eight(int64_t i, const Grid8& q) const {
    ahead(x + i), ahead(out + i);
    const __m256 code = code8(_mm256_div_ps(zsq::load8(x + i), q.scale), q);
    const __m256 zero = _mm256_min_ps(q.qmax, _mm256_max_ps(q.qmin, q.zero_point));
    const __m256 nan = _mm256_cmp_ps(code, code, _CMP_UNORD_Q);
    store8(out + i, _mm256_cvtps_epi32(_mm256_blendv_ps(code, zero, nan)));
  }
#endif
};

template <class T, class Code>
struct Dequantize {
  const Code* code;
  T* out;

  template <class C>
  void one(int64_t i, const Grid<C>& q) const {
    narrow(value_of(static_cast<C>(code[i]), q), out[i]);
  }

#ifdef ZSQ_HAS_AVX2
  ZSQ_AVX2 void eight(int64_t i, const Grid8& q) const {
    const __m256 steps = _mm256_sub_ps(_mm256_cvtepi32_ps(load8(code + i)), q.zero_point);
    zsq::store8(out + i, _mm256_mul_ps(steps, q.scale));
  }
#endif
};

template <class T, class C, class Code>
void run(const CodesArgs& args, int threads) {
  const FakeQuantArgs& a = args.fq;
  if (args.back) {
    const Dequantize<T, Code> op{static_cast<const Code*>(a.x), static_cast<T*>(a.out)};
    for_each_element<C>(op, a, threads);
  } else {
    const Quantize<T, Code> op{static_cast<const T*>(a.x), static_cast<Code*>(a.out)};
    for_each_element<C>(op, a, threads);
  }
}

template <class T, class C>
void with_code(const CodesArgs& args, int threads) {
  switch (args.code) {
    case CodeType::i8:
      return run<T, C, int8_t>(args, threads);
    case CodeType::u8:
      return run<T, C, uint8_t>(args, threads);
    case CodeType::i32:
      return run<T, C, int32_t>(args, threads);
  }
}

}  // namespace

void fake_quant_codes(const CodesArgs& args, int threads) {
  switch (args.fq.dtype) {
    case DType::f32:
      return with_code<float, float>(args, threads);
    case DType::f16:
      return with_code<f16, float>(args, threads);
    case DType::bf16:
      return with_code<bf16, float>(args, threads);
    case DType::f64:
      return with_code<double, double>(args, threads);
  }
}

}  // namespace zsq
