// Adaptive rounding of one element, as zsq_ext/ops/reference/adaround.py defines it. Shared by the CPU and CUDA.
#pragma once

#include "arith.h"
#include "elementary.h"
#include "fake_quant.h"

namespace zsq {

template <class T>
struct Soft {
  T sigmoid, stretched, h;
};

template <class T>
ZSQ_HD Soft<T> soft(T v) {
  // Beyond 2.4 h is clamped anyway, so the exponential need not go far.
  const T s = div(T(1), add(T(1), exp_of(clamp(-v, T(-8), T(8)))));
  const T stretched = sub(mul(s, T(1.2)), T(0.1));
  return {s, stretched, clamp(stretched, T(0), T(1))};
}

// 1 where v rounds up in the end; NaN stays.
template <class T>
ZSQ_HD T hard(T v) {
  return v >= T(0) ? T(1) : (v < T(0) ? T(0) : v);
}

// w_hat from h
template <class T>
ZSQ_HD T adaround(T h, T base, const Grid<T>& q) {
  return mul(sub(clamp(add(base, h), q.qmin, q.qmax), q.zero_point), q.scale);
}

// The regulariser's numbers: its exponent less 1, and what a unit of |2h - 1|^exponent sends to h.
template <class T>
struct Regulariser {
  bool on;
  T exponent, weight;
};

template <class T>
ZSQ_HD Regulariser<T> regulariser(const T* beta, const T* grad) {
  if (!beta) return {false, T(0), T(0)};
  return {true, sub(*beta, T(1)), grad ? mul(*grad, mul(T(2), *beta)) : T(0)};
}

// What one element adds to the regulariser.
template <class T>
ZSQ_HD T undecided(T h, const Regulariser<T>& reg) {
  const T u = sub(mul(T(2), h), T(1)), a = u < T(0) ? -u : u;
  return sub(T(1), mul(power(a, reg.exponent), a));
}

// v's gradient, and what one element adds to its channel's sum for dscale.
template <class T>
struct AdaRoundTerms {
  T dv, step;
};

template <class T>
ZSQ_HD AdaRoundTerms<T> adaround_terms(T v, T base, T grad, const Grid<T>& q, const Regulariser<T>& reg) {
  const Soft<T> at = soft(v);
  const T code = add(base, at.h);
  T dh = code >= q.qmin && code <= q.qmax ? mul(grad, q.scale) : T(0);
  if (reg.on) {
    const T u = sub(mul(T(2), at.h), T(1));
    const T p = power(u < T(0) ? -u : u, reg.exponent);
    dh = sub(dh, mul(reg.weight, u < T(0) ? -p : (u > T(0) ? p : T(0))));
  }
  const T slope = mul(T(1.2), mul(at.sigmoid, sub(T(1), at.sigmoid)));
  const bool moves = at.stretched >= T(0) && at.stretched <= T(1);
  return {moves ? mul(dh, slope) : T(0), mul(grad, sub(clamp(code, q.qmin, q.qmax), q.zero_point))};
}

}  // namespace zsq
