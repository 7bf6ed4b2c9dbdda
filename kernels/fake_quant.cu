// fake_quant and its backward: one thread takes 16 bytes, which is all a memory-bound kernel has to get right.
// Contract: zsq_ext/ops/reference/fake_quant.py; arithmetic: fake_quant.h.
#include "elementwise.cuh"

namespace zsq {
namespace {

// Enough warps per block to fill an SM with 8 blocks; no shared memory, so nothing else limits the choice.
constexpr int kThreads = 256;

template <class T, Channels kChannels, bool kBackward>
__global__ void __launch_bounds__(kThreads) fake_quant_kernel(CudaFakeQuantArgs a, bool aligned) {
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * Pack<T>::kSize;
  if (i < a.n) fake_quant_pack<T, kChannels, kBackward>(a, i, aligned);
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
  switch (meeting(a, Pack<T>::kSize)) {
    case Channels::kOne:
      return launch<T, Channels::kOne>(a, aligned, stream);
    case Channels::kEach:
      return launch<T, Channels::kEach>(a, aligned, stream);
    case Channels::kMixed:
      return launch<T, Channels::kMixed>(a, aligned, stream);
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
