// adaround for many weights in one launch: a warp takes a stretch of a row, whichever weight it is in. The table of
// weights travels as the kernel's argument, so a graph that captured the launch needs no memory of its own. Sums are
// taken in two stages; what is summed, and in which order, depends on sizes and dtype alone, and there are no atomics.
// Contract: zsq_ext/ops/reference/adaround.py; arithmetic: adaround.h.
#include "adaround.cuh"
#include "adaround.h"
#include "pack.cuh"

#include <algorithm>

namespace zsq {
namespace {

constexpr int kThreads = 256, kWarp = 32, kWarps = kThreads / kWarp;
// As many weights as 4 KB of arguments hold.
constexpr int kWeights = 32;
// Elements of a stretch: 8 packs of 4 floats per thread, which is as many as are added in float.
constexpr int64_t kStretch = 1024;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Weight {
  const void* grad;
  const void* v;
  const int16_t* base;
  void* out;
  const float* scale;
  const int32_t* zero_point;
  float* dscale;
  int64_t channels, inner;
  int64_t first;    // the weight's first stretch, of all in this launch
  int64_t channel;  // its first channel, likewise
  float qmin, qmax;
  bool wide;     // whole packs; else element by element, where a pack would cross rows
  bool aligned;  // packs are one access each
};

struct Table {
  Weight weights[kWeights];
  int count;
  int64_t stretches;  // of all
  int64_t channels;   // of all
  const float* beta;
  const float* grad_reg;
  double* partial;  // [stretches]; null where no sums are taken
};

static_assert(sizeof(Table) <= 4096, "arguments of a kernel");

__host__ __device__ inline int64_t stretches_of_row(const Weight& w) { return (w.inner + kStretch - 1) / kStretch; }

// The sum over a warp, in its first thread.
__device__ double across_warp(double sum) {
#pragma unroll
  for (int half = kWarp / 2; half > 0; half /= 2) sum += __shfl_down_sync(~0u, sum, half);
  return sum;
}

// As store, but a whole pack's is said outright: a plain one's first element gets merged with that of the loop for what
// is no whole pack, and the pack torn apart.
template <class T, int N>
__device__ void put(const Pack<T, N>& pack, T* p, int64_t i, int64_t n, bool aligned) {
  if constexpr (sizeof(pack) == sizeof(uint4)) {
    if (aligned && i + N <= n) {
      uint4 words;
      memcpy(&words, &pack, sizeof(words));
      __stwb(reinterpret_cast<uint4*>(p + i), words);
      return;
    }
  }
  store(pack, p, i, n, false);
}

// Elements begin to end of a row, by a warp; gives what this thread adds to the sum.
template <class T, int kVec, bool kBackward>
__device__ float stretch_of(const Weight& w, int64_t row, int64_t begin, int64_t end, const Grid<float>& q,
                            const Regulariser<float>& reg, bool is_hard) {
  float sum = 0;
  for (int64_t i = begin + threadIdx.x % kWarp * kVec; i < end; i += kWarp * kVec) {
    Pack<T, kVec> v{}, grad{}, out;
    Pack<int16_t, kVec> base{};
    load(v, static_cast<const T*>(w.v) + row, i, end, w.aligned);
    load(base, w.base + row, i, end, w.aligned);
    if (kBackward) load(grad, static_cast<const T*>(w.grad) + row, i, end, w.aligned);
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      const float x = widen(v.v[j]), b = static_cast<float>(base.v[j]);
      float term = 0;
      if (kBackward) {
        const AdaRoundTerms<float> terms = adaround_terms(x, b, widen(grad.v[j]), q, reg);
        narrow(terms.dv, out.v[j]);
        term = terms.step;
      } else {
        const float h = is_hard ? hard(x) : soft(x).h;
        narrow(adaround(h, b, q), out.v[j]);
        if (reg.on) term = undecided(h, reg);
      }
      if (i + j < end) sum += term;
    }
    put(out, static_cast<T*>(w.out) + row, i, end, w.aligned);
  }
  return sum;
}

template <class T, bool kBackward>
__global__ void __launch_bounds__(kThreads) adaround_kernel(const __grid_constant__ Table table, const bool is_hard) {
  const int64_t stretch = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (stretch >= table.stretches) return;
  int k = 0;
  while (k + 1 < table.count && stretch >= table.weights[k + 1].first) ++k;
  const Weight& w = table.weights[k];
  const int64_t per_row = stretches_of_row(w), local = stretch - w.first;
  const int64_t channel = local / per_row, begin = (local - channel * per_row) * kStretch;
  const int64_t end = begin + kStretch < w.inner ? begin + kStretch : w.inner, row = channel * w.inner;
  const Grid<float> q{__ldg(w.scale + channel), static_cast<float>(__ldg(w.zero_point + channel)), w.qmin, w.qmax};
  const Regulariser<float> reg = regulariser(table.beta, table.grad_reg);

  const float sum = w.wide ? stretch_of<T, Pack<T>::kSize, kBackward>(w, row, begin, end, q, reg, is_hard)
                           : stretch_of<T, 1, kBackward>(w, row, begin, end, q, reg, is_hard);
  if (table.partial) {
    const double total = across_warp(sum);
    if (threadIdx.x % kWarp == 0) table.partial[stretch] = total;
  }
}

// The second stage of dscale: a warp per channel.
__global__ void __launch_bounds__(kThreads) adaround_scale_kernel(const __grid_constant__ Table table) {
  const int64_t at = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (at >= table.channels) return;
  int k = 0;
  while (k + 1 < table.count && at >= table.weights[k + 1].channel) ++k;
  const Weight& w = table.weights[k];
  const int64_t channel = at - w.channel, per_row = stretches_of_row(w);
  const double* partial = table.partial + w.first + channel * per_row;
  double sum = 0;
  for (int64_t i = threadIdx.x % kWarp; i < per_row; i += kWarp) sum += partial[i];
  sum = across_warp(sum);
  if (threadIdx.x % kWarp == 0) w.dscale[channel] = static_cast<float>(sum);
}

// The second stage of the regulariser: one block.
__global__ void __launch_bounds__(kThreads) adaround_reg_kernel(const double* partial, int64_t n, float* reg) {
  __shared__ double warps[kWarps];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) sum += partial[i];
  sum = across_warp(sum);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int k = 1; k < kWarps; ++k) sum += warps[k];
    *reg = static_cast<float>(sum);
  }
}

// The weights from `next` on that one launch takes.
template <class T>
Table table_of(const CudaAdaRoundArgs& a, size_t& next) {
  constexpr int kSize = Pack<T>::kSize;
  Table t{};
  t.beta = a.beta;
  t.grad_reg = a.grad_reg;
  for (; next < a.weights.size() && t.count < kWeights; ++next) {
    const AdaRoundWeight& w = a.weights[next];
    // A row that is the whole weight may end in the middle of a pack, any other may not.
    const bool wide = w.channels == 1 || w.inner % kSize == 0;
    const bool aligned =
        aligned_for<Pack<T>>(w.grad, w.v, w.out) && aligned_for<Pack<int16_t, kSize>>(w.base, nullptr, nullptr);
    t.weights[t.count] = {w.grad,
                          w.v,
                          w.base,
                          w.out,
                          static_cast<const float*>(w.scale),
                          w.zero_point,
                          static_cast<float*>(w.dscale),
                          w.channels,
                          w.inner,
                          t.stretches,
                          t.channels,
                          static_cast<float>(w.qmin),
                          static_cast<float>(w.qmax),
                          wide,
                          aligned};
    t.stretches += w.channels * stretches_of_row(t.weights[t.count++]);
    t.channels += w.channels;
  }
  return t;
}

unsigned blocks_for(int64_t warps) { return static_cast<unsigned>(ceil_div(warps, kWarps)); }

template <class T>
void run(const CudaAdaRoundArgs& a, cudaStream_t stream) {
  // Of a weight without elements the pointers say nothing.
  const auto any = [&](auto has) { return std::any_of(a.weights.begin(), a.weights.end(), has); };
  const bool backward = any([](const AdaRoundWeight& w) { return w.grad != nullptr; });
  const bool scales = any([](const AdaRoundWeight& w) { return w.dscale != nullptr; });
  int64_t stretches = 0;
  for (size_t next = 0; next < a.weights.size();) {
    Table t = table_of<T>(a, next);
    t.partial = a.reg || scales ? a.workspace + stretches : nullptr;
    stretches += t.stretches;
    if (t.stretches > 0) {
      const auto kernel = backward ? adaround_kernel<T, true> : adaround_kernel<T, false>;
      kernel<<<blocks_for(t.stretches), kThreads, 0, stream>>>(t, a.hard);
    }
    if (scales && t.channels > 0) {
      adaround_scale_kernel<<<blocks_for(t.channels), kThreads, 0, stream>>>(t);
    }
  }
  if (a.reg) adaround_reg_kernel<<<1, kThreads, 0, stream>>>(a.workspace, stretches, a.reg);
}

}  // namespace

int64_t cuda_adaround_workspace(const CudaAdaRoundArgs& args) {
  int64_t stretches = 0;
  for (const AdaRoundWeight& w : args.weights) {
    if (args.reg || w.dscale) stretches += w.channels * ceil_div(w.inner, kStretch);
  }
  return stretches * static_cast<int64_t>(sizeof(double));
}

cudaError_t cuda_adaround(const CudaAdaRoundArgs& args, cudaStream_t stream) {
  switch (args.dtype) {
    case DType::f32:
      run<float>(args, stream);
      break;
    case DType::f16:
      run<__half>(args, stream);
      break;
    case DType::bf16:
      run<__nv_bfloat16>(args, stream);
      break;
    case DType::f64:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace zsq
