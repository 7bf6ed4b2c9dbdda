// Fake-quantization of one element, as zsq_ext/ops/reference/fake_quant.py defines it. Shared by the CPU and CUDA.
#pragma once

#include "arith.h"

namespace zsq {

// The quantizer's numbers for one element, in the type that computes: float, or double for double x.
template <class T>
struct Grid {
  T scale;       // step, in units of x
  T zero_point;  // a code
  T qmin, qmax;  // inclusive
};

// x / scale + zero_point: the code before rounding and clamping.
template <class T>
ZSQ_HD T unrounded_code(T x, const Grid<T>& q) {
  return add(div(x, q.scale), q.zero_point);
}

// The code, still a float: NaN stays NaN.
template <class T>
ZSQ_HD T code_or_nan(T x, const Grid<T>& q) {
  return clamp(add(round_half_even(div(x, q.scale)), q.zero_point), q.qmin, q.qmax);
}

// The code as an integer can hold it: NaN becomes the code of 0.
template <class T>
ZSQ_HD T code_of(T x, const Grid<T>& q) {
  const T code = code_or_nan(x, q);
  return code == code ? code : clamp(q.zero_point, q.qmin, q.qmax);
}

template <class T>
ZSQ_HD T value_of(T code, const Grid<T>& q) {
  return mul(sub(code, q.zero_point), q.scale);
}

template <class T>
ZSQ_HD T fake_quant(T x, const Grid<T>& q) {
  return value_of(code_or_nan(x, q), q);
}

// Where the straight-through gradient passes: decided before rounding, edges included, never for NaN.
template <class T>
ZSQ_HD bool inside(T x, const Grid<T>& q) {
  const T v = unrounded_code(x, q);
  return v >= q.qmin && v <= q.qmax;
}

// What one element adds to its channel's two sums in LSQ's gradient. NaN in x is not inside, and both are NaN.
template <class T>
struct LsqTerms {
  bool inside;
  T step;  // to dscale
  T clip;  // to dzero_point / scale
};

template <class T>
ZSQ_HD LsqTerms<T> lsq_terms(T x, T grad, const Grid<T>& q) {
  const T ratio = div(x, q.scale), v = add(ratio, q.zero_point);
  const bool in = v >= q.qmin && v <= q.qmax;
  const T code = clamp(add(round_half_even(ratio), q.zero_point), q.qmin, q.qmax);
  const T steps = sub(code, q.zero_point);
  return {in, mul(grad, in ? sub(steps, ratio) : steps), in ? T(0) : (code == code ? -grad : code)};
}

}  // namespace zsq
