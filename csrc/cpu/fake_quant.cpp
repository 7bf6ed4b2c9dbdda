#include "csrc/cpu/fake_quant.h"

#include "csrc/cpu/forward.h"

namespace zsq {
namespace {

// The straight-through gradient.
template <class T>
struct Backward {
  const T* grad;
  const T* x;
  T* out;

  template <class C>
  void one(int64_t i, const Grid<C>& q) const {
    out[i] = inside(static_cast<C>(widen(x[i])), q) ? grad[i] : T{};
  }

#ifdef ZSQ_HAS_AVX2
  ZSQ_AVX2 void eight(int64_t i, const Grid8& q) const {
    ahead(grad + i), ahead(x + i), ahead(out + i);
    const __m256 unrounded = _mm256_add_ps(_mm256_div_ps(load8(x + i), q.scale), q.zero_point);
    store8(out + i, _mm256_and_ps(load8(grad + i), inside8(unrounded, q)));
  }
#endif
};

template <class T, class C>
void run(const FakeQuantArgs& a, int threads) {
  const auto* grad = static_cast<const T*>(a.grad);
  const auto* x = static_cast<const T*>(a.x);
  auto* out = static_cast<T*>(a.out);
  if (grad) {
    for_each_element<C>(Backward<T>{grad, x, out}, a, threads);
  } else {
    for_each_element<C>(Forward<T>{x, out}, a, threads);
  }
}

}  // namespace

void fake_quant(const FakeQuantArgs& args, int threads) {
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
