// LSQ's gradient of one tensor. Contract: zsq_ext/ops/reference/fake_quant.py; arithmetic: fake_quant.h.
#include "lsq.cuh"

namespace zsq {
namespace {

template <class T, int kVec, int kGroup>
__global__ void __launch_bounds__(kThreads) fake_quant_lsq_rows_kernel(lsq::Args a) {
  lsq::rows<T, kVec, kGroup>(a, blockIdx.x);
}

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) fake_quant_lsq_columns_kernel(lsq::Args a) {
  lsq::columns<T, kVec>(a, blockIdx.x);
}

__global__ void __launch_bounds__(kThreads) fake_quant_lsq_finish_kernel(lsq::Args a) {
  lsq::second_stage(a, blockIdx.x);
}

template <class T, int kVec>
void launch(lsq::Args a, cudaStream_t stream) {
  a.aligned = aligned_for<Pack<T, kVec>>(a.fq.x, a.fq.grad, a.fq.out);
  const auto blocks = static_cast<unsigned>(lsq::blocks_of(a, kVec));
  if (a.plan.columns) {
    fake_quant_lsq_columns_kernel<T, kVec><<<blocks, kThreads, 0, stream>>>(a);
  } else if (a.fq.inner < kShortRow) {
    fake_quant_lsq_rows_kernel<T, kVec, kShortGroup><<<blocks, kThreads, 0, stream>>>(a);
  } else {
    fake_quant_lsq_rows_kernel<T, kVec, kThreads><<<blocks, kThreads, 0, stream>>>(a);
  }
  if (a.plan.parts > 1) {
    fake_quant_lsq_finish_kernel<<<static_cast<unsigned>(a.fq.channels), kThreads, 0, stream>>>(a);
  }
}

template <class T>
void launch(const lsq::Args& a, cudaStream_t stream) {
  if (a.plan.wide) {
    launch<T, Pack<T>::kSize>(a, stream);
  } else {
    launch<T, 1>(a, stream);
  }
}

}  // namespace

int64_t cuda_fake_quant_lsq_workspace(const CudaFakeQuantLsqArgs& args) {
  const CudaFakeQuantArgs& f = args.fq;
  if (f.n == 0) return 0;
  return lsq::partial_bytes(f.channels, plan_of(f.n, f.channels, f.inner, f.dtype));
}

cudaError_t cuda_fake_quant_lsq_backward(const CudaFakeQuantLsqArgs& args, cudaStream_t stream) {
  const CudaFakeQuantArgs& f = args.fq;
  if (f.n == 0) return cudaSuccess;
  const Plan plan = plan_of(f.n, f.channels, f.inner, f.dtype);
  const lsq::Args a{f, plan, args.dscale, args.dzero_point, static_cast<lsq::Sums*>(args.workspace), false};
  switch (f.dtype) {
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
