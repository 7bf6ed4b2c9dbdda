// To codes and back: one thread takes 16 bytes of values, and as many codes.
// Contract: zsq_ext/ops/reference/fake_quant.py; arithmetic: fake_quant.h.
#include "fake_quant.cuh"
#include "grid.cuh"
#include "pack.cuh"

namespace zsq {
namespace {

constexpr int kThreads = 256;

template <class Code, int N>
__device__ void read_codes(float (&v)[N], const CudaFakeQuantArgs& a, int64_t i, bool aligned) {
  Pack<Code, N> codes{};
  load(codes, static_cast<const Code*>(a.x), i, a.n, aligned);
#pragma unroll
  for (int k = 0; k < N; ++k) v[k] = static_cast<float>(codes.v[k]);
}

template <class Code, int N>
__device__ void write_codes(const float (&v)[N], const CudaFakeQuantArgs& a, int64_t i, bool aligned) {
  Pack<Code, N> codes;
#pragma unroll
  for (int k = 0; k < N; ++k) codes.v[k] = static_cast<Code>(static_cast<int>(v[k]));
  store(codes, static_cast<Code*>(a.out), i, a.n, aligned);
}

// kMixed: a pack may meet several channels. What a code is stored as is one branch per thread, the same for all.
template <class T, bool kMixed, bool kBack>
__global__ void __launch_bounds__(kThreads) fake_quant_codes_kernel(CudaFakeQuantArgs a, CodeType code, bool aligned) {
  constexpr int kSize = Pack<T>::kSize;
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kSize;
  if (i >= a.n) return;

  float v[kSize];
  if (!kBack) {
    Pack<T> x{};
    load(x, static_cast<const T*>(a.x), i, a.n, aligned);
#pragma unroll
    for (int k = 0; k < kSize; ++k) v[k] = widen(x.v[k]);
  } else if (code == CodeType::i8) {
    read_codes<int8_t>(v, a, i, aligned);
  } else if (code == CodeType::u8) {
    read_codes<uint8_t>(v, a, i, aligned);
  } else {
    read_codes<int32_t>(v, a, i, aligned);
  }

  Place at = a.channels == 1 ? Place{0, 0} : place(i, a);
  Grid<float> q = grid_of(a, at.channel);
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    if (k > 0 && kMixed) {
      if (++at.offset == a.inner) {
        at.offset = 0;
        if (++at.channel == a.channels) at.channel = 0;
        q = grid_of(a, at.channel);
      }
    }
    v[k] = kBack ? value_of(v[k], q) : code_of(v[k], q);
  }

  if (kBack) {
    Pack<T> out;
#pragma unroll
    for (int k = 0; k < kSize; ++k) narrow(v[k], out.v[k]);
    store(out, static_cast<T*>(a.out), i, a.n, aligned);
  } else if (code == CodeType::i8) {
    write_codes<int8_t>(v, a, i, aligned);
  } else if (code == CodeType::u8) {
    write_codes<uint8_t>(v, a, i, aligned);
  } else {
    write_codes<int32_t>(v, a, i, aligned);
  }
}

template <class T, bool kMixed>
void launch(const CudaCodesArgs& args, cudaStream_t stream) {
  const CudaFakeQuantArgs& a = args.fq;
  constexpr int kSize = Pack<T>::kSize;
  const void *values = args.back ? a.out : a.x, *codes = args.back ? a.x : a.out;
  const auto fits = [&](auto pack) { return aligned_for<decltype(pack)>(codes, codes, codes); };
  const bool aligned = aligned_for<Pack<T>>(values, values, values) &&
                       (args.code == CodeType::i32 ? fits(Pack<int32_t, kSize>{}) : fits(Pack<int8_t, kSize>{}));
  const int64_t per_block = int64_t{kThreads} * kSize;
  const auto blocks = static_cast<unsigned>((a.n + per_block - 1) / per_block);
  if (args.back) {
    fake_quant_codes_kernel<T, kMixed, true><<<blocks, kThreads, 0, stream>>>(a, args.code, aligned);
  } else {
    fake_quant_codes_kernel<T, kMixed, false><<<blocks, kThreads, 0, stream>>>(a, args.code, aligned);
  }
}

template <class T>
void launch(const CudaCodesArgs& args, cudaStream_t stream) {
  if (args.fq.channels == 1 || args.fq.inner % Pack<T>::kSize == 0) {
    launch<T, false>(args, stream);
  } else {
    launch<T, true>(args, stream);
  }
}

}  // namespace

cudaError_t cuda_fake_quant_codes(const CudaCodesArgs& args, cudaStream_t stream) {
  if (args.fq.n == 0) return cudaSuccess;
  switch (args.fq.dtype) {
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
