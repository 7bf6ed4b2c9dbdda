// The exponential and the logarithm in float, from operations that round once: the same bits on the CPU, with and
// without AVX2, on CUDA and in Triton (csrc/cpu/elementary.h and elementary.py are twins, operation by operation). No
// library's is. The polynomials are Cephes' (S. Moshier, expf and logf). For double, which one backend alone has, the
// library will do.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "arith.h"

namespace zsq {

#ifdef __CUDA_ARCH__
ZSQ_HD uint32_t as_bits(float a) { return __float_as_uint(a); }
ZSQ_HD float as_float(uint32_t a) { return __uint_as_float(a); }
#else
ZSQ_HD uint32_t as_bits(float a) {
  uint32_t u;
  std::memcpy(&u, &a, sizeof u);
  return u;
}
ZSQ_HD float as_float(uint32_t a) {
  float f;
  std::memcpy(&f, &a, sizeof f);
  return f;
}
#endif

// e^t for |t| <= 87, within 2 units in the last place: 2^n * e^r with |r| <= ln(2) / 2. ln(2) comes in two parts, of
// which the first has 9 bits, so that its product with n is exact. Any other t gives some number, NaN gives NaN.
ZSQ_HD float exp_of(float t) {
  // 1.5 * 2^23 leaves no bits for a fraction, and n in the lowest ones.
  const float shifted = add(mul(t, 1.44269504088896341f), 12582912.0f), n = sub(shifted, 12582912.0f);
  const float r = sub(sub(t, mul(n, 0.693359375f)), mul(n, -2.12194440e-4f));
  float p = 1.9875691500e-4f;
  p = add(mul(p, r), 1.3981999507e-3f);
  p = add(mul(p, r), 8.3334519073e-3f);
  p = add(mul(p, r), 4.1665795894e-2f);
  p = add(mul(p, r), 1.6666665459e-1f);
  p = add(mul(p, r), 5.0000001201e-1f);
  p = add(add(mul(p, mul(r, r)), r), 1.0f);
  return mul(p, as_float((as_bits(shifted) << 23) + 0x3f800000u));
}

// What ln(1 + f) is beside f - f^2 / 2, for 1 + f between the roots of 1/2 and 2.
ZSQ_HD float log_correction(float f) {
  float p = 7.0376836292e-2f;
  p = add(mul(p, f), -1.1514610310e-1f);
  p = add(mul(p, f), 1.1676998740e-1f);
  p = add(mul(p, f), -1.2420140846e-1f);
  p = add(mul(p, f), 1.4249322787e-1f);
  p = add(mul(p, f), -1.6668057665e-1f);
  p = add(mul(p, f), 2.0000714765e-1f);
  p = add(mul(p, f), -2.4999993993e-1f);
  p = add(mul(p, f), 3.3333331174e-1f);
  return mul(mul(p, f), mul(f, f));
}

// ln(a) for normal a > 0, within 2 units in the last place; ln(1) is 0. Any other a gives some finite number.
ZSQ_HD float log_of(float a) {
  // a = 2^e * m with m between the roots of 1/2 and 2
  const uint32_t offset = as_bits(a) - 0x3f3504f3u;
  const float e = static_cast<float>(static_cast<int32_t>(offset) >> 23);
  const float f = sub(as_float((offset & 0x007fffffu) + 0x3f3504f3u), 1.0f), z = mul(f, f);
  float p = add(log_correction(f), mul(e, -2.12194440e-4f));
  p = sub(p, mul(z, 0.5f));
  return add(add(f, p), mul(e, 0.693359375f));
}

// a^y for 0 <= a <= 1 and y >= 0. Below e^-87 it stays there; a = 0 gives a number between 0 and 1, no matter which.
ZSQ_HD float power(float a, float y) {
  const float t = mul(y, log_of(a));
  return exp_of(t < -87.0f ? -87.0f : t);
}

ZSQ_HD double exp_of(double t) { return std::exp(t); }
ZSQ_HD double power(double a, double y) { return std::pow(a, y); }

}  // namespace zsq
