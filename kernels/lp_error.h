// |x - x_hat|^p of one element, as zsq_ext/ops/reference/lp_error.py defines it, and how a channel is cut for its sum.
// Shared by the CPU and CUDA, which give the same bits in float: the same operations, added in the same order.
#pragma once

#include <cfloat>
#include <cstdint>

#include "elementary.h"
#include "fake_quant.h"

namespace zsq {

// Elements in a row whose errors are added up, one after another, in 16 of float and those in double. No more than
// 1024 such chunks of a channel are then added in order.
constexpr int64_t kLpTile = 1024, kLpFlush = 16;

ZSQ_HD int64_t lp_chunk(int64_t length) { return kLpTile * ((length + (kLpTile << 10) - 1) / (kLpTile << 10)); }

ZSQ_HD int64_t lp_chunks(int64_t length) {
  const int64_t chunk = lp_chunk(length);
  return chunk ? (length + chunk - 1) / chunk : 0;
}

// p for float: high has 12 bits, so that its product with a float's exponent is exact.
struct Exponent {
  float whole, high, low;
  bool square;
};

inline Exponent exponent_of(double p) {
  const float high = as_float(as_bits(static_cast<float>(p)) & 0xfffff000u);
  return {static_cast<float>(p), high, static_cast<float>(p - high), p == 2};
}

// a^p for a >= 0, within (6 + 3 p) * 2^-24 of itself; 0 below 2^-126 and where the power is below some 2^-115,
// infinite where it is above some 2^115. NaN stays NaN.
// With a = 2^e * m, e * p = n + r and r of at most 1/2 it is 2^n * exp(r * ln(2) + p * ln(m)): nothing large is
// rounded.
ZSQ_HD float lp_power(float a, const Exponent& p) {
  const uint32_t offset = as_bits(a) - 0x3f3504f3u;
  const float e = static_cast<float>(static_cast<int32_t>(offset) >> 23);
  const float f = sub(as_float((offset & 0x007fffffu) + 0x3f3504f3u), 1.0f);
  const float log_m = add(f, sub(log_correction(f), mul(mul(f, f), 0.5f)));
  const float whole = mul(p.high, e), n = round_half_even(whole);
  const float r = add(sub(whole, n), mul(p.low, e));
  const float t = add(mul(r, 0.693147180559945f), mul(p.whole, log_m));
  // 0 at -127, infinite at 128
  const auto biased = static_cast<uint32_t>(static_cast<int32_t>(clamp(n, -127.0f, 128.0f)) + 127);
  const float power = mul(exp_of(t), as_float(biased << 23));
  return a < FLT_MIN ? 0.0f : (a <= FLT_MAX ? power : a);
}

ZSQ_HD float lp_term(float x, const Grid<float>& q, const Exponent& p) {
  const float d = sub(x, fake_quant(x, q));
  return p.square ? mul(d, d) : lp_power(d < 0.0f ? -d : d, p);
}

}  // namespace zsq
