// All weights of a call are one list of pieces. What is summed, and in which order, depends on the sizes alone: neither
// the number of threads nor AVX2 changes a bit.
#include "csrc/cpu/adaround.h"

#include <algorithm>
#include <numeric>
#include <type_traits>

#include "csrc/cpu/elementary.h"
#include "csrc/cpu/half.h"
#include "csrc/cpu/parallel.h"
#include "csrc/cpu/simd.h"
#include "kernels/adaround.h"

namespace zsq {
namespace {

// 16 Ki elements take one core 20 to 60 us, several times what it costs to wake another.
constexpr int64_t kGrain = 1 << 14;
// A piece is what is summed before anything is widened to double: neighbours of one row, in 8 lanes as AVX2 has.
constexpr int64_t kLanes = 8, kPiece = kLanes * 512;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Neighbours of one channel. In the forward grad is null.
template <class T>
struct Span {
  const T* grad;
  const T* v;
  const int16_t* base;
  T* out;
};

// What a stretch has besides its elements.
template <class C>
struct Rule {
  Grid<C> grid;
  Regulariser<C> reg;
  bool hard;
};

// Gives what the element adds to the sum: to dscale in the backward, else to the regulariser.
template <class T, class C>
inline C one(const Span<T>& s, int64_t i, const Rule<C>& rule) {
  const C v = widen(s.v[i]), base = s.base[i];
  if (s.grad) {
    const AdaRoundTerms<C> terms = adaround_terms<C>(v, base, widen(s.grad[i]), rule.grid, rule.reg);
    narrow(terms.dv, s.out[i]);
    return terms.step;
  }
  const C h = rule.hard ? hard(v) : soft(v).h;
  narrow(adaround(h, base, rule.grid), s.out[i]);
  return rule.reg.on ? undecided(h, rule.reg) : C(0);
}

template <class T, class C>
double piece_scalar(const Span<T>& s, int64_t n, const Rule<C>& rule) {
  C lanes[kLanes]{};
  for (int64_t i = 0; i < n; ++i) lanes[i % kLanes] += one(s, i, rule);
  return std::accumulate(lanes, lanes + kLanes, 0.0);
}

#ifdef ZSQ_HAS_AVX2

struct Rule8 {
  __m256 scale, zero_point, qmin, qmax, exponent, weight;
};

ZSQ_AVX2 inline __m256 clamp8(__m256 v, __m256 lo, __m256 hi) {
  // max and min give their second operand where one is NaN: v goes second, so NaN stays NaN.
  return _mm256_min_ps(hi, _mm256_max_ps(lo, v));
}

ZSQ_AVX2 inline __m256 select8(__m256 mask, __m256 yes, __m256 no) { return _mm256_blendv_ps(no, yes, mask); }

// NaN is not inside.
ZSQ_AVX2 inline __m256 inside8(__m256 v, __m256 lo, __m256 hi) {
  return _mm256_and_ps(_mm256_cmp_ps(v, lo, _CMP_GE_OQ), _mm256_cmp_ps(v, hi, _CMP_LE_OQ));
}

ZSQ_AVX2 inline __m256 magnitude8(__m256 v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }

// The functions of kernels/adaround.h, for eight.
template <class T>
ZSQ_AVX2 inline __m256 eight(const Span<T>& s, int64_t i, const Rule<float>& rule, const Rule8& q) {
  const __m256 zero = _mm256_setzero_ps(), unit = _mm256_set1_ps(1.0f), sign = _mm256_set1_ps(-0.0f);
  const __m256 v = load8(s.v + i);
  const __m256 base =
      _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(s.base + i))));
  __m256 sigmoid = zero, stretched = zero, h;
  if (rule.hard) {
    const __m256 up = _mm256_and_ps(_mm256_cmp_ps(v, zero, _CMP_GE_OQ), unit);
    h = select8(_mm256_cmp_ps(v, v, _CMP_UNORD_Q), v, up);
  } else {
    const __m256 t = clamp8(_mm256_xor_ps(v, sign), _mm256_set1_ps(-8.0f), _mm256_set1_ps(8.0f));
    sigmoid = _mm256_div_ps(unit, _mm256_add_ps(unit, exp_of8(t)));
    stretched = _mm256_sub_ps(_mm256_mul_ps(sigmoid, _mm256_set1_ps(1.2f)), _mm256_set1_ps(0.1f));
    h = clamp8(stretched, zero, unit);
  }
  const __m256 code = _mm256_add_ps(base, h);
  const __m256 steps = _mm256_sub_ps(clamp8(code, q.qmin, q.qmax), q.zero_point);
  __m256 u = zero, p = zero;
  if (rule.reg.on) {
    u = _mm256_sub_ps(_mm256_mul_ps(_mm256_set1_ps(2.0f), h), unit);
    p = power8(magnitude8(u), q.exponent);
  }
  if (!s.grad) {
    store8(s.out + i, _mm256_mul_ps(steps, q.scale));
    return rule.reg.on ? _mm256_sub_ps(unit, _mm256_mul_ps(p, magnitude8(u))) : zero;
  }
  const __m256 grad = load8(s.grad + i);
  __m256 dh = _mm256_and_ps(_mm256_mul_ps(grad, q.scale), inside8(code, q.qmin, q.qmax));
  if (rule.reg.on) {
    const __m256 signed_p = _mm256_or_ps(p, _mm256_and_ps(sign, u));
    const __m256 decides = _mm256_cmp_ps(u, zero, _CMP_NEQ_OQ);
    dh = _mm256_sub_ps(dh, _mm256_mul_ps(q.weight, _mm256_and_ps(signed_p, decides)));
  }
  const __m256 slope = _mm256_mul_ps(_mm256_set1_ps(1.2f), _mm256_mul_ps(sigmoid, _mm256_sub_ps(unit, sigmoid)));
  store8(s.out + i, _mm256_and_ps(_mm256_mul_ps(dh, slope), inside8(stretched, zero, unit)));
  return _mm256_mul_ps(grad, steps);
}

template <class T>
ZSQ_AVX2 double piece_avx2(const Span<T>& s, int64_t n, const Rule<float>& rule) {
  const Rule8 q{_mm256_set1_ps(rule.grid.scale), _mm256_set1_ps(rule.grid.zero_point), _mm256_set1_ps(rule.grid.qmin),
                _mm256_set1_ps(rule.grid.qmax),  _mm256_set1_ps(rule.reg.exponent),    _mm256_set1_ps(rule.reg.weight)};
  __m256 sums = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sums = _mm256_add_ps(sums, eight(s, i, rule, q));
  float lanes[kLanes];
  _mm256_storeu_ps(lanes, sums);
  for (; i < n; ++i) lanes[i % kLanes] += one(s, i, rule);
  return std::accumulate(lanes, lanes + kLanes, 0.0);
}

#endif

template <class T, class C>
double piece(const Span<T>& s, int64_t n, const Rule<C>& rule, bool simd) {
#ifdef ZSQ_HAS_AVX2
  if constexpr (std::is_same_v<C, float>) {
    if (simd) return piece_avx2(s, n, rule);
  }
#endif
  (void)simd;
  return piece_scalar(s, n, rule);
}

int64_t pieces_of_row(const AdaRoundWeight& w) { return ceil_div(w.inner, kPiece); }

template <class C>
Grid<C> grid_of(const AdaRoundWeight& w, int64_t c) {
  return {static_cast<const C*>(w.scale)[c], static_cast<C>(w.zero_point[c]), static_cast<C>(w.qmin),
          static_cast<C>(w.qmax)};
}

// The k-th piece of a weight.
template <class T, class C>
double run_piece(const AdaRoundWeight& w, int64_t k, Rule<C>& rule, bool simd) {
  const int64_t per_row = pieces_of_row(w), channel = k / per_row, offset = k % per_row * kPiece;
  const int64_t at = channel * w.inner + offset;
  rule.grid = grid_of<C>(w, channel);
  const Span<T> span{w.grad ? static_cast<const T*>(w.grad) + at : nullptr, static_cast<const T*>(w.v) + at,
                     w.base + at, static_cast<T*>(w.out) + at};
  return piece(span, std::min(kPiece, w.inner - offset), rule, simd);
}

template <class T, class C>
void run(const AdaRoundArgs& a, int threads) {
  const bool simd = simd_enabled();
  const Regulariser<C> reg = regulariser(static_cast<const C*>(a.beta), static_cast<const C*>(a.grad_reg));
  std::vector<int64_t> first{0};  // each weight's first piece, and the end
  int64_t elements = 0;
  for (const AdaRoundWeight& w : a.weights) {
    first.push_back(first.back() + w.channels * pieces_of_row(w));
    elements += w.channels * w.inner;
  }
  const int64_t pieces = first.back(), grain = ceil_div(kGrain * pieces, std::max<int64_t>(elements, 1));
  std::vector<double> sums(pieces);
  parallel_for(pieces, std::max<int64_t>(grain, 1), threads, [&](int64_t begin, int64_t end) {
    Rule<C> rule{{}, reg, a.hard};
    size_t k = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (int64_t i = begin; i < end; ++i) {
      while (i >= first[k + 1]) ++k;
      sums[i] = run_piece<T>(a.weights[k], i - first[k], rule, simd);
    }
  });
  if (a.reg) *static_cast<C*>(a.reg) = static_cast<C>(std::accumulate(sums.begin(), sums.end(), 0.0));
  for (size_t k = 0; k < a.weights.size(); ++k) {
    const AdaRoundWeight& w = a.weights[k];
    const double* sum = sums.data() + first[k];
    for (int64_t c = 0; w.dscale && c < w.channels; ++c, sum += pieces_of_row(w)) {
      static_cast<C*>(w.dscale)[c] = static_cast<C>(std::accumulate(sum, sum + pieces_of_row(w), 0.0));
    }
  }
}

}  // namespace

void adaround(const AdaRoundArgs& args, int threads) {
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
