// Arithmetic that rounds once per operation on every target. Shared by the CPU's scalar path and CUDA.
//
// On the device the intrinsics keep nvcc from contracting a*b+c and from approximating a division; on the
// host -ffp-contract=off does.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define ZSQ_HD __host__ __device__ __forceinline__
#else
#define ZSQ_HD inline
#endif

namespace zsq {

#ifdef __CUDA_ARCH__
ZSQ_HD float add(float a, float b) { return __fadd_rn(a, b); }
ZSQ_HD float sub(float a, float b) { return __fsub_rn(a, b); }
ZSQ_HD float mul(float a, float b) { return __fmul_rn(a, b); }
ZSQ_HD float div(float a, float b) { return __fdiv_rn(a, b); }
ZSQ_HD float round_half_even(float a) { return rintf(a); }
#else
template <class T>
ZSQ_HD T add(T a, T b) {
  return a + b;
}
template <class T>
ZSQ_HD T sub(T a, T b) {
  return a - b;
}
template <class T>
ZSQ_HD T mul(T a, T b) {
  return a * b;
}
template <class T>
ZSQ_HD T div(T a, T b) {
  return a / b;
}
template <class T>
ZSQ_HD T round_half_even(T a) {
  return std::nearbyint(a);
}
#endif

// NaN fails both comparisons and comes out as NaN; fmin and fmax would turn it into a bound.
template <class T>
ZSQ_HD T clamp(T v, T lo, T hi) {
  return v < lo ? lo : (v > hi ? hi : v);
}

}  // namespace zsq
