// cam_map reads an activation once, its backward writes one once, count_active reads one once. No atomics, fixed
// orders. Contract: zsq_ext/ops/reference/heads.py.
#include "heads.cuh"
#include "pack.cuh"

namespace zsq {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
// cam_map where positions vary fastest: a block takes up to 64 packs of neighbouring positions of a sample, and all
// its channels, cut into as many slices as 1024 threads allow, at least 16. Threads of one slice after another read
// memory without a gap, since the next channel follows the last position.
constexpr int kTile = 64;
constexpr int kTileThreads = 1024;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ __forceinline__ float floored(float alpha, float floor) { return alpha < floor ? floor : alpha; }

__device__ __forceinline__ float relu(float s) { return s < 0.0f ? 0.0f : s; }

// One block to an SM is enough to say: told less, ptxas spills on sm_100 to make room for two.
template <class T, int kSize>
__global__ void __launch_bounds__(kTileThreads, 1) cam_map_tiles_kernel(CudaCamMapArgs a, int packs, int64_t tiles) {
  __shared__ float partial[kTileThreads * kSize];
  const int64_t sample = blockIdx.x / tiles, tile = blockIdx.x - sample * tiles;
  const int64_t begin = tile * packs * kSize;
  const int slices = kTileThreads / packs, slice = threadIdx.x / packs, lane = threadIdx.x - slice * packs;
  const int64_t p = begin + int64_t(lane) * kSize;
  float sum[kSize] = {};
  if (slice < slices && p < a.places) {
    const T* const x = static_cast<const T*>(a.activation) + sample * a.channels * a.places + p;
    const float* const alpha = a.alpha + sample * a.channels;
#pragma unroll 4
    for (int64_t k = slice; k < a.channels; k += slices) {
      Pack<T, kSize> v;
      load(v, x + k * a.places, 0, kSize, true);
      const float weight = floored(__ldg(alpha + k), a.floor);
#pragma unroll
      for (int j = 0; j < kSize; ++j) sum[j] = add(sum[j], mul(weight, widen(v.v[j])));
    }
  }
  const int width = packs * kSize;
  if (slice < slices) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) partial[slice * width + lane * kSize + j] = sum[j];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < width && begin + i < a.places; i += kTileThreads) {
    float total = 0.0f;
    for (int k = 0; k < slices; ++k) total = add(total, partial[k * width + i]);
    a.maps[sample * a.places + begin + i] = relu(total);
  }
}

// Channels last: a warp takes a position, and its lanes the channels.
template <class T, int kSize>
__global__ void __launch_bounds__(kThreads) cam_map_channels_kernel(CudaCamMapArgs a) {
  const int lane = threadIdx.x % kWarp;
  const int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  if (at >= a.samples * a.places) return;
  const T* const x = static_cast<const T*>(a.activation) + at * a.channels;
  const float* const alpha = a.alpha + at / a.places * a.channels;
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t k = int64_t(lane) * kSize; k < a.channels; k += kWarp * kSize) {
    Pack<T, kSize> v;
    load(v, x + k, 0, kSize, true);
#pragma unroll
    for (int j = 0; j < kSize; ++j) sum = add(sum, mul(floored(__ldg(alpha + k + j), a.floor), widen(v.v[j])));
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) sum = add(sum, __shfl_xor_sync(0xffffffff, sum, step));
  if (lane == 0) a.maps[at] = relu(sum);
}

// Where element i of an activation lies, and then its neighbours.
struct Place {
  int64_t sample, outer, inner;

  __device__ void next(int64_t outers, int64_t inners) {
    if (++inner < inners) return;
    inner = 0;
    if (++outer < outers) return;
    outer = 0;
    ++sample;
  }
};

__device__ __forceinline__ Place place(int64_t i, int64_t n, int64_t outers, int64_t inners) {
  if (n <= INT32_MAX) {  // a division of 32 bits takes a quarter of the instructions
    const uint32_t row = uint32_t(i) / uint32_t(inners), sample = row / uint32_t(outers);
    return {sample, row - sample * uint32_t(outers), uint32_t(i) - row * uint32_t(inners)};
  }
  const int64_t row = i / inners, sample = row / outers;
  return {sample, row - sample * outers, i - row * inners};
}

template <class T>
__global__ void __launch_bounds__(kThreads) cam_map_backward_kernel(CudaCamMapBackwardArgs a, bool aligned) {
  constexpr int kSize = Pack<T>::kSize;
  const int64_t n = a.samples * a.channels * a.places;
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kSize;
  if (i >= n) return;
  const int64_t outers = a.last ? a.places : a.channels, inners = a.last ? a.channels : a.places;
  Place at = place(i, n, outers, inners);
  Pack<T> out;
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    if (i + j >= n) break;
    const int64_t k = a.last ? at.inner : at.outer, p = at.sample * a.places + (a.last ? at.outer : at.inner);
    const float pull = __ldg(a.maps + p) <= 0.0f ? 0.0f : __ldg(a.grad + p);
    narrow(mul(floored(__ldg(a.alpha + at.sample * a.channels + k), a.floor), pull), out.v[j]);
    at.next(outers, inners);
  }
  store(out, static_cast<T*>(a.out), i, n, aligned);
}

__device__ __forceinline__ int active(float v, float upper) { return v > 0.0f && !(v >= upper); }

// A warp takes a channel of a sample, and its lanes the positions.
template <class T, int kSize>
__global__ void __launch_bounds__(kThreads) count_rows_kernel(CudaCountActiveArgs a) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  if (row >= a.samples * a.channels) return;
  const T* const x = static_cast<const T*>(a.x) + row * a.places;
  int count = 0;
  for (int64_t p = int64_t(lane) * kSize; p < a.places; p += kWarp * kSize) {
    Pack<T, kSize> v;
    load(v, x + p, 0, kSize, true);
#pragma unroll
    for (int j = 0; j < kSize; ++j) count += active(widen(v.v[j]), a.upper);
  }
  count = __reduce_add_sync(0xffffffff, count);
  if (lane == 0) a.count[row] = count;
}

// Channels last: a thread takes kSize channels, down all positions.
template <class T, int kSize>
__global__ void __launch_bounds__(kThreads) count_columns_kernel(CudaCountActiveArgs a) {
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kSize;
  if (i >= a.samples * a.channels) return;
  const int64_t sample = i / a.channels, k = i - sample * a.channels;
  const T* const x = static_cast<const T*>(a.x) + sample * a.places * a.channels + k;
  int count[kSize] = {};
#pragma unroll 4
  for (int64_t p = 0; p < a.places; ++p) {
    Pack<T, kSize> v;
    load(v, x + p * a.channels, 0, kSize, true);
#pragma unroll
    for (int j = 0; j < kSize; ++j) count[j] += active(widen(v.v[j]), a.upper);
  }
#pragma unroll
  for (int j = 0; j < kSize; ++j) a.count[i + j] = count[j];
}

unsigned blocks_of(int64_t threads) { return static_cast<unsigned>(ceil_div(threads, kThreads)); }

template <class T, int kSize>
void run(const CudaCamMapArgs& a, cudaStream_t stream) {
  if (a.last) {
    cam_map_channels_kernel<T, kSize><<<blocks_of(a.samples * a.places * kWarp), kThreads, 0, stream>>>(a);
    return;
  }
  const int packs = static_cast<int>(a.places / kSize < kTile ? a.places / kSize : kTile);
  const int64_t tiles = ceil_div(a.places, int64_t{packs} * kSize);
  cam_map_tiles_kernel<T, kSize>
      <<<static_cast<unsigned>(a.samples * tiles), kTileThreads, 0, stream>>>(a, packs, tiles);
}

template <class T, int kSize>
void run(const CudaCountActiveArgs& a, cudaStream_t stream) {
  if (a.last) {
    count_columns_kernel<T, kSize><<<blocks_of(a.samples * a.channels / kSize), kThreads, 0, stream>>>(a);
  } else {
    count_rows_kernel<T, kSize><<<blocks_of(a.samples * a.channels * kWarp), kThreads, 0, stream>>>(a);
  }
}

const void* memory(const CudaCamMapArgs& a) { return a.activation; }
const void* memory(const CudaCountActiveArgs& a) { return a.x; }

// In packs where what varies fastest is made of whole ones.
template <class T, class A>
void launch(const A& a, cudaStream_t stream) {
  constexpr int kSize = Pack<T>::kSize;
  const bool packed =
      (a.last ? a.channels : a.places) % kSize == 0 && aligned_for<Pack<T>>(memory(a), nullptr, nullptr);
  packed ? run<T, kSize>(a, stream) : run<T, 1>(a, stream);
}

template <class T>
void launch(const CudaCamMapBackwardArgs& a, cudaStream_t stream) {
  const int64_t packs = ceil_div(a.samples * a.channels * a.places, Pack<T>::kSize);
  const bool aligned = aligned_for<Pack<T>>(a.out, nullptr, nullptr);
  cam_map_backward_kernel<T><<<blocks_of(packs), kThreads, 0, stream>>>(a, aligned);
}

template <class A>
cudaError_t with_dtype(const A& a, cudaStream_t stream) {
  switch (a.dtype) {
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

}  // namespace

// Without channels a map is 0, and without positions a count is: the kernels then write it from an empty loop.
cudaError_t cuda_cam_map(const CudaCamMapArgs& args, cudaStream_t stream) {
  return args.samples * args.places == 0 ? cudaSuccess : with_dtype(args, stream);
}

cudaError_t cuda_cam_map_backward(const CudaCamMapBackwardArgs& args, cudaStream_t stream) {
  return args.samples * args.channels * args.places == 0 ? cudaSuccess : with_dtype(args, stream);
}

cudaError_t cuda_count_active(const CudaCountActiveArgs& args, cudaStream_t stream) {
  return args.samples * args.channels == 0 ? cudaSuccess : with_dtype(args, stream);
}

}  // namespace zsq
