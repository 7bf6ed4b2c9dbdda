// Elements are read once and tried on all grids while they are in the cache: eight grids at a time, so that a short
// channel wastes nothing and every sum is taken in the order of the elements.
#include "csrc/cpu/lp_error.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "csrc/cpu/elementary.h"
#include "csrc/cpu/grid.h"
#include "csrc/cpu/parallel.h"
#include "kernels/lp_error.h"

namespace zsq {
namespace {

// Errors that one core computes in some 100 us, or in 25 where they are squares.
constexpr int64_t kGrain = 1 << 16;
constexpr int64_t kLanes = 8;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The grids of one channel, filled up to whole lanes.
template <class C>
struct Grids {
  std::vector<C> scale, zero_point;
  C qmin, qmax;

  Grids(const LpErrorArgs& a, int64_t channel)
      : scale(ceil_div(a.candidates, kLanes) * kLanes, C(1)),
        zero_point(scale.size()),
        qmin(static_cast<C>(a.qmin)),
        qmax(static_cast<C>(a.qmax)) {
    const int64_t first = channel * a.candidates;
    std::copy_n(static_cast<const C*>(a.scale) + first, a.candidates, scale.begin());
    std::copy_n(a.zero_point + first, a.candidates, zero_point.begin());
  }

  Grid<C> operator[](int64_t k) const { return {scale[k], zero_point[k], qmin, qmax}; }
};

double term_of(double x, const Grid<double>& q, double p) {
  const double d = std::fabs(x - fake_quant(x, q));
  return p == 2 ? d * d : std::pow(d, p);
}

float term_of(float x, const Grid<float>& q, const Exponent& p) { return lp_term(x, q, p); }

// Adds n elements' errors to the sum of each grid.
template <class C, class P>
void tile_scalar(const C* x, int64_t n, const Grids<C>& grids, const P& p, double* sums) {
  for (size_t k = 0; k < grids.scale.size(); ++k) {
    const Grid<C> q = grids[k];
    for (int64_t i = 0; i < n;) {
      C sum = 0;
      for (const int64_t end = std::min(n, i + kLpFlush); i < end; ++i) sum += term_of(x[i], q, p);
      sums[k] += sum;
    }
  }
}

#ifdef ZSQ_HAS_AVX2

struct Exponent8 {
  __m256 whole, high, low;
};

// lp_power of kernels/lp_error.h for eight, in its two halves: a^p = 2^n * exp(t).
ZSQ_AVX2 inline void split8(__m256 a, const Exponent8& p, __m256& n, __m256& t) {
  const __m256i root = _mm256_set1_epi32(0x3f3504f3);
  const __m256i offset = _mm256_sub_epi32(_mm256_castps_si256(a), root);
  const __m256 e = _mm256_cvtepi32_ps(_mm256_srai_epi32(offset, 23));
  const __m256i m = _mm256_add_epi32(_mm256_and_si256(offset, _mm256_set1_epi32(0x007fffff)), root);
  const __m256 f = _mm256_sub_ps(_mm256_castsi256_ps(m), _mm256_set1_ps(1.0f));
  const __m256 half = _mm256_mul_ps(_mm256_mul_ps(f, f), _mm256_set1_ps(0.5f));
  const __m256 log_m = _mm256_add_ps(f, _mm256_sub_ps(log_correction8(f), half));
  const __m256 whole = _mm256_mul_ps(p.high, e);
  n = round_half_even8(whole);
  const __m256 r = _mm256_add_ps(_mm256_sub_ps(whole, n), _mm256_mul_ps(p.low, e));
  t = _mm256_add_ps(_mm256_mul_ps(r, _mm256_set1_ps(0.693147180559945f)), _mm256_mul_ps(p.whole, log_m));
}

ZSQ_AVX2 inline __m256 joined8(__m256 a, __m256 n, __m256 t) {
  const __m256 clamped = _mm256_min_ps(_mm256_set1_ps(128.0f), _mm256_max_ps(_mm256_set1_ps(-127.0f), n));
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(clamped), _mm256_set1_epi32(127));
  const __m256 power = _mm256_mul_ps(exp_of8(t), _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)));
  const __m256 finite = _mm256_cmp_ps(a, _mm256_set1_ps(FLT_MAX), _CMP_LE_OQ);
  const __m256 small = _mm256_cmp_ps(a, _mm256_set1_ps(FLT_MIN), _CMP_LT_OQ);
  return _mm256_andnot_ps(small, _mm256_blendv_ps(a, power, finite));
}

ZSQ_AVX2 inline __m256 difference8(float x, const Grid8& q) {
  const __m256 v = _mm256_set1_ps(x);
  const __m256 code = code8(_mm256_div_ps(v, q.scale), q);
  return _mm256_sub_ps(v, _mm256_mul_ps(_mm256_sub_ps(code, q.zero_point), q.scale));
}

// The sum over up to kLpFlush elements. A power is a long chain of operations: in three sweeps of short ones a core
// overlaps many elements, in one it would wait for few.
ZSQ_AVX2 inline __m256 powers8(const float* x, int64_t count, const Grid8& q, const Exponent8& p) {
  __m256 a[kLpFlush], n[kLpFlush], t[kLpFlush], sum = _mm256_setzero_ps();
  for (int64_t i = 0; i < count; ++i) a[i] = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), difference8(x[i], q));
  for (int64_t i = 0; i < count; ++i) split8(a[i], p, n[i], t[i]);
  for (int64_t i = 0; i < count; ++i) sum = _mm256_add_ps(sum, joined8(a[i], n[i], t[i]));
  return sum;
}

ZSQ_AVX2 inline __m256 squares8(const float* x, int64_t count, const Grid8& q) {
  __m256 sum = _mm256_setzero_ps();
  for (int64_t i = 0; i < count; ++i) {
    const __m256 d = difference8(x[i], q);
    sum = _mm256_add_ps(sum, _mm256_mul_ps(d, d));
  }
  return sum;
}

ZSQ_AVX2 void tile_avx2(const float* x, int64_t n, const Grids<float>& grids, const Exponent& p, double* sums) {
  const Exponent8 p8{_mm256_set1_ps(p.whole), _mm256_set1_ps(p.high), _mm256_set1_ps(p.low)};
  for (size_t k = 0; k < grids.scale.size(); k += kLanes) {
    const Grid8 q{_mm256_loadu_ps(&grids.scale[k]), _mm256_loadu_ps(&grids.zero_point[k]), _mm256_set1_ps(grids.qmin),
                  _mm256_set1_ps(grids.qmax)};
    __m256d low = _mm256_loadu_pd(sums + k), high = _mm256_loadu_pd(sums + k + 4);
    for (int64_t i = 0; i < n; i += kLpFlush) {
      const int64_t count = std::min(n - i, kLpFlush);
      const __m256 sum = p.square ? squares8(x + i, count, q) : powers8(x + i, count, q, p8);
      low = _mm256_add_pd(low, _mm256_cvtps_pd(_mm256_castps256_ps128(sum)));
      high = _mm256_add_pd(high, _mm256_cvtps_pd(_mm256_extractf128_ps(sum, 1)));
    }
    _mm256_storeu_pd(sums + k, low);
    _mm256_storeu_pd(sums + k + 4, high);
  }
}

#endif

template <class C, class P>
void tile(const C* x, int64_t n, const Grids<C>& grids, const P& p, bool simd, double* sums) {
#ifdef ZSQ_HAS_AVX2
  if constexpr (std::is_same_v<C, float>) {
    if (simd) return tile_avx2(x, n, grids, p, sums);
  }
#endif
  (void)simd;
  tile_scalar(x, n, grids, p, sums);
}

template <class T, class C, class P>
void run(const LpErrorArgs& a, const P& p, int threads) {
  const bool simd = simd_enabled();
  const int64_t chunk = lp_chunk(a.length), per_channel = lp_chunks(a.length), chunks = a.channels * per_channel;
  const int64_t slots = ceil_div(a.candidates, kLanes) * kLanes;
  std::vector<double> sums(chunks * slots);
  const int64_t work = std::max<int64_t>(1, std::min(chunk, a.length) * slots);
  parallel_for(chunks, ceil_div(kGrain, work), threads, [&](int64_t at, int64_t end) {
    C wide[kLpTile];
    for (; at < end; ++at) {
      const int64_t channel = at / per_channel, begin = (at - channel * per_channel) * chunk;
      const int64_t stop = std::min(begin + chunk, a.length);
      const T* x = static_cast<const T*>(a.x) + channel * a.length;
      const Grids<C> grids(a, channel);
      for (int64_t i = begin; i < stop; i += kLpTile) {
        const int64_t n = std::min(kLpTile, stop - i);
        for (int64_t k = 0; k < n; ++k) wide[k] = static_cast<C>(widen(x[i + k]));
        tile(wide, n, grids, p, simd, sums.data() + at * slots);
      }
    }
  });
  for (int64_t c = 0; c < a.channels; ++c) {
    double* error = a.error + c * a.candidates;
    std::fill_n(error, a.candidates, 0.0);
    for (int64_t k = c * per_channel; k < (c + 1) * per_channel; ++k) {
      for (int64_t j = 0; j < a.candidates; ++j) error[j] += sums[k * slots + j];
    }
  }
}

}  // namespace

void lp_error(const LpErrorArgs& args, int threads) {
  const Exponent p = exponent_of(args.p);
  switch (args.dtype) {
    case DType::f32:
      return run<float, float>(args, p, threads);
    case DType::f16:
      return run<f16, float>(args, p, threads);
    case DType::bf16:
      return run<bf16, float>(args, p, threads);
    case DType::f64:
      return run<double, double>(args, args.p, threads);
  }
}

}  // namespace zsq
