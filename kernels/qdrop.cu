// qdrop and its backward. A draw is some 50 integer instructions for 4 elements, so threads are given their elements in
// fours that share one. Contract: zsq_ext/ops/reference/qdrop.py; generator: philox.h.
#include "qdrop.cuh"
#include "pack.cuh"

namespace zsq {
namespace {

constexpr int kThreads = 256;

__device__ QDropKey key_of(const CudaQDropArgs& a) {
  return {static_cast<uint64_t>(__ldg(a.key)), static_cast<uint64_t>(__ldg(a.key + 1))};
}

// Elements i, i + 1, ... in memory; `keep` has a bit for each. U has the size of an element.
template <class U, int N>
__device__ void put(const CudaQDropArgs& a, int64_t i, int64_t n, uint32_t keep, bool aligned) {
  Pack<U, N> x{}, x_hat{}, out, rest;
  load(x, static_cast<const U*>(a.x), i, n, aligned);
  if (a.x_hat) load(x_hat, static_cast<const U*>(a.x_hat), i, n, aligned);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const bool kept = keep >> k & 1;
    out.v[k] = kept ? x.v[k] : x_hat.v[k];
    rest.v[k] = kept ? x_hat.v[k] : x.v[k];
  }
  if (a.out) store(out, static_cast<U*>(a.out), i, n, aligned);
  if (a.rest) store(rest, static_cast<U*>(a.rest), i, n, aligned);
}

// Neighbours in memory and in logical order: a thread takes 16 bytes, which are one four or two.
template <class U>
__global__ void __launch_bounds__(kThreads) qdrop_flat_kernel(CudaQDropArgs a, int64_t n, bool aligned) {
  constexpr int kSize = Pack<U>::kSize;
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kSize;
  if (i >= n) return;
  const QDropKey key = key_of(a);
  uint32_t keep = 0;
#pragma unroll
  for (int k = 0; k < kSize; k += 4) {
    const Words w = draws(static_cast<uint64_t>(i + k) / 4, key);
#pragma unroll
    for (int j = 0; j < 4; ++j) keep |= uint32_t{keeps(w.word[j], a.threshold)} << (k + j);
  }
  put<U, kSize>(a, i, n, keep, aligned);
}

// Channels last: a thread takes kVec channels side by side, of kPlaces places that share draws.
template <class U, int kVec, int kPlaces>
__global__ void __launch_bounds__(kThreads) qdrop_last_kernel(CudaQDropArgs a, bool aligned) {
  const QDropShape& s = a.shape;
  const int64_t columns = s.channels / kVec, groups = s.places / kPlaces;
  const int64_t t = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (t >= s.samples * groups * columns) return;
  const int64_t row = t / columns, c = (t - row * columns) * kVec;
  const int64_t sample = row / groups, p = (row - sample * groups) * kPlaces;
  const QDropKey key = key_of(a);
  uint32_t keep[kPlaces]{};
#pragma unroll
  for (int k = 0; k < kVec; ++k) {
    const int64_t logical = (sample * s.channels + c + k) * s.places + p;
    const Words w = draws(static_cast<uint64_t>(logical) / 4, key);
#pragma unroll
    for (int j = 0; j < kPlaces; ++j) {
      const int64_t which = (logical + j) % 4;
      const uint32_t word = kPlaces == 4 ? w.word[j]
                            : which == 0 ? w.word[0]
                            : which == 1 ? w.word[1]
                            : which == 2 ? w.word[2]
                                         : w.word[3];
      keep[j] |= uint32_t{keeps(word, a.threshold)} << k;
    }
  }
#pragma unroll
  for (int j = 0; j < kPlaces; ++j) {
    const int64_t i = (sample * s.places + p + j) * s.channels + c;
    put<U, kVec>(a, i, i + kVec, keep[j], aligned);
  }
}

unsigned blocks_for(int64_t threads) { return static_cast<unsigned>((threads + kThreads - 1) / kThreads); }

template <class U, int kVec, int kPlaces>
void launch_last(const CudaQDropArgs& a, bool aligned, cudaStream_t stream) {
  const int64_t threads = a.shape.samples * (a.shape.places / kPlaces) * (a.shape.channels / kVec);
  qdrop_last_kernel<U, kVec, kPlaces><<<blocks_for(threads), kThreads, 0, stream>>>(a, aligned);
}

template <class U>
void launch(const CudaQDropArgs& a, cudaStream_t stream) {
  constexpr int kSize = Pack<U>::kSize;
  const QDropShape& s = a.shape;
  const int64_t n = s.samples * s.channels * s.places;
  const bool aligned = aligned_for<Pack<U>>(a.x, a.x_hat, a.out) && aligned_for<Pack<U>>(a.rest, nullptr, nullptr);
  if (!s.last) {
    qdrop_flat_kernel<U><<<blocks_for((n + kSize - 1) / kSize), kThreads, 0, stream>>>(a, n, aligned);
  } else if (s.places % 4 == 0 && s.channels % kSize == 0) {
    launch_last<U, kSize, 4>(a, aligned, stream);
  } else if (s.places % 4 == 0) {
    launch_last<U, 1, 4>(a, aligned, stream);
  } else {
    launch_last<U, 1, 1>(a, aligned, stream);
  }
}

}  // namespace

cudaError_t cuda_qdrop(const CudaQDropArgs& args, cudaStream_t stream) {
  if (args.shape.samples * args.shape.channels * args.shape.places == 0) return cudaSuccess;
  switch (args.size) {
    case 2:
      launch<uint16_t>(args, stream);
      break;
    case 4:
      launch<uint32_t>(args, stream);
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace zsq
