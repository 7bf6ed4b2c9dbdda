#include "csrc/cpu/fake_quant.h"

#include <algorithm>
#include <type_traits>

#include "csrc/cpu/grid.h"
#include "csrc/cpu/parallel.h"

namespace zsq {
namespace {

// 64 Ki elements take one core 10 to 30 us, several times what it costs to wake another.
constexpr int64_t kGrain = 1 << 16;

// A stretch of elements, and what the loops below do with each one.
template <class T>
struct Span {
  const T* grad;
  const T* x;
  T* out;

  Span operator+(int64_t i) const { return {grad ? grad + i : nullptr, x + i, out + i}; }
};

template <class T, class C>
inline void one(const Span<T>& s, int64_t i, const Grid<C>& q) {
  const C x = widen(s.x[i]);
  if (s.grad) {
    s.out[i] = inside(x, q) ? s.grad[i] : T{};
  } else {
    narrow(fake_quant(x, q), s.out[i]);
  }
}

// One channel: n elements share a grid.
template <class T, class C>
void row_scalar(const Span<T>& s, int64_t n, const Grid<C>& q) {
  for (int64_t i = 0; i < n; ++i) one(s, i, q);
}

#ifdef ZSQ_HAS_AVX2

template <class T>
ZSQ_AVX2 inline void eight(const Span<T>& s, int64_t i, const Grid8& q) {
  const __m256 ratio = _mm256_div_ps(load8(s.x + i), q.scale);
  if (s.grad) {
    const __m256 mask = inside8(_mm256_add_ps(ratio, q.zero_point), q);
    store8(s.out + i, _mm256_and_ps(load8(s.grad + i), mask));
  } else {
    store8(s.out + i, _mm256_mul_ps(_mm256_sub_ps(code8(ratio, q), q.zero_point), q.scale));
  }
}

template <class T>
ZSQ_AVX2 void row_avx2(const Span<T>& s, int64_t n, const Grid<float>& q) {
  const Grid8 q8 = grid8_of(q);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) eight(s, i, q8);
  for (; i < n; ++i) one(s, i, q);
}

// Channels last: n neighbours belong to channels c, c + 1, ...
template <class T>
ZSQ_AVX2 void columns_avx2(const Span<T>& s, int64_t n, const FakeQuantArgs& a, int64_t c) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) eight(s, i, grid8_of(a, c + i));
  for (; i < n; ++i) one(s, i, grid_of<float>(a, c + i));
}

#endif

template <class T, class C>
void row(const Span<T>& s, int64_t n, const Grid<C>& q, bool simd) {
#ifdef ZSQ_HAS_AVX2
  if constexpr (std::is_same_v<C, float>) {
    if (simd) return row_avx2(s, n, q);
  }
#endif
  (void)simd;
  row_scalar(s, n, q);
}

// One stretch of channels-last memory, from channel c on, that ends with the last channel or before it.
template <class T, class C>
void columns(const Span<T>& s, int64_t n, const FakeQuantArgs& a, int64_t c, bool simd) {
#ifdef ZSQ_HAS_AVX2
  if constexpr (std::is_same_v<C, float>) {
    if (simd) return columns_avx2(s, n, a, c);
  }
#endif
  (void)simd;
  for (int64_t i = 0; i < n; ++i) one(s, i, grid_of<C>(a, c + i));
}

template <class T, class C>
void piece(const FakeQuantArgs& a, int64_t begin, int64_t end, bool simd) {
  const Span<T> all{static_cast<const T*>(a.grad), static_cast<const T*>(a.x), static_cast<T*>(a.out)};
  const bool last = a.inner == 1 && a.channels > 1;
  const int64_t length = last ? a.channels : a.channels == 1 ? a.n : a.inner;
  for (int64_t i = begin; i < end;) {
    const int64_t stop = std::min(end, (i / length + 1) * length);
    if (last) {
      columns<T, C>(all + i, stop - i, a, i % a.channels, simd);
    } else {
      row(all + i, stop - i, grid_of<C>(a, i / length % a.channels), simd);
    }
    i = stop;
  }
}

template <class T, class C>
void run(const FakeQuantArgs& a, int threads) {
  const bool simd = simd_enabled();
  parallel_for(a.n, kGrain, threads, [&](int64_t begin, int64_t end) { piece<T, C>(a, begin, end, simd); });
}

}  // namespace

void fake_quant(const FakeQuantArgs& args, int threads) {
  switch (args.dtype) {
    case DType::f32:
      return run<float, float>(args, threads);
    case DType::f16:
      return run<f16, float>(args, threads);
    case DType::bf16:
      return run<bf16, float>(args, threads);
    case DType::f64:
      return run<double, double>(args, threads);
  }
}

}  // namespace zsq
