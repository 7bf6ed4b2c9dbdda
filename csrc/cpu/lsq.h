// LSQ's gradient over a stretch of a tensor, in one pass over grad and x. What is summed, and in which order, depends
// on the sizes alone: neither the number of threads nor AVX2 changes a bit.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "csrc/cpu/fake_quant.h"
#include "csrc/cpu/grid.h"

namespace zsq {
namespace lsq {

// Elements that one thread sums alone, 20 to 50 us of work.
constexpr int64_t kSlab = 1 << 16;
// Lanes of the type that computes, as many as AVX2 has, each flushed into a double after this many additions.
constexpr int64_t kLanes = 8, kFlush = 32;

struct Sums {
  double step = 0, clip = 0;
};

template <class T>
struct Span {
  const T* grad;
  const T* x;
  T* dx;  // null where it is not wanted

  Span operator+(int64_t i) const { return {grad + i, x + i, dx ? dx + i : nullptr}; }
};

template <class T, class C>
inline void one(const Span<T>& s, int64_t i, const Grid<C>& q, C& step, C& clip) {
  const LsqTerms<C> terms = lsq_terms<C>(widen(s.x[i]), widen(s.grad[i]), q);
  if (s.dx) s.dx[i] = terms.inside ? s.grad[i] : T{};
  step += terms.step;
  clip += terms.clip;
}

template <class C>
inline void flush(C* step, C* clip, Sums& sums) {
  for (int k = 0; k < kLanes; ++k) {
    sums.step += step[k];
    sums.clip += clip[k];
    step[k] = clip[k] = 0;
  }
}

// One channel: n elements share a grid.
template <class T, class C>
void row_scalar(const Span<T>& s, int64_t n, const Grid<C>& q, Sums& sums) {
  C step[kLanes]{}, clip[kLanes]{};
  for (int64_t begin = 0; begin < n; begin += kLanes * kFlush) {
    const int64_t end = std::min(n, begin + kLanes * kFlush);
    for (int64_t i = begin; i < end; ++i) one(s, i, q, step[i % kLanes], clip[i % kLanes]);
    flush(step, clip, sums);
  }
}

// Neighbours of channels c, c + 1, ..., each of which has a lane of its own.
template <class T, class C>
void columns_scalar(const Span<T>& s, int64_t n, const FakeQuantArgs& a, int64_t c, C* step, C* clip) {
  for (int64_t i = 0; i < n; ++i) one(s, i, grid_of<C>(a, c + i), step[i], clip[i]);
}

#ifdef ZSQ_HAS_AVX2

template <class T>
ZSQ_AVX2 inline void eight(const Span<T>& s, int64_t i, const Grid8& q, __m256& step, __m256& clip) {
  ahead(s.grad + i), ahead(s.x + i), ahead(s.dx + i);
  const __m256 grad = load8(s.grad + i);
  const __m256 ratio = _mm256_div_ps(load8(s.x + i), q.scale);
  const __m256 mask = inside8(_mm256_add_ps(ratio, q.zero_point), q);
  const __m256 code = code8(ratio, q);
  const __m256 steps = _mm256_sub_ps(code, q.zero_point);
  const __m256 term = _mm256_sub_ps(steps, _mm256_and_ps(mask, ratio));
  const __m256 minus = _mm256_xor_ps(grad, _mm256_set1_ps(-0.0f));
  const __m256 outside = _mm256_blendv_ps(minus, code, _mm256_cmp_ps(code, code, _CMP_UNORD_Q));
  if (s.dx) store8(s.dx + i, _mm256_and_ps(grad, mask));
  step = _mm256_add_ps(step, _mm256_mul_ps(grad, term));
  clip = _mm256_add_ps(clip, _mm256_andnot_ps(mask, outside));
}

template <class T>
ZSQ_AVX2 void row_avx2(const Span<T>& s, int64_t n, const Grid<float>& q, Sums& sums) {
  const Grid8 q8 = grid8_of(q);
  float step[kLanes], clip[kLanes];
  for (int64_t begin = 0; begin < n; begin += kLanes * kFlush) {
    const int64_t end = std::min(n, begin + kLanes * kFlush);
    __m256 step8 = _mm256_setzero_ps(), clip8 = _mm256_setzero_ps();
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) eight(s, i, q8, step8, clip8);
    _mm256_storeu_ps(step, step8);
    _mm256_storeu_ps(clip, clip8);
    for (; i < end; ++i) one(s, i, q, step[i % kLanes], clip[i % kLanes]);
    flush(step, clip, sums);
  }
}

template <class T>
ZSQ_AVX2 void columns_avx2(const Span<T>& s, int64_t n, const FakeQuantArgs& a, int64_t c, float* step, float* clip) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    __m256 step8 = _mm256_loadu_ps(step + i), clip8 = _mm256_loadu_ps(clip + i);
    eight(s, i, grid8_of(a, c + i), step8, clip8);
    _mm256_storeu_ps(step + i, step8);
    _mm256_storeu_ps(clip + i, clip8);
  }
  columns_scalar(s + i, n - i, a, c + i, step + i, clip + i);
}

#endif

template <class T, class C>
void row(const Span<T>& s, int64_t n, const Grid<C>& q, bool simd, Sums& sums) {
#ifdef ZSQ_HAS_AVX2
  if constexpr (std::is_same_v<C, float>) {
    if (simd) return row_avx2(s, n, q, sums);
  }
#endif
  (void)simd;
  row_scalar(s, n, q, sums);
}

template <class T, class C>
void columns(const Span<T>& s, int64_t n, const FakeQuantArgs& a, int64_t c, bool simd, C* step, C* clip) {
#ifdef ZSQ_HAS_AVX2
  if constexpr (std::is_same_v<C, float>) {
    if (simd) return columns_avx2(s, n, a, c, step, clip);
  }
#endif
  (void)simd;
  columns_scalar(s, n, a, c, step, clip);
}

// How the sums of a slab are kept: one slot per channel, or, where a slab is too short to meet every channel, one
// per row it touches.
struct Slots {
  int64_t length;    // elements of a row, all in one channel
  int64_t channels;  // rows go through the channels in turn
  int64_t count;     // slots of a slab

  explicit Slots(const FakeQuantArgs& a)
      : length(a.channels == 1 ? a.n : a.inner),
        channels(a.channels),
        count(a.n ? std::min(channels, (std::min(a.n, kSlab) + length - 2) / length + 1) : 0) {}

  int64_t slot(int64_t row, int64_t first) const { return count == channels ? row % channels : row - first; }
  int64_t channel(int64_t slot, int64_t first) const { return count == channels ? slot : (first + slot) % channels; }
};

template <class T, class C>
void rows_slab(const FakeQuantArgs& a, const Slots& slots, int64_t begin, int64_t end, bool simd, Sums* sums) {
  const Span<T> all{static_cast<const T*>(a.grad), static_cast<const T*>(a.x), static_cast<T*>(a.out)};
  const int64_t first = begin / slots.length;
  for (int64_t i = begin; i < end;) {
    const int64_t at = i / slots.length, stop = std::min(end, (at + 1) * slots.length);
    row(all + i, stop - i, grid_of<C>(a, at % a.channels), simd, sums[slots.slot(at, first)]);
    i = stop;
  }
}

template <class T, class C>
void columns_slab(const FakeQuantArgs& a, const Slots& slots, int64_t begin, int64_t end, bool simd, Sums* sums) {
  const Span<T> all{static_cast<const T*>(a.grad), static_cast<const T*>(a.x), static_cast<T*>(a.out)};
  std::vector<C> step(slots.count), clip(slots.count);
  const auto flush_all = [&] {
    for (int64_t k = 0; k < slots.count; ++k) {
      sums[k].step += step[k];
      sums[k].clip += clip[k];
      step[k] = clip[k] = 0;
    }
  };
  int64_t added = 0;
  for (int64_t i = begin; i < end;) {
    const int64_t c = i % a.channels, stop = std::min(end, i - c + a.channels), slot = slots.slot(i, begin);
    columns(all + i, stop - i, a, c, simd, step.data() + slot, clip.data() + slot);
    i = stop;
    if (++added % kFlush == 0) flush_all();
  }
  flush_all();
}

// One slab, which begins at a multiple of kSlab; adds to its slots.
template <class T, class C>
void slab(const FakeQuantArgs& a, const Slots& slots, int64_t begin, int64_t end, bool simd, Sums* sums) {
  if (a.inner == 1 && a.channels > 1) {
    columns_slab<T, C>(a, slots, begin, end, simd, sums);
  } else {
    rows_slab<T, C>(a, slots, begin, end, simd, sums);
  }
}

// The second stage: the sums of all slabs, [slabs, slots], united per channel.
template <class C>
void finish(const FakeQuantLsqArgs& args, const Slots& slots, const Sums* sums) {
  const FakeQuantArgs& a = args.fq;
  std::vector<Sums> total(a.channels);
  for (int64_t begin = 0; begin < a.n; begin += kSlab) {
    for (int64_t slot = 0; slot < slots.count; ++slot, ++sums) {
      Sums& sum = total[slots.channel(slot, begin / slots.length)];
      sum.step += sums->step;
      sum.clip += sums->clip;
    }
  }
  for (int64_t c = 0; c < a.channels; ++c) {
    static_cast<C*>(args.dscale)[c] = static_cast<C>(total[c].step);
    static_cast<C*>(args.dzero_point)[c] = static_cast<C>(static_cast<const C*>(a.scale)[c] * total[c].clip);
  }
}

}  // namespace lsq
}  // namespace zsq
