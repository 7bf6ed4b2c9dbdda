// What one thread reads or writes at once, and the 16-bit types' way to float and back.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace zsq {

// 16 bytes unless told otherwise, the widest load a thread can issue.
template <class T, int N = 16 / sizeof(T)>
struct alignas(sizeof(T) * N) Pack {
  static constexpr int kSize = N;
  T v[N];
};

__device__ inline float widen(float v) { return v; }
__device__ inline float widen(__half v) { return __half2float(v); }
__device__ inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

__device__ inline void narrow(float v, float& out) { out = v; }
__device__ inline void narrow(float v, __half& out) { out = __float2half_rn(v); }
__device__ inline void narrow(float v, __nv_bfloat16& out) { out = __float2bfloat16_rn(v); }

// Elements i, i + 1, ... of p. Whole packs in aligned memory are one load; what lies past the end is left as is.
template <class T, int N>
__device__ inline void load(Pack<T, N>& pack, const T* p, int64_t i, int64_t n, bool aligned) {
  if (aligned && i + N <= n) {
    pack = *reinterpret_cast<const Pack<T, N>*>(p + i);
    return;
  }
#pragma unroll
  for (int k = 0; k < N; ++k) {
    if (i + k < n) pack.v[k] = p[i + k];
  }
}

template <class T, int N>
__device__ inline void store(const Pack<T, N>& pack, T* p, int64_t i, int64_t n, bool aligned) {
  if (aligned && i + N <= n) {
    *reinterpret_cast<Pack<T, N>*>(p + i) = pack;
    return;
  }
#pragma unroll
  for (int k = 0; k < N; ++k) {
    if (i + k < n) p[i + k] = pack.v[k];
  }
}

// Whether all of these may be read and written in whole packs.
template <class P>
bool aligned_for(const void* a, const void* b, const void* c) {
  const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  return (address(a) | address(b) | address(c)) % alignof(P) == 0;
}

}  // namespace zsq
