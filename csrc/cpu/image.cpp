#include <type_traits>
#include <vector>

#include "csrc/cpu/image.h"
#include "csrc/cpu/lines.h"
#include "csrc/cpu/simd.h"

namespace zsq {
namespace {

// One line of x under the kernel's horizontal axis: elements first, first + 1, ... of a line of `length`, +0 beyond it.
template <class C>
struct Across {
  int64_t first, count, length, step;
  Smoothing<C> k;
  bool smooth;
};

template <class C, class T>
inline C at(const T* line, int64_t i, int64_t length) {
  return i >= 0 && i < length ? C(widen(line[i])) : C(0);
}

template <class T, class C>
inline C one(const T* line, int64_t i, const Across<C>& a) {
  const C here = at<C>(line, i, a.length);
  return a.smooth ? smoothed(at<C>(line, i - a.step, a.length), here, at<C>(line, i + a.step, a.length), a.k) : here;
}

// Elements begin to end of `out`, whose neighbours all lie within the line.
template <class T, class C>
void inner_scalar(const T* line, int64_t begin, int64_t end, const Across<C>& a, C* out) {
  const T* x = line + a.first;
  for (int64_t i = begin; i < end; ++i) {
    const C here = widen(x[i]);
    out[i] = a.smooth ? smoothed(C(widen(x[i - a.step])), here, C(widen(x[i + a.step])), a.k) : here;
  }
}

// What the vertical axis reads, element by element, and the range of each; the range is null where nothing is clipped.
template <class C>
struct Down {
  const C *up, *here, *down;
  const C *low, *high;
  Smoothing<C> k;
  bool smooth;
};

template <class C>
inline C one(const Down<C>& d, int64_t i) {
  const C v = d.smooth ? smoothed(d.up[i], d.here[i], d.down[i], d.k) : d.here[i];
  return d.low ? clip(v, d.low[i], d.high[i]) : v;
}

// Pixels from `begin` on, backwards where flipped.
template <class T, class C>
void down_scalar(const Down<C>& d, int64_t begin, int64_t count, int64_t step, bool flip, T* out) {
  for (int64_t i = begin; i < count; i += step) {
    T* pixel = out + (flip ? count - step - i : i);
    for (int64_t c = 0; c < step; ++c) narrow(one(d, i + c), pixel[c]);
  }
}

#ifdef ZSQ_HAS_AVX2

ZSQ_AVX2 inline __m256 smoothed8(__m256 before, __m256 here, __m256 after, const Smoothing<float>& k) {
  return _mm256_add_ps(_mm256_mul_ps(_mm256_set1_ps(k.centre), here),
                       _mm256_mul_ps(_mm256_set1_ps(k.edge), _mm256_add_ps(before, after)));
}

template <class T>
ZSQ_AVX2 void inner_avx2(const T* line, int64_t begin, int64_t end, const Across<float>& a, float* out) {
  const T* x = line + a.first;
  int64_t i = begin;
  for (; i + 8 <= end; i += 8) {
    const __m256 here = load8(x + i);
    const __m256 v = a.smooth ? smoothed8(load8(x + i - a.step), here, load8(x + i + a.step), a.k) : here;
    _mm256_storeu_ps(out + i, v);
  }
  inner_scalar(line, i, end, a, out);
}

ZSQ_AVX2 inline __m256 eight(const Down<float>& d, int64_t i) {
  __m256 v = _mm256_loadu_ps(d.here + i);
  if (d.smooth) v = smoothed8(_mm256_loadu_ps(d.up + i), v, _mm256_loadu_ps(d.down + i), d.k);
  // max and min give their second operand where one is NaN: v goes second, so NaN stays NaN.
  return d.low ? _mm256_min_ps(_mm256_loadu_ps(d.high + i), _mm256_max_ps(_mm256_loadu_ps(d.low + i), v)) : v;
}

template <class T>
ZSQ_AVX2 void down_avx2(const Down<float>& d, int64_t count, int64_t step, bool flip, T* out) {
  int64_t i = 0;
  if (!flip) {
    for (; i + 8 <= count; i += 8) store8(out + i, eight(d, i));
    for (; i < count; ++i) narrow(one(d, i), out[i]);
    return;
  }
  if (step == 1) {
    const __m256i backwards = _mm256_setr_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    for (; i + 8 <= count; i += 8) store8(out + count - 8 - i, _mm256_permutevar8x32_ps(eight(d, i), backwards));
  }
  down_scalar(d, i, count, step, true, out);
}

#endif

template <class T, class C>
void across(const T* line, const Across<C>& a, C* out, bool simd) {
  const int64_t begin = clamp(a.step - a.first, int64_t(0), a.count);
  const int64_t end = clamp(a.length - a.step - a.first, begin, a.count);
  for (int64_t i = 0; i < begin; ++i) out[i] = one(line, a.first + i, a);
  for (int64_t i = end; i < a.count; ++i) out[i] = one(line, a.first + i, a);
#ifdef ZSQ_HAS_AVX2
  if constexpr (std::is_same_v<C, float>) {
    if (simd) return inner_avx2(line, begin, end, a, out);
  }
#endif
  (void)simd;
  inner_scalar(line, begin, end, a, out);
}

template <class T, class C>
void down(const Down<C>& d, int64_t count, int64_t step, bool flip, T* out, bool simd) {
#ifdef ZSQ_HAS_AVX2
  if constexpr (std::is_same_v<C, float>) {
    if (simd) return down_avx2(d, count, step, flip, out);
  }
#endif
  (void)simd;
  down_scalar(d, 0, count, step, flip, out);
}

// Three lines of x around a line of y, each smoothed across once while y goes down.
template <class T, class C>
class Around {
 public:
  Around(const T* plane, int64_t height, const Across<C>& a, bool simd)
      : plane_(plane), height_(height), a_(a), simd_(simd), memory_(4 * a.count) {}

  const C* line(int64_t row) {
    C* const lines = memory_.data();
    if (row < 0 || row >= height_) return lines + 3 * a_.count;  // stays +0
    const int64_t slot = row % 3;
    if (held_[slot] != row) across(plane_ + row * a_.length, a_, lines + slot * a_.count, simd_);
    held_[slot] = row;
    return lines + slot * a_.count;
  }

 private:
  const T* plane_;
  int64_t height_;
  Across<C> a_;
  bool simd_;
  std::vector<C> memory_;
  int64_t held_[3] = {-1, -1, -1};
};

// One bound per element of a line of y.
template <class C>
std::vector<C> bounds(const void* of_channels, const Lines& l, int64_t plane) {
  std::vector<C> line(of_channels ? l.out : 0);
  for (size_t i = 0; i < line.size(); ++i) {
    line[i] = static_cast<const C*>(of_channels)[l.channel(plane, static_cast<int64_t>(i))];
  }
  return line;
}

template <class T, class C>
void stretch(const ViewArgs& a, const Lines& l, int64_t plane, int64_t begin, int64_t end, bool simd) {
  const ImageShape& s = a.shape;
  const Window w = window_of(a, l.sample(plane));
  const Smoothing<C> k = smoothing(C(a.edge));
  const bool smooth = a.edge != 0;
  const int64_t first = (w.flip ? w.right - (s.out_width - 1) : w.right) * l.step;
  Around<T, C> around(static_cast<const T*>(a.x) + plane * s.in_height * l.in, s.in_height,
                      {first, l.out, l.in, l.step, k, smooth}, simd);
  const std::vector<C> low = bounds<C>(a.low, l, plane), high = bounds<C>(a.high, l, plane);
  const C* const range[2] = {a.low ? low.data() : nullptr, high.data()};
  T* out = static_cast<T*>(a.y) + (plane * s.out_height + begin) * l.out;
  for (int64_t y = begin; y < end; ++y, out += l.out) {
    const int64_t row = y + w.down;
    const C* const here = around.line(row);
    const Down<C> d{smooth ? around.line(row - 1) : here,
                    here,
                    smooth ? around.line(row + 1) : here,
                    range[0],
                    range[1],
                    k,
                    smooth};
    down(d, l.out, l.step, w.flip, out, simd);
  }
}

template <class T, class C>
void run(const ViewArgs& a, int threads) {
  const bool simd = simd_enabled();
  const Lines l = lines_of(a.shape);
  for_lines(l, a.shape.out_height, threads,
            [&](int64_t plane, int64_t begin, int64_t end) { stretch<T, C>(a, l, plane, begin, end, simd); });
}

}  // namespace

void view_images(const ViewArgs& args, int threads) {
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
