#include <algorithm>
#include <type_traits>
#include <vector>

#include "csrc/cpu/half.h"
#include "csrc/cpu/heads.h"
#include "csrc/cpu/heads8.h"
#include "csrc/cpu/parallel.h"
#include "csrc/cpu/simd.h"

namespace zsq {
namespace {

// Elements that one thread takes at once: 10 to 30 us.
constexpr int64_t kGrain = 1 << 16;
// Channels that are summed in the type that computes before they are added in double.
constexpr int64_t kChunk = 256;

template <class A>
int64_t grain_of(const A& a) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, a.channels * a.places));
}

// The weights of one sample.
template <class C>
std::vector<C> floored(const void* alpha, double floor, int64_t sample, int64_t channels) {
  const C* from = static_cast<const C*>(alpha) + sample * channels;
  std::vector<C> out(from, from + channels);
  for (C& v : out) v = v < static_cast<C>(floor) ? static_cast<C>(floor) : v;
  return out;
}

template <class C>
C relu(double sum) {
  const C s = static_cast<C>(sum);
  return s < C(0) ? C(0) : s;
}

// The sum over channels at one position; `step` elements lie between two channels.
template <class T, class C>
double weighted(const T* x, int64_t step, const std::vector<C>& alpha) {
  const int64_t channels = static_cast<int64_t>(alpha.size());
  double total = 0;
  for (int64_t begin = 0; begin < channels; begin += kChunk) {
    C sum{};
    for (int64_t k = begin; k < std::min(channels, begin + kChunk); ++k) sum += alpha[k] * C(widen(x[k * step]));
    total += sum;
  }
  return total;
}

template <class T, class C>
void sample_scalar(const T* x, int64_t places, bool last, const std::vector<C>& alpha, C* map) {
  const int64_t channels = static_cast<int64_t>(alpha.size());
  for (int64_t p = 0; p < places; ++p) {
    map[p] = relu<C>(last ? weighted(x + p * channels, 1, alpha) : weighted(x + p, places, alpha));
  }
}

// A row of an outer product.
template <class T, class C>
void row_scalar(C left, const C* right, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) narrow(mul(left, right[i]), out[i]);
}

template <class C>
inline bool active(C v, C upper) {
  return v > C(0) && !(v >= upper);
}

#ifdef ZSQ_HAS_AVX2

// kVectors times eight positions in one read of all channels: neighbours, but for the last eight, which begin at `last`
// and may overlap the others. What is computed twice has the same bits.
template <int kVectors, class T>
ZSQ_AVX2 void tile_avx2(const T* x, int64_t places, int64_t last, const std::vector<float>& alpha, float* map) {
  const auto at = [last](int j) { return j == kVectors - 1 ? last : int64_t{8} * j; };
  const int64_t channels = static_cast<int64_t>(alpha.size());
  double total[kVectors][8]{};
  for (int64_t begin = 0; begin < channels; begin += kChunk) {
    __m256 sum[kVectors];
    for (int j = 0; j < kVectors; ++j) sum[j] = _mm256_setzero_ps();
    for (int64_t k = begin; k < std::min(channels, begin + kChunk); ++k) {
      const __m256 weight = all8(alpha[k]);
      for (int j = 0; j < kVectors; ++j) {
        sum[j] = _mm256_add_ps(sum[j], _mm256_mul_ps(weight, load8(x + k * places + at(j))));
      }
    }
    alignas(32) float lane[8];
    for (int j = 0; j < kVectors; ++j) {
      _mm256_store_ps(lane, sum[j]);
      for (int i = 0; i < 8; ++i) total[j][i] += lane[i];
    }
  }
  for (int j = 0; j < kVectors; ++j) {
    for (int i = 0; i < 8; ++i) map[at(j) + i] = relu<float>(total[j][i]);
  }
}

// At least eight positions.
template <class T>
ZSQ_AVX2 void positions_avx2(const T* x, int64_t places, const std::vector<float>& alpha, float* map) {
  int64_t p = 0;
  for (; p + 64 <= places; p += 64) tile_avx2<8>(x + p, places, 56, alpha, map + p);
  const int64_t rest = places - p;
  if (rest > 0 && rest < 8) return tile_avx2<1>(x, places, places - 8, alpha, map);
  x += p, map += p;
  switch ((rest + 7) / 8) {
    case 1:
      return tile_avx2<1>(x, places, rest - 8, alpha, map);
    case 2:
      return tile_avx2<2>(x, places, rest - 8, alpha, map);
    case 3:
      return tile_avx2<3>(x, places, rest - 8, alpha, map);
    case 4:
      return tile_avx2<4>(x, places, rest - 8, alpha, map);
    case 5:
      return tile_avx2<5>(x, places, rest - 8, alpha, map);
    case 6:
      return tile_avx2<6>(x, places, rest - 8, alpha, map);
    case 7:
      return tile_avx2<7>(x, places, rest - 8, alpha, map);
    case 8:
      return tile_avx2<8>(x, places, rest - 8, alpha, map);
  }
}

// Channels last: the sum over one position's channels, four times eight of them side by side.
template <class T>
ZSQ_AVX2 double channels_avx2(const T* x, const std::vector<float>& alpha) {
  const int64_t channels = static_cast<int64_t>(alpha.size());
  double total = 0;
  for (int64_t begin = 0; begin < channels; begin += kChunk) {
    const int64_t end = std::min(channels, begin + kChunk);
    __m256 sum[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    int64_t k = begin;
    for (; k + 32 <= end; k += 32) {
      for (int j = 0; j < 4; ++j) {
        const int64_t at = k + 8 * j;
        sum[j] = _mm256_add_ps(sum[j], _mm256_mul_ps(_mm256_loadu_ps(&alpha[at]), load8(x + at)));
      }
    }
    float rest = 0;
    for (; k < end; ++k) rest += alpha[k] * widen(x[k]);
    total += sum8(_mm256_add_ps(_mm256_add_ps(sum[0], sum[1]), _mm256_add_ps(sum[2], sum[3]))) + rest;
  }
  return total;
}

template <class T>
ZSQ_AVX2 void row_avx2(float left, const float* right, int64_t n, T* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) store8(out + i, _mm256_mul_ps(all8(left), _mm256_loadu_ps(right + i)));
  row_scalar(left, right + i, n - i, out + i);
}

ZSQ_AVX2 inline __m256 active8(__m256 v, __m256 upper) {
  return _mm256_and_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_GT_OQ), _mm256_cmp_ps(v, upper, _CMP_NGE_UQ));
}

template <class T>
ZSQ_AVX2 int32_t count_row_avx2(const T* x, int64_t n, float upper) {
  const __m256 upper8 = all8(upper);
  int32_t count = 0;
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) count += __builtin_popcount(_mm256_movemask_ps(active8(load8(x + i), upper8)));
  for (; i < n; ++i) count += active<float>(widen(x[i]), upper);
  return count;
}

// Channels last: eight channels, down all positions.
template <class T>
ZSQ_AVX2 void count_columns_avx2(const T* x, int64_t places, int64_t channels, float upper, int32_t* count) {
  const __m256 upper8 = all8(upper);
  __m256i sum = _mm256_setzero_si256();
  for (int64_t p = 0; p < places; ++p) {
    sum = _mm256_sub_epi32(sum, _mm256_castps_si256(active8(load8(x + p * channels), upper8)));
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(count), sum);
}

#endif

template <class T, class C>
void sample(const T* x, int64_t places, bool last, const std::vector<C>& alpha, C* map, bool simd) {
#ifdef ZSQ_HAS_AVX2
  if constexpr (std::is_same_v<C, float>) {
    const int64_t channels = static_cast<int64_t>(alpha.size());
    if (simd && last) {
      for (int64_t p = 0; p < places; ++p) map[p] = relu<float>(channels_avx2(x + p * channels, alpha));
      return;
    }
    if (simd && places >= 8) return positions_avx2(x, places, alpha, map);
  }
#endif
  (void)simd;
  sample_scalar(x, places, last, alpha, map);
}

template <class T, class C>
void row(C left, const C* right, int64_t n, T* out, bool simd) {
#ifdef ZSQ_HAS_AVX2
  if constexpr (std::is_same_v<C, float>) {
    if (simd) return row_avx2(left, right, n, out);
  }
#endif
  (void)simd;
  row_scalar(left, right, n, out);
}

template <class T, class C>
void count_sample(const T* x, int64_t channels, int64_t places, bool last, C upper, int32_t* count, bool simd) {
  int64_t c = 0;
#ifdef ZSQ_HAS_AVX2
  if constexpr (std::is_same_v<C, float>) {
    if (simd && last) {
      for (; c + 8 <= channels; c += 8) count_columns_avx2(x + c, places, channels, upper, count + c);
    } else if (simd) {
      for (; c < channels; ++c) count[c] = count_row_avx2(x + c * places, places, upper);
    }
  }
#endif
  (void)simd;
  for (; c < channels; ++c) {
    count[c] = 0;
    for (int64_t p = 0; p < places; ++p) {
      count[c] += active<C>(widen(last ? x[p * channels + c] : x[c * places + p]), upper);
    }
  }
}

template <class T, class C>
void run(const CamMapArgs& a, int threads) {
  const bool simd = simd_enabled();
  parallel_for(a.samples, grain_of(a), threads, [&](int64_t b, int64_t end) {
    for (; b < end; ++b) {
      const T* x = static_cast<const T*>(a.activation) + b * a.channels * a.places;
      sample(x, a.places, a.last, floored<C>(a.alpha, a.floor, b, a.channels), static_cast<C*>(a.maps) + b * a.places,
             simd);
    }
  });
}

template <class T, class C>
void run(const CamMapBackwardArgs& a, int threads) {
  const bool simd = simd_enabled();
  parallel_for(a.samples, grain_of(a), threads, [&](int64_t b, int64_t end) {
    std::vector<C> pulls(a.places);
    for (; b < end; ++b) {
      const C *map = static_cast<const C*>(a.maps) + b * a.places, *grad = static_cast<const C*>(a.grad) + b * a.places;
      for (int64_t p = 0; p < a.places; ++p) pulls[p] = map[p] <= C(0) ? C(0) : grad[p];
      const std::vector<C> alpha = floored<C>(a.alpha, a.floor, b, a.channels);
      const std::vector<C>&left = a.last ? pulls : alpha, &right = a.last ? alpha : pulls;
      const int64_t n = static_cast<int64_t>(right.size());
      T* out = static_cast<T*>(a.out) + b * a.channels * a.places;
      for (const C factor : left) row(factor, right.data(), n, out, simd), out += n;
    }
  });
}

template <class T, class C>
void run(const CountActiveArgs& a, int threads) {
  const bool simd = simd_enabled();
  parallel_for(a.samples, grain_of(a), threads, [&](int64_t b, int64_t end) {
    for (; b < end; ++b) {
      const T* x = static_cast<const T*>(a.x) + b * a.channels * a.places;
      count_sample(x, a.channels, a.places, a.last, static_cast<C>(a.upper), a.count + b * a.channels, simd);
    }
  });
}

template <class A>
void with_dtype(const A& a, int threads) {
  switch (a.dtype) {
    case DType::f32:
      return run<float, float>(a, threads);
    case DType::f16:
      return run<f16, float>(a, threads);
    case DType::bf16:
      return run<bf16, float>(a, threads);
    case DType::f64:
      return run<double, double>(a, threads);
  }
}

}  // namespace

void cam_map(const CamMapArgs& args, int threads) { with_dtype(args, threads); }

void cam_map_backward(const CamMapBackwardArgs& args, int threads) { with_dtype(args, threads); }

void count_active(const CountActiveArgs& args, int threads) { with_dtype(args, threads); }

}  // namespace zsq
