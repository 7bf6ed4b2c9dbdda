#include "csrc/cpu/bn_act.h"

#include "csrc/cpu/bn_act_pass.h"

namespace zsq {
namespace {

// What y and the mask get; without y only the sums are taken. Rounding to T keeps the order, so that the ends are taken
// of what is not yet rounded, and rounded themselves.
template <Act kAct, bool kHasEnds, class T>
struct Forward {
  static constexpr bool kEnds = kHasEnds;

  const T* u;
  const T* residual;
  T* y;
  uint8_t* mask;
  bool sums, quantize, clip;

  Forward from(int64_t i, int64_t byte) const {
    return {u + i, residual ? residual + i : nullptr, y ? y + i : nullptr, mask ? mask + byte : nullptr, sums, quantize,
            clip};
  }

  template <class C>
  void one(int64_t i, Bit bit, const Channel<C>& channel, Totals<C, kEnds>& all) const {
    const C x = widen(u[i]);
    if (y) {
      C v = before_activation(x, channel.norm);
      if (residual) v = add(v, C(widen(residual[i])));
      bool passing = passes<kAct>(v);
      v = activated<kAct>(v);
      if constexpr (kEnds) all.take(v);
      narrow(v, y[i]);
      if (quantize) {
        const C stored = widen(y[i]);  // rounded to T first, as what fake_quant gets to see
        passing = passing && (!clip || inside(stored, channel.grid));
        narrow(fake_quant(stored, channel.grid), y[i]);
      }
      if (mask) mask[bit.byte] = static_cast<uint8_t>((bit.bit ? mask[bit.byte] : 0) | passing << bit.bit);
    }
    if (sums) {
      const C d = sub(x, channel.norm.mean);
      all.first += d;
      all.second += mul(d, d);
    }
  }

#ifdef ZSQ_HAS_AVX2

  ZSQ_AVX2_INLINE void eight(int64_t i, int64_t byte, const Channel8& c, Totals8<kEnds>& all) const {
    const __m256 x = load8(u + i);
    if (y) {
      __m256 v = _mm256_add_ps(_mm256_mul_ps(c.a, x), c.b);
      if (residual) v = _mm256_add_ps(v, load8(residual + i));
      __m256 out = activated8<kAct>(v);
      if constexpr (kEnds) take8(out, all.ends);
      if (mask) v = passes8<kAct>(v);
      if (quantize) {
        out = as_stored8(out, y);
        if (mask && clip) v = _mm256_and_ps(v, passes_quantizer8(out, c.grid));
        out = quantized8(out, c.grid);
      }
      store8(y + i, out);
      if (mask) mask[byte] = static_cast<uint8_t>(_mm256_movemask_ps(v));
    }
    if (sums) {
      const __m256 d = _mm256_sub_ps(x, c.mean);
      all.first = _mm256_add_ps(all.first, d);
      all.second = _mm256_add_ps(all.second, _mm256_mul_ps(d, d));
    }
  }

  ZSQ_AVX2_INLINE void ahead(int64_t i) const {
    _mm_prefetch(reinterpret_cast<const char*>(u + i), _MM_HINT_T0);
    if (residual) _mm_prefetch(reinterpret_cast<const char*>(residual + i), _MM_HINT_T0);
    if (y) _mm_prefetch(reinterpret_cast<const char*>(y + i), _MM_HINT_T0);
  }

#endif
};

// What is left of v once it was stored in T.
template <class T, class C>
C as_stored(C v) {
  T stored;
  narrow(v, stored);
  return widen(stored);
}

template <Act kAct, class T, class C>
struct Run {
  static void call(const BnActArgs& a, int threads) { a.ends ? run<true>(a, threads) : run<false>(a, threads); }

  template <bool kEnds>
  static void run(const BnActArgs& a, int threads) {
    const Channels<C> channels(a.norm, a.quant, nullptr, nullptr, a.shape.channels);
    const Forward<kAct, kEnds, T> op{static_cast<const T*>(a.u),
                                     static_cast<const T*>(a.residual),
                                     static_cast<T*>(a.y),
                                     a.mask,
                                     a.s1 != nullptr,
                                     a.quant.scale != nullptr,
                                     a.quant.clip};
    const Partials<C> partials = pass<C>(op, channels, a.shape, threads);
    if (a.s1) partials.add_up(a.shape.per_sample ? a.shape.samples : 1, static_cast<C*>(a.s1), static_cast<C*>(a.s2));
    if (kEnds) {
      C *lo = static_cast<C*>(a.ends), *hi = lo + a.shape.channels;
      partials.unite(lo, hi, simd_enabled());
      for (int64_t c = 0; c < a.shape.channels; ++c) {
        const Range<C> range = reported(Range<C>{as_stored<T>(lo[c]), as_stored<T>(hi[c])});
        lo[c] = range.lo, hi[c] = range.hi;
      }
    }
  }
};

}  // namespace

void bn_act(const BnActArgs& args, int threads) { with_dtype<Run>(args, threads); }

}  // namespace zsq
