// Min-max fake-quantization of many tensors in one launch: a channel is read for its extremes, and again, from a cache,
// to be quantized. Contract: zsq_ext/ops/reference/fake_quant_minmax.py; arithmetic: channel_range.h.
#include <algorithm>

#include "channel_range.h"
#include "fake_quant.cuh"
#include "pack.cuh"
#include "table.cuh"

namespace zsq {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
// Channels from here on keep a block busy: a pack of floats for each thread. Shorter ones are taken by a warp.
constexpr int64_t kLong = 1024;
// A kernel's parameters end at 4 KiB; all weights of a ResNet-50 are 54.
constexpr int kBatch = 60;

struct Record {
  MinMaxTensor t;
  int64_t first;  // of its channels among all
  int64_t block;  // its first
  bool wide;      // whole packs fit everywhere
};

struct Batch {
  Record records[kBatch];
  int count;
  float* scale;
  int32_t* zero_point;
  bool symmetric;
};

static_assert(sizeof(Batch) <= 4096, "more than a kernel's parameters may be");

__device__ Range<float> united_across(Range<float> range, int group) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    range = united(range, {__shfl_xor_sync(~0u, range.lo, step), __shfl_xor_sync(~0u, range.hi, step)});
  }
  if (group == kWarp) return range;
  __shared__ Range<float> warps[kThreads / kWarp];
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = range;
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kThreads / kWarp; ++k) range = united(range, warps[k]);
  return range;
}

// kGroup neighbouring threads take a channel.
template <class T, int kGroup>
__device__ void quantize_channel(const Batch& b, const Record& r, int64_t channel) {
  constexpr int kSize = Pack<T>::kSize;
  const int lane = threadIdx.x % kGroup;
  const int64_t n = r.t.length;
  const T* x = static_cast<const T*>(r.t.x) + channel * n;
  T* out = static_cast<T*>(r.t.out) + channel * n;

  Range<float> range = empty_range<float>();
  for (int64_t i = lane * kSize; i < n; i += kGroup * kSize) {
    Pack<T> v{};
    load(v, x, i, n, r.wide);
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      if (i + k < n) range = with(range, widen(v.v[k]));
    }
  }
  const Grid<float> q = grid_of_range(united_across(range, kGroup), static_cast<int>(r.t.bits), b.symmetric);
  if (lane == 0) {
    b.scale[r.first + channel] = q.scale;
    b.zero_point[r.first + channel] = static_cast<int32_t>(q.zero_point);
  }
  for (int64_t i = lane * kSize; i < n; i += kGroup * kSize) {
    Pack<T> v{}, quantized;
    load(v, x, i, n, r.wide);
#pragma unroll
    for (int k = 0; k < kSize; ++k) narrow(fake_quant(widen(v.v[k]), q), quantized.v[k]);
    store(quantized, out, i, n, r.wide);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) fake_quant_minmax_kernel(const __grid_constant__ Batch b) {
  const Record& r = record_at(b.records, b.count, blockIdx.x);
  const int64_t unit = blockIdx.x - r.block;
  if (r.t.length >= kLong) {
    quantize_channel<T, kThreads>(b, r, unit);
  } else {
    const int64_t channel = unit * (kThreads / kWarp) + threadIdx.x / kWarp;
    if (channel < r.t.channels) quantize_channel<T, kWarp>(b, r, channel);
  }
}

template <class T>
void launch(const CudaMinMaxArgs& a, cudaStream_t stream) {
  int64_t first = 0;
  for (int64_t begin = 0; begin < a.count; begin += kBatch) {
    Batch b{};
    b.count = static_cast<int>(std::min<int64_t>(kBatch, a.count - begin));
    b.scale = a.scale, b.zero_point = a.zero_point, b.symmetric = a.symmetric;
    int64_t blocks = 0;
    for (int k = 0; k < b.count; ++k) {
      const MinMaxTensor& t = a.tensors[begin + k];
      const bool wide = t.length % Pack<T>::kSize == 0 && aligned_for<Pack<T>>(t.x, t.out, t.out);
      b.records[k] = {t, first, blocks, wide};
      first += t.channels;
      constexpr int64_t kTogether = kThreads / kWarp;
      blocks += t.length >= kLong ? t.channels : (t.channels + kTogether - 1) / kTogether;
    }
    fake_quant_minmax_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(b);
  }
}

}  // namespace

cudaError_t cuda_fake_quant_minmax(const CudaMinMaxArgs& args, cudaStream_t stream) {
  switch (args.dtype) {
    case DType::f32:
      launch<float>(args, stream);
      break;
    case DType::f16:
      launch<__half>(args, stream);
      break;
    case DType::bf16:
      launch<__nv_bfloat16>(args, stream);
      break;
    case DType::f64:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace zsq
