// The extremes of channels, in two stages: a part of a channel each, then all parts. Nothing rounds, so any order gives
// the same bits. Contract: zsq_ext/ops/reference/channel_range.py.
#include "channel_range.cuh"

#include "channel_range.h"
#include "pack.cuh"
#include "parts.cuh"

namespace zsq {
namespace {

using Ends = Range<float>;

struct Args {
  CudaChannelRangeArgs range;
  Plan plan;
  bool aligned;
};

__device__ void finish(const Args& a, int64_t channel, const Ends& ends) {
  const Ends out = reported(ends);
  a.range.lo[channel] = out.lo;
  a.range.hi[channel] = out.hi;
}

__device__ Ends* partial(const Args& a) { return static_cast<Ends*>(a.range.workspace); }  // [channels, parts]

__device__ void put(const Args& a, int64_t channel, int64_t part, const Ends& ends) {
  if (a.plan.parts == 1) {
    finish(a, channel, ends);
  } else {
    partial(a)[channel * a.plan.parts + part] = ends;
  }
}

// kGroup neighbouring threads take one stretch of a row: a part of one channel.
template <class T, int kVec, int kGroup>
__global__ void __launch_bounds__(kThreads) channel_range_rows_kernel(Args a) {
  const CudaChannelRangeArgs& r = a.range;
  const int64_t unit = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / kGroup;
  const int lane = threadIdx.x % kGroup;
  const int64_t row = unit / a.plan.chunks, chunk = unit - row * a.plan.chunks;
  Ends ends = empty_range<float>();
  if (row < a.plan.rows) {
    const T* x = static_cast<const T*>(r.x) + row * r.inner;
    const int64_t begin = chunk * a.plan.chunk;
    const int64_t end = begin + a.plan.chunk < r.inner ? begin + a.plan.chunk : r.inner;
    for (int64_t i = begin + lane * kVec; i < end; i += kGroup * kVec) {
      Pack<T, kVec> v{};
      load(v, x, i, end, a.aligned);
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        if (i + j < end) ends = with(ends, widen(v.v[j]));
      }
    }
  }
  if (kGroup == kThreads) {
    ends = across_block(ends, 1);
  } else {
#pragma unroll
    for (int half = kGroup / 2; half > 0; half /= 2) {
      ends = ends + Ends{__shfl_down_sync(~0u, ends.lo, half, kGroup), __shfl_down_sync(~0u, ends.hi, half, kGroup)};
    }
  }
  if (lane == 0 && row < a.plan.rows) put(a, row % r.channels, row / r.channels * a.plan.chunks + chunk, ends);
}

// A block takes `width` packs of channels side by side, of `chunk` rows; each thread every (kThreads / width)-th row.
template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) channel_range_columns_kernel(Args a) {
  const CudaChannelRangeArgs& r = a.range;
  const int width = a.plan.width;
  const int64_t tile = blockIdx.x / a.plan.chunks, chunk = blockIdx.x - tile * a.plan.chunks;
  const int64_t c = (tile * width + threadIdx.x % width) * kVec;
  Ends ends[kVec];
#pragma unroll
  for (int j = 0; j < kVec; ++j) ends[j] = empty_range<float>();
  if (c < r.channels) {
    const int64_t begin = chunk * a.plan.chunk;
    const int64_t end = begin + a.plan.chunk < a.plan.rows ? begin + a.plan.chunk : a.plan.rows;
    for (int64_t row = begin + threadIdx.x / width; row < end; row += kThreads / width) {
      Pack<T, kVec> v{};
      load(v, static_cast<const T*>(r.x), row * r.channels + c, r.n, a.aligned);
#pragma unroll
      for (int j = 0; j < kVec; ++j) ends[j] = with(ends[j], widen(v.v[j]));
    }
  }
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    const Ends all = across_block(ends[j], width);
    if (threadIdx.x < width && c < r.channels) put(a, c + j, chunk, all);
  }
}

// The second stage: a block per channel.
__global__ void __launch_bounds__(kThreads) channel_range_finish_kernel(Args a) {
  const int64_t channel = blockIdx.x;
  Ends ends = empty_range<float>();
  for (int64_t part = threadIdx.x; part < a.plan.parts; part += kThreads) {
    ends = ends + partial(a)[channel * a.plan.parts + part];
  }
  ends = across_block(ends, 1);
  if (threadIdx.x == 0) finish(a, channel, ends);
}

template <class T, int kVec>
void launch(Args a, cudaStream_t stream) {
  const Plan& p = a.plan;
  const CudaChannelRangeArgs& r = a.range;
  a.aligned = aligned_for<Pack<T, kVec>>(r.x, r.x, r.x);
  const auto grid = [](int64_t blocks) { return static_cast<unsigned>(blocks); };
  if (p.columns) {
    const int64_t tiles = ceil_div(r.channels, int64_t{p.width} * kVec);
    channel_range_columns_kernel<T, kVec><<<grid(tiles * p.chunks), kThreads, 0, stream>>>(a);
  } else if (r.inner < kShortRow) {
    const int64_t blocks = ceil_div(p.rows, kThreads / kShortGroup);
    channel_range_rows_kernel<T, kVec, kShortGroup><<<grid(blocks), kThreads, 0, stream>>>(a);
  } else {
    channel_range_rows_kernel<T, kVec, kThreads><<<grid(p.rows * p.chunks), kThreads, 0, stream>>>(a);
  }
  if (p.parts > 1) channel_range_finish_kernel<<<grid(r.channels), kThreads, 0, stream>>>(a);
}

template <class T>
void launch(const Args& a, cudaStream_t stream) {
  if (a.plan.wide) {
    launch<T, Pack<T>::kSize>(a, stream);
  } else {
    launch<T, 1>(a, stream);
  }
}

Plan plan_of(const CudaChannelRangeArgs& r) { return plan_of(r.n, r.channels, r.inner, r.dtype); }

}  // namespace

int64_t cuda_channel_range_workspace(const CudaChannelRangeArgs& args) {
  const int64_t parts = plan_of(args).parts;
  return parts == 1 ? 0 : args.channels * parts * static_cast<int64_t>(sizeof(Ends));
}

cudaError_t cuda_channel_range(const CudaChannelRangeArgs& args, cudaStream_t stream) {
  const Args a{args, plan_of(args), false};
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
