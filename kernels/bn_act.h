// Batch norm in eval mode, activation and their derivative for one element, as zsq_ext/ops/reference/bn_act.py defines
// them. Shared by the CPU's scalar path and CUDA.
#pragma once

#include <cstdint>

#include "arith.h"

namespace zsq {

// Dense tensors in memory order: [samples, places, channels] where the channels are last, else
// [samples, channels, places]. Sums are per sample and channel where per_sample, else per channel.
struct BnActShape {
  int64_t samples, channels, places;
  bool last, per_sample;
};

ZSQ_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A batch norm's own numbers, [channels] each in the type that computes: float, or double where u is double.
struct BnActNorm {
  const void* mean;
  const void* var;  // null where only the sums are taken; gamma and beta null for 1 and 0
  const void* gamma;
  const void* beta;
  double eps;
};

// The quantizer behind the activation, its scale in the type that computes; scale is null where there is none.
struct BnActQuant {
  const void* scale;
  const int32_t* zero_point;
  int64_t stride;  // from one channel's grid to the next: 0 where all share one
  int64_t qmin, qmax;
  bool clip;  // the gradient passes inside the range alone, else everywhere
};

// The codes that zsq_ext passes. zsq_ext/ops/layout.py holds the same table.
enum class Act : int { none = 0, relu = 1, relu6 = 2, silu = 3, hardswish = 4 };

#ifdef __CUDA_ARCH__
ZSQ_HD float root(float a) { return __fsqrt_rn(a); }
ZSQ_HD float exponential(float a) { return expf(a); }
#else
template <class T>
ZSQ_HD T root(T a) {
  return std::sqrt(a);
}
template <class T>
ZSQ_HD T exponential(T a) {
  return std::exp(a);
}
#endif

// One channel's numbers, in the type that computes: v = a * u + b enters the activation, u - mean the sums.
template <class T>
struct Norm {
  T a, b, mean;
};

template <class T>
ZSQ_HD T inverse_deviation(T var, T eps) {
  return div(T(1), root(add(var, eps)));
}

template <class T>
ZSQ_HD Norm<T> norm(T mean, T var, T gamma, T beta, T eps) {
  const T a = mul(gamma, inverse_deviation(var, eps));
  return {a, sub(beta, mul(mean, a)), mean};
}

template <class T>
ZSQ_HD T before_activation(T u, const Norm<T>& m) {
  return add(mul(m.a, u), m.b);
}

template <Act kAct, class T>
ZSQ_HD T activated(T v) {
  switch (kAct) {
    case Act::relu:
      return v < T(0) ? T(0) : v;
    case Act::relu6:
      return clamp(v, T(0), T(6));
    case Act::silu:
      return div(v, add(T(1), exponential(-v)));
    case Act::hardswish:
      return mul(mul(v, clamp(add(v, T(3)), T(0), T(6))), T(1.0 / 6));
    default:
      return v;
  }
}

// Where relu and relu6 pass a gradient: strictly inside, and where v is NaN. Without an activation everywhere.
template <Act kAct, class T>
ZSQ_HD bool passes(T v) {
  return kAct == Act::none || (!(v <= T(0)) && !(kAct == Act::relu6 && v >= T(6)));
}

// The gradient before the activation, from the one behind it.
template <Act kAct, class T>
ZSQ_HD T through(T g, T v) {
  switch (kAct) {
    case Act::relu:
    case Act::relu6:
      return passes<kAct>(v) ? g : T(0);
    case Act::silu: {
      const T s = div(T(1), add(T(1), exponential(-v)));
      return mul(g, mul(s, add(T(1), mul(v, sub(T(1), s)))));
    }
    case Act::hardswish:
      return v <= T(-3) ? T(0) : (v < T(3) ? mul(g, add(mul(v, T(1.0 / 3)), T(0.5))) : g);
    default:
      return g;
  }
}

// The gradient of a loss with respect to u through the sums alone: slope = 2 gS2, offset = gS1, d = u - mean.
template <class T>
ZSQ_HD T of_sums(T d, T slope, T offset) {
  return add(mul(slope, d), offset);
}

}  // namespace zsq
