#include "csrc/cpu/bn_act.h"
#include "csrc/cpu/bn_act_pass.h"

namespace zsq {
namespace {

// What du and dr get, and the sums of g and g * (u - mean) where gamma and beta learn.
template <Act kAct, class T>
struct Backward {
  static constexpr bool kEnds = false;

  const T* u;
  const T* residual;
  const uint8_t* mask;
  const T* grad;
  T* du;
  T* dr;
  bool sums, stats;
  bool clip;  // what entered the quantizer is asked again where the gradient passes

  Backward from(int64_t i, int64_t byte) const {
    return {u + i,
            residual ? residual + i : nullptr,
            mask ? mask + byte : nullptr,
            grad ? grad + i : nullptr,
            du ? du + i : nullptr,
            dr ? dr + i : nullptr,
            sums,
            stats,
            clip};
  }

  template <class C>
  void one(int64_t i, Bit bit, const Channel<C>& channel, Totals<C, kEnds>& all) const {
    const C x = widen(u[i]), d = sub(x, channel.norm.mean);
    C w{};
    if (grad) {
      C g = widen(grad[i]);
      if (mask) {
        g = mask[bit.byte] >> bit.bit & 1 ? g : C(0);
      } else if (kAct != Act::none || clip) {
        C v = before_activation(x, channel.norm);
        if (residual) v = add(v, C(widen(residual[i])));
        if (clip) {
          T stored;
          narrow(activated<kAct>(v), stored);
          g = inside(C(widen(stored)), channel.grid) ? g : C(0);
        }
        g = through<kAct>(g, v);
      }
      if (dr) narrow(g, dr[i]);
      if (sums) {
        all.first += g;
        all.second += mul(g, d);
      }
      w = mul(channel.norm.a, g);
    }
    if (du) {
      if (stats) {
        const C q = of_sums(d, channel.slope, channel.offset);
        w = grad ? add(w, q) : q;
      }
      narrow(w, du[i]);
    }
  }

#ifdef ZSQ_HAS_AVX2

  ZSQ_AVX2_INLINE void eight(int64_t i, int64_t byte, const Channel8& c, Totals8<kEnds>& all) const {
    const __m256 x = load8(u + i), d = _mm256_sub_ps(x, c.mean);
    __m256 w = _mm256_setzero_ps();
    if (grad) {
      __m256 g = load8(grad + i);
      if (mask) {
        g = _mm256_and_ps(g, lanes_of(mask[byte]));
      } else if (kAct != Act::none || clip) {
        __m256 v = _mm256_add_ps(_mm256_mul_ps(c.a, x), c.b);
        if (residual) v = _mm256_add_ps(v, load8(residual + i));
        if (clip) g = _mm256_and_ps(g, passes_quantizer8(as_stored8(activated8<kAct>(v), u), c.grid));
        g = through8<kAct>(g, v);
      }
      if (dr) store8(dr + i, g);
      if (sums) {
        all.first = _mm256_add_ps(all.first, g);
        all.second = _mm256_add_ps(all.second, _mm256_mul_ps(g, d));
      }
      w = _mm256_mul_ps(c.a, g);
    }
    if (du) {
      if (stats) {
        const __m256 q = _mm256_add_ps(_mm256_mul_ps(c.slope, d), c.offset);
        w = grad ? _mm256_add_ps(w, q) : q;
      }
      store8(du + i, w);
    }
  }

  ZSQ_AVX2 void ahead(int64_t i) const {
    _mm_prefetch(reinterpret_cast<const char*>(u + i), _MM_HINT_T0);
    if (grad) _mm_prefetch(reinterpret_cast<const char*>(grad + i), _MM_HINT_T0);
    if (residual) _mm_prefetch(reinterpret_cast<const char*>(residual + i), _MM_HINT_T0);
    if (du) _mm_prefetch(reinterpret_cast<const char*>(du + i), _MM_HINT_T0);
    if (dr) _mm_prefetch(reinterpret_cast<const char*>(dr + i), _MM_HINT_T0);
  }

#endif
};

template <Act kAct, class T, class C>
struct Run {
  static void call(const BnActBackwardArgs& a, int threads) {
    const Channels<C> channels(a.norm, a.quant, a.grad_s1, a.grad_s2, a.shape.channels);
    const Backward<kAct, T> op{static_cast<const T*>(a.u),
                               static_cast<const T*>(a.residual),
                               a.mask,
                               static_cast<const T*>(a.grad),
                               static_cast<T*>(a.du),
                               static_cast<T*>(a.dr),
                               a.dgamma != nullptr,
                               a.grad_s1 != nullptr,
                               a.quant.scale && a.quant.clip};
    const Partials<C> partials = pass<C>(op, channels, a.shape, threads);
    if (!a.dgamma) return;
    C* dgamma = static_cast<C*>(a.dgamma);
    partials.add_up(1, static_cast<C*>(a.dbeta), dgamma);
    for (int64_t c = 0; c < a.shape.channels; ++c) {
      dgamma[c] = mul(dgamma[c], inverse_deviation(static_cast<const C*>(a.norm.var)[c], C(a.norm.eps)));
    }
  }
};

}  // namespace

void bn_act_backward(const BnActBackwardArgs& args, int threads) { with_dtype<Run>(args, threads); }

}  // namespace zsq
