#include <type_traits>
#include <vector>

#include "csrc/cpu/image.h"
#include "csrc/cpu/lines.h"
#include "csrc/cpu/simd.h"

namespace zsq {
namespace {

// What the columns of a line of y read of the crop's columns. `spread` is false where eight neighbours always read
// within eight others, which they do where nothing shrinks.
template <class C>
struct Reads {
  std::vector<Taps<C>> taps;
  // per group of eight: where it reads first; per column, how far beyond that, and both weights
  std::vector<int32_t> base, offset;
  std::vector<C> first_weight, second_weight;
};

template <class C>
Reads<C> reads_of(const Crop& crop, bool groups) {
  const int64_t size = crop.columns.size;
  Reads<C> r;
  r.taps.resize(size);
  for (int64_t i = 0; i < size; ++i) r.taps[i] = taps_of<C>(crop.columns, crop.flip ? size - 1 - i : i);
  if (!groups || crop.columns.extent > size) return r;
  for (int64_t i = 0; i + 8 <= size; i += 8) {
    r.base.push_back(static_cast<int32_t>(r.taps[crop.flip ? i + 7 : i].first));
    for (int64_t j = i; j < i + 8; ++j) {
      r.offset.push_back(static_cast<int32_t>(r.taps[j].first) - r.base.back());
      r.first_weight.push_back(r.taps[j].first_weight);
      r.second_weight.push_back(r.taps[j].second_weight);
    }
  }
  return r;
}

// Columns from `begin` on of one line, which begins where the crop does.
template <class T, class C>
void across_scalar(const T* line, const Reads<C>& r, int64_t begin, int64_t step, C* out) {
  const int64_t size = static_cast<int64_t>(r.taps.size());
  for (int64_t i = begin; i < size; ++i) {
    const Taps<C>& taps = r.taps[i];
    const T *first = line + taps.first * step, *second = line + taps.second * step;
    for (int64_t c = 0; c < step; ++c) out[i * step + c] = blend(C(widen(first[c])), C(widen(second[c])), taps);
  }
}

template <class T, class C>
void down_scalar(const C* first, const C* second, const Taps<C>& taps, int64_t begin, int64_t n, T* out) {
  for (int64_t i = begin; i < n; ++i) narrow(blend(first[i], second[i], taps), out[i]);
}

// The adjoint. What adds up in each column of the crop: columns of a line of x with their weights, in the crop's order.
template <class C>
struct Sums {
  std::vector<int64_t> begin, column;
  std::vector<C> weight;
};

template <class C>
Sums<C> sums_of(const Crop& crop) {
  const Axis& axis = crop.columns;
  Sums<C> s;
  for (int64_t p = 0; p < axis.extent; ++p) {
    s.begin.push_back(static_cast<int64_t>(s.column.size()));
    for (int64_t o = axis.first_at(p - 1); o < axis.first_at(p + 1); ++o) {
      s.column.push_back(crop.flip ? axis.size - 1 - o : o);
      s.weight.push_back(weight_of<C>(axis, o, p));
    }
  }
  s.begin.push_back(static_cast<int64_t>(s.column.size()));
  return s;
}

template <class T, class C>
void add_line_scalar(C weight, const T* line, int64_t begin, int64_t n, C* sum) {
  for (int64_t i = begin; i < n; ++i) sum[i] = add(sum[i], mul(weight, C(widen(line[i]))));
}

template <class T, class C>
void add_columns(const C* line, const Sums<C>& s, int64_t step, T* out) {
  const int64_t extent = static_cast<int64_t>(s.begin.size()) - 1;
  for (int64_t p = 0; p < extent; ++p) {
    for (int64_t c = 0; c < step; ++c) {
      C sum{};
      for (int64_t i = s.begin[p]; i < s.begin[p + 1]; ++i)
        sum = add(sum, mul(s.weight[i], line[s.column[i] * step + c]));
      narrow(sum, out[p * step + c]);
    }
  }
}

#ifdef ZSQ_HAS_AVX2

template <class T>
ZSQ_AVX2 void widen_line(const T* line, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, load8(line + i));
  for (; i < n; ++i) out[i] = widen(line[i]);
}

// `crop` holds the crop's part of the line and its last pixel once more, which is then the second tap of the last one.
ZSQ_AVX2 inline void across_avx2(const float* crop, const Reads<float>& r, float* out) {
  const int64_t groups = static_cast<int64_t>(r.base.size());
  for (int64_t g = 0; g < groups; ++g) {
    const float* from = crop + r.base[g];
    const __m256i offset = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(&r.offset[8 * g]));
    const __m256 first = _mm256_permutevar8x32_ps(_mm256_loadu_ps(from), offset);
    const __m256 second = _mm256_permutevar8x32_ps(_mm256_loadu_ps(from + 1), offset);
    _mm256_storeu_ps(out + 8 * g, _mm256_add_ps(_mm256_mul_ps(_mm256_loadu_ps(&r.first_weight[8 * g]), first),
                                                _mm256_mul_ps(_mm256_loadu_ps(&r.second_weight[8 * g]), second)));
  }
}

template <class T>
ZSQ_AVX2 void down_avx2(const float* first, const float* second, const Taps<float>& taps, int64_t n, T* out) {
  const __m256 first_weight = _mm256_set1_ps(taps.first_weight), second_weight = _mm256_set1_ps(taps.second_weight);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    store8(out + i, _mm256_add_ps(_mm256_mul_ps(first_weight, _mm256_loadu_ps(first + i)),
                                  _mm256_mul_ps(second_weight, _mm256_loadu_ps(second + i))));
  }
  down_scalar(first, second, taps, i, n, out);
}

template <class T>
ZSQ_AVX2 void add_line_avx2(float weight, const T* line, int64_t n, float* sum) {
  const __m256 w = _mm256_set1_ps(weight);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(sum + i, _mm256_add_ps(_mm256_loadu_ps(sum + i), _mm256_mul_ps(w, load8(line + i))));
  }
  add_line_scalar(weight, line, i, n, sum);
}

#endif

template <class T, class C>
void across(const T* line, const Reads<C>& r, int64_t step, int64_t extent, std::vector<C>& crop, C* out) {
  int64_t done = 0;
#ifdef ZSQ_HAS_AVX2
  if constexpr (std::is_same_v<C, float>) {
    if (!r.base.empty()) {
      widen_line(line, extent, crop.data());
      crop[extent] = crop[extent - 1];
      across_avx2(crop.data(), r, out);
      done = static_cast<int64_t>(r.offset.size());
    }
  }
#endif
  (void)extent, (void)crop;
  across_scalar(line, r, done, step, out);
}

template <class T, class C>
void down(const C* first, const C* second, const Taps<C>& taps, int64_t n, T* out, bool simd) {
#ifdef ZSQ_HAS_AVX2
  if constexpr (std::is_same_v<C, float>) {
    if (simd) return down_avx2(first, second, taps, n, out);
  }
#endif
  (void)simd;
  down_scalar(first, second, taps, 0, n, out);
}

template <class T, class C>
void add_line(C weight, const T* line, int64_t n, C* sum, bool simd) {
#ifdef ZSQ_HAS_AVX2
  if constexpr (std::is_same_v<C, float>) {
    if (simd) return add_line_avx2(weight, line, n, sum);
  }
#endif
  (void)simd;
  add_line_scalar(weight, line, 0, n, sum);
}

// Lines begin to end of y. Each line of the crop is resized across once, while y goes down.
template <class T, class C>
void forward(const ResizeArgs& a, const Lines& l, int64_t plane, int64_t begin, int64_t end, bool simd) {
  const Crop crop = crop_of(a, l.sample(plane));
  const Reads<C> reads = reads_of<C>(crop, simd && l.step == 1 && std::is_same_v<C, float>);
  const T* x = static_cast<const T*>(a.x) + plane * a.shape.in_height * l.in + crop.columns.start * l.step;
  T* y = static_cast<T*>(a.y) + plane * a.shape.out_height * l.out;
  // eight more: a group may begin at the crop's last pixel
  std::vector<C> widened(crop.columns.extent + 9), memory(2 * l.out);
  int64_t held[2] = {-1, -1};
  const auto line = [&](int64_t row) {
    C* const out = memory.data() + row % 2 * l.out;
    if (held[row % 2] != row) {
      across(x + (crop.rows.start + row) * l.in, reads, l.step, crop.columns.extent, widened, out);
      held[row % 2] = row;
    }
    return out;
  };
  for (int64_t row = begin; row < end; ++row) {
    const Taps<C> taps = taps_of<C>(crop.rows, row);
    down(line(taps.first), line(taps.second), taps, l.out, y + row * l.out, simd);
  }
}

template <class T, class C>
void adjoint(const ResizeArgs& a, const Lines& l, int64_t plane, int64_t begin, int64_t end, bool simd) {
  const Crop crop = crop_of(a, l.sample(plane));
  const Sums<C> sums = sums_of<C>(crop);
  const T* x = static_cast<const T*>(a.x) + plane * a.shape.in_height * l.in;
  T* y = static_cast<T*>(a.y) + plane * a.shape.out_height * l.out;
  std::vector<C> line(l.in);
  for (int64_t row = begin; row < end; ++row) {
    T* const out = y + row * l.out;
    std::fill(out, out + l.out, T{});
    const int64_t p = row - crop.rows.start;
    if (p < 0 || p >= crop.rows.extent) continue;
    std::fill(line.begin(), line.end(), C{});
    for (int64_t o = crop.rows.first_at(p - 1); o < crop.rows.first_at(p + 1); ++o) {
      add_line(weight_of<C>(crop.rows, o, p), x + o * l.in, l.in, line.data(), simd);
    }
    add_columns(line.data(), sums, l.step, out + crop.columns.start * l.step);
  }
}

template <class T, class C>
void run(const ResizeArgs& a, int threads) {
  const bool simd = simd_enabled();
  const Lines l = lines_of(a.shape);
  for_lines(l, a.shape.out_height, threads, [&](int64_t plane, int64_t begin, int64_t end) {
    (a.adjoint ? adjoint<T, C> : forward<T, C>)(a, l, plane, begin, end, simd);
  });
}

}  // namespace

void resize_crops(const ResizeArgs& args, int threads) {
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
