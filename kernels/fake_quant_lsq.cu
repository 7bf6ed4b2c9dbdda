// LSQ's gradient in one pass over grad and x: dx on the way, and per channel two sums in two stages. What is summed,
// and in which order, depends on sizes and dtype alone; there are no atomics.
// Contract: zsq_ext/ops/reference/fake_quant.py; arithmetic: fake_quant.h.
#include "fake_quant.cuh"
#include "grid.cuh"
#include "pack.cuh"
#include "parts.cuh"

namespace zsq {
namespace {

// Additions in float before a thread goes on in double.
constexpr int kFlush = 32;

struct Sums {
  double step, clip;
};

__device__ Sums operator+(const Sums& a, const Sums& b) { return {a.step + b.step, a.clip + b.clip}; }

struct Args {
  CudaFakeQuantArgs fq;
  Plan plan;
  float* dscale;
  float* dzero_point;
  Sums* partial;  // [channels, parts]; not used where there is one part
  bool aligned;
};

__device__ void finish(const Args& a, int64_t channel, const Sums& sums) {
  a.dscale[channel] = static_cast<float>(sums.step);
  a.dzero_point[channel] = static_cast<float>(a.fq.scale[channel] * sums.clip);
}

__device__ void put(const Args& a, int64_t channel, int64_t part, const Sums& sums) {
  if (a.plan.parts == 1) {
    finish(a, channel, sums);
  } else {
    a.partial[channel * a.plan.parts + part] = sums;
  }
}

template <class T>
__device__ LsqTerms<float> one(T x, T grad, T& dx, const Grid<float>& q) {
  const LsqTerms<float> terms = lsq_terms(widen(x), widen(grad), q);
  dx = terms.inside ? grad : T(0.0f);
  return terms;
}

// kGroup neighbouring threads take one stretch of a row: a part of one channel.
template <class T, int kVec, int kGroup>
__global__ void __launch_bounds__(kThreads) fake_quant_lsq_rows_kernel(Args a) {
  const CudaFakeQuantArgs& f = a.fq;
  const int64_t unit = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / kGroup;
  const int lane = threadIdx.x % kGroup;
  const int64_t row = unit / a.plan.chunks, chunk = unit - row * a.plan.chunks;
  const int64_t channel = row % f.channels;
  Sums sums{};
  if (row < a.plan.rows) {
    const Grid<float> q = grid_of(f, channel);
    const T* x = static_cast<const T*>(f.x) + row * f.inner;
    const T* grad = static_cast<const T*>(f.grad) + row * f.inner;
    T* dx = static_cast<T*>(f.out) + row * f.inner;
    const int64_t begin = chunk * a.plan.chunk;
    const int64_t end = begin + a.plan.chunk < f.inner ? begin + a.plan.chunk : f.inner;
    for (int64_t i = begin + lane * kVec; i < end;) {
      float step = 0, clip = 0;
      for (int k = 0; k < kFlush / kVec && i < end; ++k, i += kGroup * kVec) {
        Pack<T, kVec> vx{}, vg{}, out;
        load(vx, x, i, end, a.aligned);
        load(vg, grad, i, end, a.aligned);
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          const LsqTerms<float> terms = one(vx.v[j], vg.v[j], out.v[j], q);
          if (i + j < end) {
            step += terms.step;
            clip += terms.clip;
          }
        }
        store(out, dx, i, end, a.aligned);
      }
      sums = sums + Sums{step, clip};
    }
  }
  if (kGroup == kThreads) {
    sums = across_block(sums, 1);
  } else {
#pragma unroll
    for (int half = kGroup / 2; half > 0; half /= 2) {
      sums =
          sums + Sums{__shfl_down_sync(~0u, sums.step, half, kGroup), __shfl_down_sync(~0u, sums.clip, half, kGroup)};
    }
  }
  if (lane == 0 && row < a.plan.rows) put(a, channel, row / f.channels * a.plan.chunks + chunk, sums);
}

// A block takes `width` packs of channels side by side, of `chunk` rows; each thread every (kThreads / width)-th row.
template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) fake_quant_lsq_columns_kernel(Args a) {
  const CudaFakeQuantArgs& f = a.fq;
  const int width = a.plan.width;
  const int64_t tile = blockIdx.x / a.plan.chunks, chunk = blockIdx.x - tile * a.plan.chunks;
  const int64_t c = (tile * width + threadIdx.x % width) * kVec;
  Sums sums[kVec]{};
  if (c < f.channels) {
    Grid<float> q[kVec];
#pragma unroll
    for (int j = 0; j < kVec; ++j) q[j] = grid_of(f, c + j);
    const int64_t begin = chunk * a.plan.chunk;
    const int64_t end = begin + a.plan.chunk < a.plan.rows ? begin + a.plan.chunk : a.plan.rows;
    for (int64_t row = begin + threadIdx.x / width; row < end;) {
      float step[kVec]{}, clip[kVec]{};
      for (int k = 0; k < kFlush && row < end; ++k, row += kThreads / width) {
        const int64_t i = row * f.channels + c;
        Pack<T, kVec> vx{}, vg{}, out;
        load(vx, static_cast<const T*>(f.x), i, f.n, a.aligned);
        load(vg, static_cast<const T*>(f.grad), i, f.n, a.aligned);
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          const LsqTerms<float> terms = one(vx.v[j], vg.v[j], out.v[j], q[j]);
          step[j] += terms.step;
          clip[j] += terms.clip;
        }
        store(out, static_cast<T*>(f.out), i, f.n, a.aligned);
      }
#pragma unroll
      for (int j = 0; j < kVec; ++j) sums[j] = sums[j] + Sums{step[j], clip[j]};
    }
  }
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    const Sums sum = across_block(sums[j], width);
    if (threadIdx.x < width && c < f.channels) put(a, c + j, chunk, sum);
  }
}

// The second stage: a block per channel.
__global__ void __launch_bounds__(kThreads) fake_quant_lsq_finish_kernel(Args a) {
  const int64_t channel = blockIdx.x;
  Sums sums{};
  for (int64_t part = threadIdx.x; part < a.plan.parts; part += kThreads) {
    sums = sums + a.partial[channel * a.plan.parts + part];
  }
  sums = across_block(sums, 1);
  if (threadIdx.x == 0) finish(a, channel, sums);
}

template <class T, int kVec>
void launch(Args a, cudaStream_t stream) {
  const Plan& p = a.plan;
  a.aligned = aligned_for<Pack<T, kVec>>(a.fq.x, a.fq.grad, a.fq.out);
  const auto grid = [](int64_t blocks) { return static_cast<unsigned>(blocks); };
  if (p.columns) {
    const int64_t tiles = ceil_div(a.fq.channels, int64_t{p.width} * kVec);
    fake_quant_lsq_columns_kernel<T, kVec><<<grid(tiles * p.chunks), kThreads, 0, stream>>>(a);
  } else if (a.fq.inner < kShortRow) {
    const int64_t blocks = ceil_div(p.rows, kThreads / kShortGroup);
    fake_quant_lsq_rows_kernel<T, kVec, kShortGroup><<<grid(blocks), kThreads, 0, stream>>>(a);
  } else {
    fake_quant_lsq_rows_kernel<T, kVec, kThreads><<<grid(p.rows * p.chunks), kThreads, 0, stream>>>(a);
  }
  if (p.parts > 1) fake_quant_lsq_finish_kernel<<<grid(a.fq.channels), kThreads, 0, stream>>>(a);
}

template <class T>
void launch(const Args& a, cudaStream_t stream) {
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
  const int64_t parts = plan_of(f.n, f.channels, f.inner, f.dtype).parts;
  return parts == 1 ? 0 : f.channels * parts * static_cast<int64_t>(sizeof(Sums));
}

cudaError_t cuda_fake_quant_lsq_backward(const CudaFakeQuantLsqArgs& args, cudaStream_t stream) {
  const CudaFakeQuantArgs& f = args.fq;
  if (f.n == 0) return cudaSuccess;
  const Plan plan = plan_of(f.n, f.channels, f.inner, f.dtype);
  const Args a{f, plan, args.dscale, args.dzero_point, static_cast<Sums*>(args.workspace), false};
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
