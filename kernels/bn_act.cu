// bn_act and its backward: every element is read once, and a thread takes 8 neighbours, which share a byte of the mask.
// Contract: zsq_ext/ops/reference/bn_act.py; arithmetic: bn_act.h.
//
//   channels last   rows of channels; a thread walks 8 channels down the rows of a chunk, and has their sums in
//                   registers at its end
//   else            rows of places, one channel each; a warp takes a piece of a row, and its lanes add up
//
// Either leaves one partial sum per chunk and channel; a second kernel adds them in a fixed order. No atomics. The ends
// of the values take the same way.
#include "bn_act.cuh"

#include <initializer_list>

#include "bn_act_eight.cuh"

namespace zsq {
namespace {

// Registers let an SM hold 2 to 4 such blocks.
constexpr int kThreads = 256;
constexpr int kWarp = 32;
// A warp's piece of a row: 4 times 8 elements for each lane, so that the channel's square root and division are felt
// little, and a map of 56 x 56 still makes 4 warps.
constexpr int64_t kPiece = 4 * kWarp * kEight;
// A thread's rows where channels are last: long enough that partial sums are 3 % of what u and y move in float.
constexpr int64_t kRows = 32;
// The second stage: 32 channels side by side, each of them added up by 32 threads.
constexpr int kAdders = 32;

__device__ __forceinline__ bool wants_sums(const CudaBnActArgs& a) { return a.s1; }
__device__ __forceinline__ bool wants_sums(const CudaBnActBackwardArgs& a) { return a.dgamma; }

// A warp takes a piece of a row: places of one channel of one sample.
template <class T, class A, bool kQuant, bool kEnds>
__global__ void __launch_bounds__(kThreads, kQuant ? 1 : 3) bn_act_rows_kernel(A a, bool packed, int64_t pieces) {
  const BnActShape& s = a.shape;
  const int lane = threadIdx.x % kWarp;
  const int64_t task = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  const int64_t row = task / pieces, piece = task - row * pieces;
  const int64_t sample = row / s.channels, channel = row - sample * s.channels;
  if (sample >= s.samples) return;
  Channels<false> c;
  c.read(a, channel, 1);
  read_loss(a, c, (s.per_sample ? row : channel), 1);
  const int64_t bytes = ceil_div(s.places, kEight), end = min(s.places, (piece + 1) * kPiece);
  for (int64_t at = piece * kPiece + lane * kEight; at < end; at += kWarp * kEight) {
    const int n = static_cast<int>(min(end - at, int64_t{kEight}));
    eight<T, false, kQuant, kEnds>(a, c, channel, row * s.places + at, row * bytes + at / kEight, n, packed);
  }
  float* partials = a.workspace + (sample * pieces + piece) * s.channels + channel;
  const int64_t plane = s.samples * pieces * s.channels;
  if (wants_sums(a)) {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      c.first[0] += __shfl_xor_sync(0xffffffff, c.first[0], step);
      c.second[0] += __shfl_xor_sync(0xffffffff, c.second[0], step);
    }
    if (lane == 0) partials[0] = c.first[0], partials[plane] = c.second[0];
    partials += 2 * plane;
  }
  if (kEnds) {
    Range<float> ends = c.ends[0];
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      ends =
          ends + Range<float>{__shfl_xor_sync(0xffffffff, ends.lo, step), __shfl_xor_sync(0xffffffff, ends.hi, step)};
    }
    if (lane == 0) partials[0] = as_stored<T>(ends.lo), partials[plane] = as_stored<T>(ends.hi);
  }
}

// A thread takes 8 channels of a chunk of rows; a row is all channels of one place. Two blocks a multiprocessor are
// what its registers allow: asked for more, the compiler spills. With a quantizer, whose divisions are long, it is one.
template <class T, class A, bool kQuant, bool kEnds>
__global__ void __launch_bounds__(kThreads, kQuant ? 1 : 2)
    bn_act_columns_kernel(A a, bool packed, int64_t groups, int64_t count) {
  const BnActShape& s = a.shape;
  const int64_t octets = ceil_div(s.channels, kEight), chunks = ceil_div(count, kRows);
  const int64_t task = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t chunk = task / octets, octet = task - chunk * octets;
  const int64_t group = chunk / chunks, begin = (chunk - group * chunks) * kRows;
  if (group >= groups) return;
  const int64_t channel = octet * kEight;
  const int n = static_cast<int>(min(s.channels - channel, int64_t{kEight}));
  Channels<true> c;
  c.read(a, channel, n);
  read_loss(a, c, group * s.channels + channel, n);
  const int64_t end = min(begin + kRows, count);
  for (int64_t r = group * count + begin; r < group * count + end; ++r) {
    eight<T, true, kQuant, kEnds>(a, c, channel, r * s.channels + channel, r * octets + octet, n, packed);
  }
  float* partials = a.workspace + chunk * s.channels + channel;
  const int64_t plane = groups * chunks * s.channels;
  if (wants_sums(a)) {
#pragma unroll
    for (int k = 0; k < kEight; ++k) {
      if (k < n) partials[k] = c.first[k], partials[plane + k] = c.second[k];
    }
    partials += 2 * plane;
  }
  if (kEnds) {
#pragma unroll
    for (int k = 0; k < kEight; ++k) {
      if (k < n) partials[k] = as_stored<T>(c.ends[k].lo), partials[plane + k] = as_stored<T>(c.ends[k].hi);
    }
  }
}

// The second stage. Adder y of a channel takes every 32nd chunk, and the first adder the sums of all, in order.
__global__ void __launch_bounds__(kWarp* kAdders)
    bn_act_add_up_kernel(const float* partials, float* first, float* second, int64_t chunks, int64_t groups,
                         int64_t channels, const float* var, float eps) {
  __shared__ double sums[kAdders][kWarp];
  const int64_t wide = ceil_div(channels, kWarp);
  const int64_t group = blockIdx.x / wide, channel = (blockIdx.x - group * wide) * kWarp + threadIdx.x;
  const bool is_first = blockIdx.y == 0;
  const float* p = partials + ((is_first ? 0 : groups) + group) * chunks * channels + channel;
  double sum = 0;
  if (channel < channels) {
#pragma unroll 4
    for (int64_t k = threadIdx.y; k < chunks; k += kAdders) sum += double(p[k * channels]);
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || channel >= channels) return;
  for (int k = 1; k < kAdders; ++k) sum += sums[k][threadIdx.x];
  float out = float(sum);
  if (!is_first && var) out = mul(out, inverse_deviation(var[channel], eps));
  (is_first ? first : second)[group * channels + channel] = out;
}

// The second stage of the ends, cut as that of the sums; the smallest values come first.
__global__ void __launch_bounds__(kWarp* kAdders)
    bn_act_unite_kernel(const float* partials, float* ends, int64_t chunks, int64_t channels) {
  __shared__ Range<float> ranges[kAdders][kWarp];
  const int64_t channel = int64_t(blockIdx.x) * kWarp + threadIdx.x, plane = chunks * channels;
  Range<float> range = empty_range<float>();
  if (channel < channels) {
#pragma unroll 4
    for (int64_t k = threadIdx.y; k < chunks; k += kAdders) {
      const float* p = partials + k * channels + channel;
      range = range + Range<float>{p[0], p[plane]};
    }
  }
  ranges[threadIdx.y][threadIdx.x] = range;
  __syncthreads();
  if (threadIdx.y != 0 || channel >= channels) return;
  for (int k = 1; k < kAdders; ++k) range = range + ranges[k][threadIdx.x];
  range = reported(range);
  ends[channel] = range.lo, ends[channels + channel] = range.hi;
}

int64_t groups_of(const BnActShape& s) { return s.per_sample ? s.samples : 1; }

// Rows of a group where channels are last.
int64_t count_of(const BnActShape& s) { return s.per_sample ? s.places : s.samples * s.places; }

// How many partial sums a channel leaves behind.
int64_t chunks_of(const BnActShape& s) {
  return s.last ? groups_of(s) * ceil_div(count_of(s), kRows) : s.samples * ceil_div(s.places, kPiece);
}

// [2][chunks][channels] partial sums, or smallest and largest values.
int64_t partials_of(const BnActShape& s) { return 2 * chunks_of(s) * s.channels; }

// first and second get the sums of the chunks; where var is given, second is a sum still to be divided by the
// deviation.
void add_up(const BnActShape& s, int64_t groups, const float* partials, float* first, float* second, const float* var,
            float eps, cudaStream_t stream) {
  const int64_t blocks = groups * ceil_div(s.channels, kWarp);
  if (blocks == 0) return;
  bn_act_add_up_kernel<<<dim3(static_cast<unsigned>(blocks), 2), dim3(kWarp, kAdders), 0, stream>>>(
      partials, first, second, chunks_of(s) / groups, groups, s.channels, var, eps);
}

void unite(const BnActShape& s, const float* partials, float* ends, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(ceil_div(s.channels, kWarp));
  bn_act_unite_kernel<<<blocks, dim3(kWarp, kAdders), 0, stream>>>(partials, ends, chunks_of(s), s.channels);
}

bool all_aligned(std::initializer_list<const void*> pointers) {
  uintptr_t bits = 0;
  for (const void* p : pointers) bits |= reinterpret_cast<uintptr_t>(p);
  return bits % 16 == 0;
}

// Whether a pass meets the quantizer: the backward only where it clips and left no mask.
bool quantizes(const CudaBnActArgs& a) { return a.quant.scale; }
bool quantizes(const CudaBnActBackwardArgs& a) { return a.quant.scale && a.quant.clip && !a.mask; }

template <class T, bool kQuant, bool kEnds, class A>
void launch(const A& a, bool aligned, cudaStream_t stream) {
  const BnActShape& s = a.shape;
  if (s.samples * s.channels * s.places == 0) return;
  const bool packed = aligned && (s.last ? s.channels : s.places) % Pack<T>::kSize == 0;
  if (s.last) {
    const int64_t tasks = chunks_of(s) * ceil_div(s.channels, kEight);
    bn_act_columns_kernel<T, A, kQuant, kEnds>
        <<<static_cast<unsigned>(ceil_div(tasks, kThreads)), kThreads, 0, stream>>>(a, packed, groups_of(s),
                                                                                    count_of(s));
  } else {
    const int64_t pieces = ceil_div(s.places, kPiece), warps = s.samples * s.channels * pieces;
    bn_act_rows_kernel<T, A, kQuant, kEnds>
        <<<static_cast<unsigned>(ceil_div(warps, kThreads / kWarp)), kThreads, 0, stream>>>(a, packed, pieces);
  }
}

template <class T, bool kEnds, class A>
void launch(const A& a, bool aligned, cudaStream_t stream) {
  quantizes(a) ? launch<T, true, kEnds>(a, aligned, stream) : launch<T, false, kEnds>(a, aligned, stream);
}

template <class T>
void launch(const CudaBnActArgs& a, bool aligned, cudaStream_t stream) {
  a.ends ? launch<T, true>(a, aligned, stream) : launch<T, false>(a, aligned, stream);
}

template <class T>
void launch(const CudaBnActBackwardArgs& a, bool aligned, cudaStream_t stream) {
  launch<T, false>(a, aligned, stream);
}

template <class A>
cudaError_t with_dtype(const A& a, bool aligned, cudaStream_t stream) {
  switch (a.dtype) {
    case DType::f32:
      launch<float>(a, aligned, stream);
      break;
    case DType::f16:
      launch<__half>(a, aligned, stream);
      break;
    case DType::bf16:
      launch<__nv_bfloat16>(a, aligned, stream);
      break;
    case DType::f64:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace

int64_t cuda_bn_act_workspace(const CudaBnActArgs& a) {
  return (int(a.s1 != nullptr) + int(a.ends != nullptr)) * partials_of(a.shape) * static_cast<int64_t>(sizeof(float));
}

int64_t cuda_bn_act_backward_workspace(const CudaBnActBackwardArgs& a) {
  return a.dgamma ? partials_of(a.shape) * static_cast<int64_t>(sizeof(float)) : 0;
}

cudaError_t cuda_bn_act(const CudaBnActArgs& a, cudaStream_t stream) {
  const cudaError_t error = with_dtype(a, all_aligned({a.u, a.residual, a.y}), stream);
  if (error != cudaSuccess) return error;
  if (a.s1) add_up(a.shape, groups_of(a.shape), a.workspace, a.s1, a.s2, nullptr, 0.0f, stream);
  if (a.ends) unite(a.shape, a.workspace + (a.s1 ? partials_of(a.shape) : 0), a.ends, stream);
  return cudaGetLastError();
}

cudaError_t cuda_bn_act_backward(const CudaBnActBackwardArgs& a, cudaStream_t stream) {
  const cudaError_t error = with_dtype(a, all_aligned({a.u, a.grad, a.residual, a.du, a.dr}), stream);
  if (error != cudaSuccess || !a.dgamma) return error;
  add_up(a.shape, 1, a.workspace, a.dbeta, a.dgamma, static_cast<const float*>(a.norm.var),
         static_cast<float>(a.norm.eps), stream);
  return cudaGetLastError();
}

}  // namespace zsq
