// The fake_quant family on CUDA. Contract: zsq_ext/ops/reference/fake_quant.py and fake_quant_minmax.py.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "dtype.h"
#include "fake_quant_minmax.h"

namespace zsq {

// A dense tensor in memory order, seen as [outer, channels, inner]: element i belongs to channel
// (i / inner) % channels.
struct CudaFakeQuantArgs {
  const void* grad;        // [n] in x's dtype; null in the forward
  const void* x;           // [n]
  void* out;               // [n]; null where a gradient is not wanted
  const float* scale;      // [channels]
  const void* zero_point;  // [channels] int32, or float and rounded here
  bool learned;            // zero_point is float
  int64_t n, channels, inner;
  float qmin, qmax;
  DType dtype;
};

// The forward where grad is null, else the straight-through gradient. Launches nothing for n = 0.
cudaError_t cuda_fake_quant(const CudaFakeQuantArgs& args, cudaStream_t stream);

struct CudaFakeQuantLsqArgs {
  CudaFakeQuantArgs fq;
  float* dscale;  // [channels], as dzero_point
  float* dzero_point;
  void* workspace;  // as many bytes as _workspace says
};

// LSQ's gradient: the straight-through gradient into out, and two sums per channel. Launches nothing for n = 0, and
// then writes nothing.
cudaError_t cuda_fake_quant_lsq_backward(const CudaFakeQuantLsqArgs& args, cudaStream_t stream);
int64_t cuda_fake_quant_lsq_workspace(const CudaFakeQuantLsqArgs& args);

// A tensor of several.
struct CudaFakeQuantTensor {
  CudaFakeQuantArgs fq;
  float* dscale;  // [channels], as dzero_point; both null where they are not wanted
  float* dzero_point;
};

struct CudaFakeQuantManyArgs {
  std::vector<CudaFakeQuantTensor> tensors;
  bool backward;
  DType dtype;      // of all
  void* workspace;  // as many bytes as _workspace says
};

// The forward of every tensor, or LSQ's gradient of every tensor, with the bits of one after the other. One launch for
// as many tensors as a kernel's parameters hold, and in the backward one more where channels are long.
cudaError_t cuda_fake_quant_many(const CudaFakeQuantManyArgs& args, cudaStream_t stream);
int64_t cuda_fake_quant_many_workspace(const CudaFakeQuantManyArgs& args);

struct CudaCodesArgs {
  CudaFakeQuantArgs fq;  // x holds values and out codes, or `back` the other way round; dtype is that of the values
  CodeType code;
  bool back;
};

// Values to codes, NaN to the code of 0; or codes to values. Launches nothing for n = 0.
cudaError_t cuda_fake_quant_codes(const CudaCodesArgs& args, cudaStream_t stream);

struct CudaMinMaxArgs {
  const MinMaxTensor* tensors;  // [count], in the host's memory, read before the call returns
  int64_t count;
  float* scale;         // [all channels]
  int32_t* zero_point;  // [all channels]
  bool symmetric;
  DType dtype;
};

// Every channel quantized on the grid between its own extremes.
cudaError_t cuda_fake_quant_minmax(const CudaMinMaxArgs& args, cudaStream_t stream);

}  // namespace zsq
