// fake_quant and its backward: one thread takes 16 bytes, which is all a memory-bound kernel has to get right.
// Contract: zsq_ext/ops/reference/fake_quant.py; arithmetic: fake_quant.h.
#include "fake_quant.cuh"
#include "grid.cuh"
#include "pack.cuh"

namespace zsq {
namespace {

// Enough warps per block to fill an SM with 8 blocks; no shared memory, so nothing else limits the choice.
constexpr int kThreads = 256;

// How the elements of one pack meet the channels.
enum class Channels {
  kOne,    // all in one channel: per tensor, or inner is a multiple of the pack
  kEach,   // channels last, whole packs: element k is in channel c + k
  kMixed,  // anything else: counted element by element
};

template <class T, Channels kChannels, bool kBackward>
__global__ void __launch_bounds__(kThreads) fake_quant_kernel(CudaFakeQuantArgs a, bool aligned) {
  constexpr int kSize = Pack<T>::kSize;
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kSize;
  if (i >= a.n) return;

  Pack<T> x{}, grad{}, out;
  load(x, static_cast<const T*>(a.x), i, a.n, aligned);
  if (kBackward) load(grad, static_cast<const T*>(a.grad), i, a.n, aligned);

  Place at = a.channels == 1 ? Place{0, 0} : place(i, a);
  Grid<float> q = grid_of(a, at.channel);
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    if (k > 0 && kChannels == Channels::kEach) q = grid_of(a, at.channel + k);
    if (k > 0 && kChannels == Channels::kMixed) {
      if (++at.offset == a.inner) {
        at.offset = 0;
        if (++at.channel == a.channels) at.channel = 0;
        q = grid_of(a, at.channel);
      }
    }
    const float v = widen(x.v[k]);
    if (kBackward) {
      out.v[k] = inside(v, q) ? grad.v[k] : T(0.0f);
    } else {
      narrow(fake_quant(v, q), out.v[k]);
    }
  }
  store(out, static_cast<T*>(a.out), i, a.n, aligned);
}

template <class T, Channels kChannels>
void launch(const CudaFakeQuantArgs& a, bool aligned, cudaStream_t stream) {
  const int64_t per_block = int64_t{kThreads} * Pack<T>::kSize;
  const auto blocks = static_cast<unsigned>((a.n + per_block - 1) / per_block);
  if (a.grad) {
    fake_quant_kernel<T, kChannels, true><<<blocks, kThreads, 0, stream>>>(a, aligned);
  } else {
    fake_quant_kernel<T, kChannels, false><<<blocks, kThreads, 0, stream>>>(a, aligned);
  }
}

template <class T>
void launch(const CudaFakeQuantArgs& a, cudaStream_t stream) {
  const bool aligned = aligned_for<Pack<T>>(a.x, a.grad, a.out);
  if (a.channels == 1 || a.inner % Pack<T>::kSize == 0) {
    launch<T, Channels::kOne>(a, aligned, stream);
  } else if (a.inner == 1 && a.channels % Pack<T>::kSize == 0) {
    launch<T, Channels::kEach>(a, aligned, stream);
  } else {
    launch<T, Channels::kMixed>(a, aligned, stream);
  }
}

}  // namespace

cudaError_t cuda_fake_quant(const CudaFakeQuantArgs& args, cudaStream_t stream) {
  if (args.n == 0) return cudaSuccess;
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
