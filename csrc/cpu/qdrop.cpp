#include "csrc/cpu/qdrop.h"

#include <algorithm>

#include "csrc/cpu/parallel.h"
#include "csrc/cpu/philox.h"
#include "csrc/cpu/simd.h"

namespace zsq {
namespace {

// 32 Ki elements take one core 20 to 50 us, several times what it costs to wake another. A multiple of 32.
constexpr int64_t kGrain = 1 << 15;

// U has the size of an element.
template <class U>
struct Span {
  const U* x;
  const U* x_hat;
  U* out;
  U* rest;
};

struct Draw {
  QDropKey key;
  int32_t threshold;
};

template <class U>
inline void one(const Span<U>& s, int64_t i, bool keep) {
  const U x = s.x[i], x_hat = s.x_hat ? s.x_hat[i] : U{};
  if (s.out) s.out[i] = keep ? x : x_hat;
  if (s.rest) s.rest[i] = keep ? x_hat : x;
}

template <class U>
void flat_scalar(const Span<U>& s, int64_t begin, int64_t end, const Draw& d) {
  for (int64_t i = begin; i < end; i += 4) {
    const Words w = draws(i / 4, d.key);
    for (int64_t k = i; k < std::min(i + 4, end); ++k) one(s, k, keeps(w.word[k - i], d.threshold));
  }
}

// Places p to p + count of a sample, channels c to the last one, with channels side by side. 4 places share draws where
// count is 4, which takes p and the number of places to be multiples of 4.
template <class U>
void last_scalar(const Span<U>& s, const QDropShape& shape, int64_t sample, int64_t p, int64_t count, int64_t c,
                 const Draw& d) {
  for (; c < shape.channels; ++c) {
    const int64_t logical = (sample * shape.channels + c) * shape.places + p;
    const Words w = draws(logical / 4, d.key);
    for (int64_t k = 0; k < count; ++k) {
      one(s, (sample * shape.places + p + k) * shape.channels + c, keeps(w.word[(logical + k) % 4], d.threshold));
    }
  }
}

#ifdef ZSQ_HAS_AVX2

ZSQ_AVX2 inline __m256i keeps8(__m256i word, int32_t threshold) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(threshold), _mm256_srli_epi32(word, 8));
}

ZSQ_AVX2 inline __m256i read(const __m256i* p) { return p ? _mm256_loadu_si256(p) : _mm256_setzero_si256(); }
ZSQ_AVX2 inline __m128i read(const __m128i* p) { return p ? _mm_loadu_si128(p) : _mm_setzero_si128(); }
ZSQ_AVX2 inline void write(__m256i* p, __m256i v) { _mm256_storeu_si256(p, v); }
ZSQ_AVX2 inline void write(__m128i* p, __m128i v) { _mm_storeu_si128(p, v); }
ZSQ_AVX2 inline __m256i select(__m256i mask, __m256i yes, __m256i no) { return _mm256_blendv_epi8(no, yes, mask); }
ZSQ_AVX2 inline __m128i select(__m128i mask, __m128i yes, __m128i no) { return _mm_blendv_epi8(no, yes, mask); }

// One vector's worth of elements, from i on.
template <class U, class V>
ZSQ_AVX2 inline void some(const Span<U>& s, int64_t i, V keep) {
  const V x = read(reinterpret_cast<const V*>(s.x + i));
  const V x_hat = read(s.x_hat ? reinterpret_cast<const V*>(s.x_hat + i) : nullptr);
  if (s.out) write(reinterpret_cast<V*>(s.out + i), select(keep, x, x_hat));
  if (s.rest) write(reinterpret_cast<V*>(s.rest + i), select(keep, x_hat, x));
}

ZSQ_AVX2 inline void eight(const Span<uint16_t>& s, int64_t i, __m256i keep) {
  some(s, i, _mm_packs_epi32(_mm256_castsi256_si128(keep), _mm256_extracti128_si256(keep, 1)));
}

ZSQ_AVX2 inline void eight(const Span<uint32_t>& s, int64_t i, __m256i keep) { some(s, i, keep); }

ZSQ_AVX2 inline void eight(const Span<uint64_t>& s, int64_t i, __m256i keep) {
  some(s, i, _mm256_cvtepi32_epi64(_mm256_castsi256_si128(keep)));
  some(s, i + 4, _mm256_cvtepi32_epi64(_mm256_extracti128_si256(keep, 1)));
}

// Neighbours in memory and in logical order. begin is a multiple of 32.
template <class U>
ZSQ_AVX2 void flat_avx2(const Span<U>& s, int64_t begin, int64_t end, const Draw& d) {
  int64_t i = begin;
  for (; i + 32 <= end; i += 32) {
    // Blocks in an order that the transposition below undoes. They begin at a multiple of 8: no carry within.
    const uint64_t block = static_cast<uint64_t>(i / 4);
    const __m256i low =
        _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(block)), _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
    const __m256i high = _mm256_set1_epi32(static_cast<int>(block >> 32));
    const Words8 w = philox8(low, high, d.key.offset, d.key.key);
    __m256i keep[4];
    for (int k = 0; k < 4; ++k) keep[k] = keeps8(w.word[k], d.threshold);
    const __m256i a = _mm256_unpacklo_epi32(keep[0], keep[1]), b = _mm256_unpackhi_epi32(keep[0], keep[1]);
    const __m256i e = _mm256_unpacklo_epi32(keep[2], keep[3]), f = _mm256_unpackhi_epi32(keep[2], keep[3]);
    eight(s, i, _mm256_unpacklo_epi64(a, e));
    eight(s, i + 8, _mm256_unpackhi_epi64(a, e));
    eight(s, i + 16, _mm256_unpacklo_epi64(b, f));
    eight(s, i + 24, _mm256_unpackhi_epi64(b, f));
  }
  flat_scalar(s, i, end, d);
}

// As last_scalar, 8 channels at a time: a lane each.
template <class U>
ZSQ_AVX2 void last_avx2(const Span<U>& s, const QDropShape& shape, int64_t sample, int64_t p, int64_t count,
                        const Draw& d) {
  int64_t c = 0;
  for (; c + 8 <= shape.channels; c += 8) {
    alignas(32) uint32_t low[8], high[8], which[8];
    for (int k = 0; k < 8; ++k) {
      const uint64_t logical = static_cast<uint64_t>((sample * shape.channels + c + k) * shape.places + p);
      low[k] = static_cast<uint32_t>(logical / 4);
      high[k] = static_cast<uint32_t>(logical / 4 >> 32);
      which[k] = static_cast<uint32_t>(logical % 4);
    }
    const auto lanes = [](const uint32_t* v)
                           ZSQ_AVX2 { return _mm256_load_si256(reinterpret_cast<const __m256i*>(v)); };
    const Words8 w = philox8(lanes(low), lanes(high), d.key.offset, d.key.key);
    const int64_t at = (sample * shape.places + p) * shape.channels + c;
    if (count == 4) {
      for (int k = 0; k < 4; ++k) eight(s, at + k * shape.channels, keeps8(w.word[k], d.threshold));
    } else {
      __m256i word = w.word[0];
      for (int k = 1; k < 4; ++k) {
        word = _mm256_blendv_epi8(word, w.word[k], _mm256_cmpeq_epi32(lanes(which), _mm256_set1_epi32(k)));
      }
      eight(s, at, keeps8(word, d.threshold));
    }
  }
  last_scalar(s, shape, sample, p, count, c, d);
}

#endif

template <class U>
void run(const QDropArgs& a, int threads) {
  const Span<U> s{static_cast<const U*>(a.x), static_cast<const U*>(a.x_hat), static_cast<U*>(a.out),
                  static_cast<U*>(a.rest)};
  const Draw d{{static_cast<uint64_t>(a.key[0]), static_cast<uint64_t>(a.key[1])}, a.threshold};
  const QDropShape& shape = a.shape;
  [[maybe_unused]] const bool simd = simd_enabled();
  if (!shape.last) {
    parallel_for(shape.samples * shape.channels * shape.places, kGrain, threads, [&](int64_t begin, int64_t end) {
#ifdef ZSQ_HAS_AVX2
      if (simd) return flat_avx2(s, begin, end, d);
#endif
      flat_scalar(s, begin, end, d);
    });
    return;
  }
  const int64_t count = shape.places % 4 == 0 ? 4 : 1, groups = shape.places / count;
  const int64_t grain = std::max<int64_t>(kGrain / std::max<int64_t>(shape.channels * count, 1), 1);
  parallel_for(shape.samples * groups, grain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = i / groups, p = i % groups * count;
#ifdef ZSQ_HAS_AVX2
      if (simd) {
        last_avx2(s, shape, sample, p, count, d);
        continue;
      }
#endif
      last_scalar(s, shape, sample, p, count, 0, d);
    }
  });
}

}  // namespace

void qdrop(const QDropArgs& args, int threads) {
  switch (args.size) {
    case 2:
      return run<uint16_t>(args, threads);
    case 4:
      return run<uint32_t>(args, threads);
    case 8:
      return run<uint64_t>(args, threads);
  }
}

}  // namespace zsq
