#include "csrc/cpu/bn_act.h"

#include "csrc/cpu/bn_act_pass.h"

namespace zsq {
namespace {

// What y and the mask get; without y only the sums are taken.
template <Act kAct, class T>
struct Forward {
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
  void one(int64_t i, Bit bit, const Channel<C>& channel, Sums<C>& all) const {
    const C x = widen(u[i]);
    if (y) {
      C v = before_activation(x, channel.norm);
      if (residual) v = add(v, C(widen(residual[i])));
      bool passing = passes<kAct>(v);
      narrow(activated<kAct>(v), y[i]);
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

  ZSQ_AVX2 void eight(int64_t i, int64_t byte, const Channel8& c, Sums8& all) const {
    const __m256 x = load8(u + i);
    if (y) {
      __m256 v = _mm256_add_ps(_mm256_mul_ps(c.a, x), c.b);
      if (residual) v = _mm256_add_ps(v, load8(residual + i));
      __m256 out = activated8<kAct>(v);
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

  ZSQ_AVX2 void ahead(int64_t i) const {
    _mm_prefetch(reinterpret_cast<const char*>(u + i), _MM_HINT_T0);
    if (residual) _mm_prefetch(reinterpret_cast<const char*>(residual + i), _MM_HINT_T0);
    if (y) _mm_prefetch(reinterpret_cast<const char*>(y + i), _MM_HINT_T0);
  }

#endif
};

template <Act kAct, class T, class C>
struct Run {
  static void call(const BnActArgs& a, int threads) {
    const Channels<C> channels(a.norm, a.quant, nullptr, nullptr, a.shape.channels);
    const Forward<kAct, T> op{static_cast<const T*>(a.u),
                              static_cast<const T*>(a.residual),
                              static_cast<T*>(a.y),
                              a.mask,
                              a.s1 != nullptr,
                              a.quant.scale != nullptr,
                              a.quant.clip};
    const Partials<C> partials = pass<C>(op, channels, a.shape, threads);
    if (a.s1) partials.add_up(a.shape.per_sample ? a.shape.samples : 1, static_cast<C*>(a.s1), static_cast<C*>(a.s2));
  }
};

}  // namespace

void bn_act(const BnActArgs& args, int threads) { with_dtype<Run>(args, threads); }

}  // namespace zsq
