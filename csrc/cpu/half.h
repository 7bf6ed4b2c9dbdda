// 16-bit floats on the CPU without compiler support: storage types that widen exactly and narrow half to even.
#pragma once

#include <cstdint>
#include <cstring>

namespace zsq {

inline uint32_t bits_of(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  return u;
}

inline float float_of(uint32_t u) {
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}

struct f16 {
  uint16_t bits;
};

struct bf16 {
  uint16_t bits;
};

inline float widen(float v) { return v; }
inline double widen(double v) { return v; }
inline float widen(bf16 v) { return float_of(uint32_t{v.bits} << 16); }

inline float widen(f16 v) {
  const uint32_t sign = uint32_t(v.bits & 0x8000) << 16;
  const uint32_t exponent = (v.bits >> 10) & 31, mantissa = v.bits & 0x3ff;
  if (exponent == 0) return float_of(sign | bits_of(static_cast<float>(mantissa) * 0x1p-24f));  // subnormal
  const uint32_t rebiased = exponent == 31 ? 255 : exponent + (127 - 15);
  return float_of(sign | rebiased << 23 | mantissa << 13);
}

inline void narrow(float v, float& out) { out = v; }
inline void narrow(double v, double& out) { out = v; }

inline void narrow(float v, bf16& out) {
  const uint32_t u = bits_of(v);
  const bool nan = (u & 0x7fffffff) > 0x7f800000;
  out.bits = nan ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

inline void narrow(float v, f16& out) {
  const uint32_t u = bits_of(v), magnitude = u & 0x7fffffff;
  uint32_t h;
  if (magnitude > 0x7f800000) {
    h = 0x7e00;  // NaN
  } else if (magnitude >= 0x47800000) {
    h = 0x7c00;  // 65536 and more; what lies between the largest half and that is rounded below
  } else if (magnitude < 0x38800000) {
    // Below 2^-14. A float in [0.5, 1) has the spacing of subnormal halves, so that adding 0.5 rounds to it.
    h = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  } else {
    h = (magnitude - (uint32_t{127 - 15} << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  out.bits = static_cast<uint16_t>((u >> 16 & 0x8000) | h);
}

}  // namespace zsq
