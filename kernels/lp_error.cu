// The Lp error of many grids: a block holds a tile of elements in shared memory, and each of its threads tries one grid
// on them, in their order. Thus no sum crosses threads, and all have the CPU's bits.
// Contract: zsq_ext/ops/reference/lp_error.py; arithmetic: lp_error.h.
#include <algorithm>

#include "lp_error.cuh"
#include "lp_error.h"
#include "pack.cuh"

namespace zsq {
namespace {

// A thread is a grid: a search tries some 100, and a block of more would wait longer for its slowest warp.
constexpr int64_t kThreads = 128, kWarp = 32;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Args {
  CudaLpErrorArgs lp;
  Exponent p;
  int64_t chunk, chunks;  // of a channel
  double* sums;           // [channels, chunks, candidates]
};

template <class T, bool kSquare>
__global__ void __launch_bounds__(kThreads) lp_error_kernel(Args a) {
  __shared__ float tile[kLpTile];
  const CudaLpErrorArgs& lp = a.lp;
  const int64_t channel = blockIdx.x / a.chunks, begin = (blockIdx.x - channel * a.chunks) * a.chunk;
  const int64_t stop = begin + a.chunk < lp.length ? begin + a.chunk : lp.length;
  const int64_t k = int64_t(blockIdx.y) * blockDim.x + threadIdx.x;
  const bool real = k < lp.candidates;
  const int64_t at = channel * lp.candidates + k;
  const Grid<float> q{real ? __ldg(lp.scale + at) : 1.0f, real ? static_cast<float>(__ldg(lp.zero_point + at)) : 0.0f,
                      lp.qmin, lp.qmax};
  Exponent p = a.p;
  p.square = kSquare;
  const T* x = static_cast<const T*>(lp.x) + channel * lp.length;
  double total = 0;
  for (int64_t i = begin; i < stop; i += kLpTile) {
    const int n = static_cast<int>(stop - i < kLpTile ? stop - i : kLpTile);
    __syncthreads();
    for (int j = threadIdx.x; j < n; j += blockDim.x) tile[j] = widen(x[i + j]);
    __syncthreads();
    for (int j = 0; j < n;) {
      float sum = 0;
      const int end = n - j < kLpFlush ? n : j + static_cast<int>(kLpFlush);
      for (; j < end; ++j) sum = add(sum, lp_term(tile[j], q, p));
      total += sum;
    }
  }
  if (real) a.sums[blockIdx.x * lp.candidates + k] = total;
}

// The second stage: a thread for each channel's each grid.
__global__ void __launch_bounds__(kThreads) lp_error_finish_kernel(Args a) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.lp.channels * a.lp.candidates) return;
  const int64_t channel = i / a.lp.candidates, k = i - channel * a.lp.candidates;
  double total = 0;
  for (int64_t chunk = 0; chunk < a.chunks; ++chunk) {
    total += a.sums[(channel * a.chunks + chunk) * a.lp.candidates + k];
  }
  a.lp.error[i] = total;
}

template <class T>
void launch(const Args& a, cudaStream_t stream) {
  const int64_t errors = a.lp.channels * a.lp.candidates;
  if (a.chunks > 0) {
    const int64_t threads = std::min(kThreads, ceil_div(a.lp.candidates, kWarp) * kWarp);
    const dim3 grid(static_cast<unsigned>(a.lp.channels * a.chunks),
                    static_cast<unsigned>(ceil_div(a.lp.candidates, threads)));
    const auto kernel = a.p.square ? lp_error_kernel<T, true> : lp_error_kernel<T, false>;
    kernel<<<grid, static_cast<unsigned>(threads), 0, stream>>>(a);
  }
  if (a.chunks != 1) {
    lp_error_finish_kernel<<<static_cast<unsigned>(ceil_div(errors, kThreads)), kThreads, 0, stream>>>(a);
  }
}

}  // namespace

int64_t cuda_lp_error_workspace(const CudaLpErrorArgs& args) {
  const int64_t chunks = lp_chunks(args.length);
  return chunks == 1 ? 0 : args.channels * chunks * args.candidates * static_cast<int64_t>(sizeof(double));
}

cudaError_t cuda_lp_error(const CudaLpErrorArgs& args, cudaStream_t stream) {
  if (args.channels * args.candidates == 0) return cudaSuccess;
  const int64_t chunks = lp_chunks(args.length);
  const Args a{args, exponent_of(args.p), lp_chunk(args.length), chunks, chunks == 1 ? args.error : args.workspace};
  switch (args.dtype) {
    case DType::f32:
      launch<float>(a, stream);
      break;
    case DType::f16:
      launch<__half>(a, stream);
      break;
    case DType::bf16:
      launch<__nv_bfloat16>(a, stream);
      break;
    case DType::f64:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace zsq
