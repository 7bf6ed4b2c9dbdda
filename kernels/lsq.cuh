// LSQ's gradient in one pass over grad and x: dx on the way, and per channel two sums in two stages. What is summed,
// and in which order, depends on sizes and dtype alone; there are no atomics. Here is what a block does for a tensor,
// alone or among many.
#pragma once

#include "fake_quant.cuh"
#include "grid.cuh"
#include "pack.cuh"
#include "parts.cuh"

namespace zsq {
namespace lsq {

// Additions in float before a thread goes on in double.
constexpr int kFlush = 32;

struct Sums {
  double step, clip;
};

__device__ inline Sums operator+(const Sums& a, const Sums& b) { return {a.step + b.step, a.clip + b.clip}; }

struct Args {
  CudaFakeQuantArgs fq;
  Plan plan;
  float* dscale;  // as dzero_point null where it is not wanted
  float* dzero_point;
  Sums* partial;  // [channels, parts]; not used where there is one part
  bool aligned;
};

__device__ inline void finish(const Args& a, int64_t channel, const Sums& sums) {
  if (!a.dscale) return;
  a.dscale[channel] = static_cast<float>(sums.step);
  a.dzero_point[channel] = static_cast<float>(a.fq.scale[channel] * sums.clip);
}

__device__ inline void put(const Args& a, int64_t channel, int64_t part, const Sums& sums) {
  if (a.plan.parts == 1) {
    finish(a, channel, sums);
  } else if (a.dscale) {
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
__device__ void rows(const Args& a, int64_t block) {
  const CudaFakeQuantArgs& f = a.fq;
  const int64_t unit = (block * kThreads + threadIdx.x) / kGroup;
  const int lane = threadIdx.x % kGroup;
  const int64_t row = unit / a.plan.chunks, chunk = unit - row * a.plan.chunks;
  const int64_t channel = row % f.channels;
  Sums sums{};
  if (row < a.plan.rows) {
    const Grid<float> q = grid_of(f, channel);
    const T* x = static_cast<const T*>(f.x) + row * f.inner;
    const T* grad = static_cast<const T*>(f.grad) + row * f.inner;
    // Null where it is not wanted. Asking f.out again in the loop costs registers that sm_100 spills.
    T* dx = f.out ? static_cast<T*>(f.out) + row * f.inner : nullptr;
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
        if (dx) store(out, dx, i, end, a.aligned);
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
__device__ void columns(const Args& a, int64_t block) {
  const CudaFakeQuantArgs& f = a.fq;
  const int width = a.plan.width;
  const int64_t tile = block / a.plan.chunks, chunk = block - tile * a.plan.chunks;
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
        if (f.out) store(out, static_cast<T*>(f.out), i, f.n, a.aligned);
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
__device__ inline void second_stage(const Args& a, int64_t channel) {
  Sums sums{};
  for (int64_t part = threadIdx.x; part < a.plan.parts; part += kThreads) {
    sums = sums + a.partial[channel * a.plan.parts + part];
  }
  sums = across_block(sums, 1);
  if (threadIdx.x == 0) finish(a, channel, sums);
}

// Blocks of the first stage, each of kThreads; the elements of a pack are kVec.
inline int64_t blocks_of(const Args& a, int kVec) {
  const Plan& p = a.plan;
  if (p.columns) return ceil_div(a.fq.channels, int64_t{p.width} * kVec) * p.chunks;
  return a.fq.inner < kShortRow ? ceil_div(p.rows, kThreads / kShortGroup) : p.rows * p.chunks;
}

// Bytes of partial sums.
inline int64_t partial_bytes(int64_t channels, const Plan& plan) {
  return plan.parts == 1 ? 0 : channels * plan.parts * static_cast<int64_t>(sizeof(Sums));
}

}  // namespace lsq
}  // namespace zsq
