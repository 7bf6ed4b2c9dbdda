// Many tensors at once: the pieces of all of them are one list of tasks, so that small tensors share the threads.
#include <algorithm>

#include "csrc/cpu/fake_quant.h"
#include "csrc/cpu/forward.h"
#include "csrc/cpu/lsq.h"

namespace zsq {
namespace {

// A slab of LSQ's sums is also what a task of the forward takes.
constexpr int64_t kPiece = lsq::kSlab;

struct Task {
  size_t tensor;
  int64_t begin, end;
};

// Where a tensor's slabs keep their sums, of all tensors'.
struct Place {
  lsq::Slots slots;
  size_t first;
};

template <class Body>
void for_each_task(const FakeQuantManyArgs& a, int threads, const Body& body) {
  std::vector<Task> tasks;
  int64_t elements = 0;
  for (size_t k = 0; k < a.tensors.size(); ++k) {
    const int64_t n = a.tensors[k].fq.n;
    for (int64_t i = 0; i < n; i += kPiece) tasks.push_back({k, i, std::min(n, i + kPiece)});
    elements += n;
  }
  if (elements <= kGrain) threads = 1;  // many tasks of little work
  parallel_for(static_cast<int64_t>(tasks.size()), 1, threads, [&](int64_t k, int64_t end) {
    for (; k < end; ++k) body(tasks[k]);
  });
}

template <class T, class C>
void forward(const FakeQuantManyArgs& a, int threads) {
  const bool simd = simd_enabled();
  for_each_task(a, threads, [&](const Task& task) {
    const FakeQuantArgs& t = a.tensors[task.tensor].fq;
    const Forward<T> op{static_cast<const T*>(t.x), static_cast<T*>(t.out)};
    stretch<C>(op, t, task.begin, task.end, simd);
  });
}

template <class T, class C>
void backward(const FakeQuantManyArgs& a, int threads) {
  const bool simd = simd_enabled();
  std::vector<Place> places;
  size_t all = 0;
  for (const FakeQuantLsqArgs& t : a.tensors) {
    places.push_back({lsq::Slots(t.fq), all});
    all += (t.fq.n + kPiece - 1) / kPiece * places.back().slots.count;
  }
  std::vector<lsq::Sums> sums(all);
  for_each_task(a, threads, [&](const Task& task) {
    const Place& place = places[task.tensor];
    lsq::Sums* const slots = sums.data() + place.first + task.begin / kPiece * place.slots.count;
    lsq::slab<T, C>(a.tensors[task.tensor].fq, place.slots, task.begin, task.end, simd, slots);
  });
  for (size_t k = 0; k < a.tensors.size(); ++k) {
    if (a.tensors[k].dscale) lsq::finish<C>(a.tensors[k], places[k].slots, sums.data() + places[k].first);
  }
}

template <class T, class C>
void run(const FakeQuantManyArgs& a, int threads) {
  if (a.backward) {
    backward<T, C>(a, threads);
  } else {
    forward<T, C>(a, threads);
  }
}

}  // namespace

void fake_quant_many(const FakeQuantManyArgs& args, int threads) {
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

void fake_quant_lsq_backward(const FakeQuantLsqArgs& args, int threads) {
  fake_quant_many({{args}, true, args.fq.dtype}, threads);
}

}  // namespace zsq
