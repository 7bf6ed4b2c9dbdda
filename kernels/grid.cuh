// Where the kernels of the fake_quant family get their numbers: the grid of one channel, and whose element it is.
#pragma once

#include "fake_quant.cuh"
#include "fake_quant.h"

namespace zsq {

__device__ inline Grid<float> grid_of(const CudaFakeQuantArgs& a, int64_t c) {
  // Both types have 4 bytes: one load, whichever it is.
  const int raw = __ldg(static_cast<const int*>(a.zero_point) + c);
  const float zero_point = a.learned ? round_half_even(__int_as_float(raw)) : static_cast<float>(raw);
  return {__ldg(a.scale + c), zero_point, a.qmin, a.qmax};
}

// Where element i stands: its channel, and how far into the channel's row. 64-bit division takes some 80
// instructions, enough to be felt beside 16 bytes of traffic, so tensors below 2^32 elements avoid it.
struct Place {
  int64_t channel, offset;
};

__device__ inline Place place(int64_t i, const CudaFakeQuantArgs& a) {
  if (a.n <= UINT32_MAX) {
    const uint32_t row = uint32_t(i) / uint32_t(a.inner);
    return {row % uint32_t(a.channels), uint32_t(i) - row * uint32_t(a.inner)};
  }
  const int64_t row = i / a.inner;
  return {row % a.channels, i - row * a.inner};
}

}  // namespace zsq
