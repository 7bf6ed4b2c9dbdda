// Many tensors at once: each channel is read for its extremes and, while it is in the cache, quantized.
#include <algorithm>
#include <vector>

#include "csrc/cpu/extremes.h"
#include "csrc/cpu/fake_quant.h"
#include "csrc/cpu/forward.h"

namespace zsq {
namespace {

// Channels of one tensor that a thread takes at once.
struct Task {
  const MinMaxTensor* tensor;
  int64_t begin, end;
  int64_t first;  // where the tensor's channels begin among all
};

// Tasks of about kGrain elements, and how many elements there are.
std::vector<Task> tasks_of(const MinMaxArgs& a, int64_t& elements) {
  std::vector<Task> tasks;
  int64_t first = 0;
  for (const MinMaxTensor* t = a.tensors; t != a.tensors + a.count; ++t) {
    const int64_t step = std::max<int64_t>(1, kGrain / t->length);
    for (int64_t c = 0; c < t->channels; c += step) tasks.push_back({t, c, std::min(t->channels, c + step), first});
    first += t->channels;
    elements += t->channels * t->length;
  }
  return tasks;
}

template <class T, class C>
void run(const MinMaxArgs& a, int threads) {
  const bool simd = simd_enabled();
  int64_t elements = 0;
  const std::vector<Task> tasks = tasks_of(a, elements);
  if (elements <= kGrain) threads = 1;  // small networks: many tasks of little work
  parallel_for(static_cast<int64_t>(tasks.size()), 1, threads, [&](int64_t k, int64_t end) {
    for (; k < end; ++k) {
      const MinMaxTensor& t = *tasks[k].tensor;
      for (int64_t c = tasks[k].begin; c < tasks[k].end; ++c) {
        const T* x = static_cast<const T*>(t.x) + c * t.length;
        const Range<C> range = range_of(x, t.length, empty_range<C>(), simd);
        const Grid<C> q = grid_of_range(range, static_cast<int>(t.bits), a.symmetric);
        // This channel is in the cache now: what comes next is the next one.
        const Forward<T> forward{x, static_cast<T*>(t.out) + c * t.length, t.length * int64_t{sizeof(T)}};
        row(forward, 0, t.length, q, simd);
        static_cast<C*>(a.scale)[tasks[k].first + c] = q.scale;
        a.zero_point[tasks[k].first + c] = static_cast<int32_t>(q.zero_point);
      }
    }
  });
}

}  // namespace

void fake_quant_minmax(const MinMaxArgs& args, int threads) {
  switch (args.dtype) {
    case DType::f32:
      return run<float, float>(args, threads);
    case DType::f16:
      return run<f16, float>(args, threads);
    case DType::bf16:
      return run<bf16, float>(args, threads);
    case DType::f64:
      return run<double, double>(args, threads);
  }
}

}  // namespace zsq
