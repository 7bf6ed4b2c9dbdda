// distill_head: a team of threads takes a sample, runs the three passes of head_row over its classes, and leaves a row;
// a second kernel adds the rows up, in a fixed order and without atomics. The backward takes all elements at once.
// Contract: zsq_ext/ops/reference/heads.py; arithmetic: heads.h.
#include "heads.cuh"
#include "pack.cuh"

namespace zsq {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
// Up to here a warp takes a sample and a lane 8 classes; a thousand classes keep a whole block busy, for the time is
// that of a chain of exponentials, and there are fewer samples than a GPU has warps.
constexpr int64_t kFewClasses = 256;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The threads of one sample: kTeam of them, a warp or a block.
template <class T, int kTeam>
struct Team {
  static constexpr int kWarps = kTeam / kWarp;
  const T* s;
  const T* t;
  int64_t n;
  bool packed;    // whole packs fit: rows are as long and memory is aligned
  float* shared;  // one float per warp and value, where there are several warps

  __device__ int64_t classes() const { return n; }
  __device__ float student(int64_t k) const { return widen(s[k]); }
  __device__ float teacher(int64_t k) const { return widen(t[k]); }
  __device__ static int lane() { return threadIdx.x % kTeam; }

  // f(class, student, teacher) for this thread's classes.
  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
    constexpr int kSize = Pack<T>::kSize;
    if (!packed) {
      for (int64_t k = lane(); k < n; k += kTeam) f(k, student(k), teacher(k));
      return;
    }
    for (int64_t k = lane() * kSize; k < n; k += kTeam * kSize) {
      const Pack<T> a = *reinterpret_cast<const Pack<T>*>(s + k), b = *reinterpret_cast<const Pack<T>*>(t + k);
#pragma unroll
      for (int j = 0; j < kSize; ++j) f(k + j, widen(a.v[j]), widen(b.v[j]));
    }
  }

  // combine(mine, another's) over the whole team; everyone gets the result. Values cross warps by shared memory.
  template <class V, class F>
  __device__ __forceinline__ V reduced(V v, const F& combine) const {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) v = combine(v, shuffled(v, step));
    if (kWarps == 1) return v;
    V* const per_warp = reinterpret_cast<V*>(shared);
    __syncthreads();  // what was there has been read
    if (lane() % kWarp == 0) per_warp[lane() / kWarp] = v;
    __syncthreads();
    v = per_warp[0];
    for (int w = 1; w < kWarps; ++w) v = combine(v, per_warp[w]);
    return v;
  }

  __device__ static float shuffled(float v, int step) { return __shfl_xor_sync(0xffffffff, v, step); }
  __device__ static Peak<float> shuffled(const Peak<float>& v, int step) {
    return {shuffled(v.value, step), __shfl_xor_sync(0xffffffff, v.at, step)};
  }

  __device__ float sum(float v) const {
    return reduced(v, [](float a, float b) { return add(a, b); });
  }
  __device__ Peak<float> highest(const Peak<float>& v) const {
    return reduced(v, [](const Peak<float>& a, const Peak<float>& b) { return higher(a, b); });
  }

  template <Kd kKd>
  __device__ __forceinline__ Peaks<float> peaks(const HeadSpec<float>& spec) const {
    constexpr int64_t kNowhere = INT64_MAX;
    Peaks<float> top{{-INFINITY, kNowhere}, {-INFINITY, kNowhere}, -INFINITY};
    each([&](int64_t k, float a, float b) {
      top.student = higher(top.student, {a, k});
      top.teacher = higher(top.teacher, {b, k});
      if (kKd == Kd::entropy) top.difference = fmaxf(top.difference, sub(a, b));
    });
    top.student = highest(top.student);
    top.teacher = highest(top.teacher);
    if (kKd == Kd::entropy) {
      const float most = reduced(top.difference, [](float a, float b) { return fmaxf(a, b); });
      top.difference = div(most, spec.temperature);  // the largest quotient is that of the largest difference
    }
    return top;
  }

  template <Kd kKd>
  __device__ __forceinline__ Masses<float> masses(const Peaks<float>& top, const HeadSpec<float>& spec,
                                                  int64_t label) const {
    Masses<float> sums{};
    each([&](int64_t k, float a, float b) { add_masses<kKd>(a, b, k == label, top, spec, sums); });
    return {sum(sums.student), sum(sums.teacher), sum(sums.student_wrong), sum(sums.teacher_wrong)};
  }

  template <Kd kKd>
  __device__ __forceinline__ Divergence<float> divergence(const HeadSpec<float>& spec, float base, float shift) const {
    Divergence<float> sums{};
    each([&](int64_t, float a, float b) { add_divergence<kKd>(a, b, spec.temperature, base, shift, sums); });
    return {sum(sums.value), sum(sums.drift)};
  }
};

// One block to an SM is enough to say: told less, ptxas spills around the exact divisions to make room for more.
template <class T, Kd kKd, int kTeam>
__global__ void __launch_bounds__(kThreads, 1) distill_head_kernel(CudaDistillHeadArgs a, bool packed) {
  // Room for the widest value that crosses warps.
  __shared__ alignas(alignof(Peak<float>)) unsigned char shared[sizeof(Peak<float>) * (kThreads / kWarp)];
  const int64_t b = int64_t(blockIdx.x) * (kThreads / kTeam) + threadIdx.x / kTeam;
  if (b >= a.samples) return;  // by whole teams, so that no one waits for the missing
  const int64_t i = b * a.classes;
  const Team<T, kTeam> team{static_cast<const T*>(a.student) + i, static_cast<const T*>(a.teacher) + i, a.classes,
                            packed, reinterpret_cast<float*>(shared)};
  const HeadSpec<float> spec{a.temperature, a.tau, a.trust, a.labels != nullptr};
  bool easy = a.given && a.given[b];
  const HeadRow<float> row = head_row<kKd>(team, spec, spec.labelled ? a.labels[b] : -1, easy);
  if (team.lane() != 0) return;
  a.rows[b] = row;
  a.easy[b] = easy;
}

// One block. Thread k adds every 256th row, and a tree the threads.
__global__ void __launch_bounds__(kThreads) distill_finish_kernel(CudaDistillHeadArgs a) {
  __shared__ double kd[kThreads], ce[kThreads];
  __shared__ int64_t counts[3][kThreads];
  const int me = threadIdx.x;
  double my_kd = 0, my_ce = 0;
  int64_t mine[3] = {0, 0, 0};
  for (int64_t b = me; b < a.samples; b += kThreads) {
    const HeadRow<float> row = a.rows[b];
    my_kd += row.value;
    my_ce += row.ce;
    mine[0] += row.right != 0.0f;
    mine[1] += row.agree != 0.0f;
    mine[2] += a.easy[b];
  }
  kd[me] = my_kd;
  ce[me] = my_ce;
  for (int j = 0; j < 3; ++j) counts[j][me] = mine[j];
  for (int step = kThreads / 2; step > 0; step /= 2) {
    __syncthreads();
    if (me >= step) continue;
    kd[me] += kd[me + step];
    ce[me] += ce[me + step];
    for (int j = 0; j < 3; ++j) counts[j][me] += counts[j][me + step];
  }
  if (me != 0) return;
  *a.kd = static_cast<float>(a.kd_weight * kd[0]);
  *a.ce = static_cast<float>(a.ce_weight * ce[0]);
  for (int j = 0; j < 3; ++j) a.counts[j] = counts[j][0];
}

// kSize neighbours of one sample: a pack where rows are whole packs, else one.
template <class T, Kd kKd, int kSize>
__global__ void __launch_bounds__(kThreads) distill_backward_kernel(CudaDistillHeadBackwardArgs a) {
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kSize, n = a.samples * a.classes;
  if (i >= n) return;
  const int64_t b = i / a.classes, k = i - b * a.classes;
  Pack<T, kSize> s, t, ds, dt;
  load(s, static_cast<const T*>(a.student), i, n, true);
  load(t, static_cast<const T*>(a.teacher), i, n, true);
  const HeadRow<float> row = a.rows[b];
  const bool has_kd = a.grad_kd, has_ce = a.grad_ce && a.labels;
  const int64_t label = has_ce ? a.labels[b] : -1;
  HeadPull<float> pull{0.0f, 0.0f};
  if (has_kd) pull.kd = kd_pull<kKd>(__ldg(a.grad_kd), a.kd_weight, a.temperature);
  if (has_ce && a.easy[b]) pull.ce = mul(__ldg(a.grad_ce), a.ce_weight);
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    const HeadSlope<float> d =
        head_slope<kKd>(widen(s.v[j]), widen(t.v[j]), k + j == label, a.temperature, row, pull, has_kd, has_ce);
    narrow(d.student, ds.v[j]);
    narrow(d.teacher, dt.v[j]);
  }
  if (a.dstudent) store(ds, static_cast<T*>(a.dstudent), i, n, true);
  if (a.dteacher) store(dt, static_cast<T*>(a.dteacher), i, n, true);
}

template <class T, Kd kKd>
void launch(const CudaDistillHeadArgs& a, cudaStream_t stream) {
  const bool packed = a.classes % Pack<T>::kSize == 0 && aligned_for<Pack<T>>(a.student, a.teacher, nullptr);
  if (a.classes <= kFewClasses) {
    const auto blocks = static_cast<unsigned>(ceil_div(a.samples, kThreads / kWarp));
    distill_head_kernel<T, kKd, kWarp><<<blocks, kThreads, 0, stream>>>(a, packed);
  } else {
    distill_head_kernel<T, kKd, kThreads><<<static_cast<unsigned>(a.samples), kThreads, 0, stream>>>(a, packed);
  }
}

template <class T, Kd kKd>
void launch(const CudaDistillHeadBackwardArgs& a, cudaStream_t stream) {
  constexpr int kSize = Pack<T>::kSize;
  const bool packed = a.classes % kSize == 0 && aligned_for<Pack<T>>(a.student, a.teacher, nullptr) &&
                      aligned_for<Pack<T>>(a.dstudent, a.dteacher, nullptr);
  const int64_t threads = a.samples * a.classes / (packed ? kSize : 1);
  const auto blocks = static_cast<unsigned>(ceil_div(threads, kThreads));
  if (packed) {
    distill_backward_kernel<T, kKd, kSize><<<blocks, kThreads, 0, stream>>>(a);
  } else {
    distill_backward_kernel<T, kKd, 1><<<blocks, kThreads, 0, stream>>>(a);
  }
}

template <class T, class A>
void with_form(const A& a, cudaStream_t stream) {
  switch (a.form) {
    case Kd::kl:
      return launch<T, Kd::kl>(a, stream);
    case Kd::mse:
      return launch<T, Kd::mse>(a, stream);
    case Kd::entropy:
      return launch<T, Kd::entropy>(a, stream);
  }
}

template <class A>
cudaError_t with_dtype(const A& a, cudaStream_t stream) {
  if (a.samples == 0) return cudaSuccess;
  switch (a.dtype) {
    case DType::f32:
      with_form<float>(a, stream);
      break;
    case DType::f16:
      with_form<__half>(a, stream);
      break;
    case DType::bf16:
      with_form<__nv_bfloat16>(a, stream);
      break;
    case DType::f64:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t cuda_distill_head(const CudaDistillHeadArgs& args, cudaStream_t stream) {
  const cudaError_t error = with_dtype(args, stream);
  if (error != cudaSuccess) return error;
  distill_finish_kernel<<<1, kThreads, 0, stream>>>(args);  // with no samples too: its sums are 0 times NaN
  return cudaGetLastError();
}

cudaError_t cuda_distill_head_backward(const CudaDistillHeadBackwardArgs& args, cudaStream_t stream) {
  return with_dtype(args, stream);
}

}  // namespace zsq
