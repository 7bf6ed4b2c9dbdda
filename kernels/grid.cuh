// Where the kernels of the fake_quant family get their numbers: the grid of one channel.
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

}  // namespace zsq
