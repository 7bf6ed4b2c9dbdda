#include "csrc/cpu/simd.h"

#include <atomic>

namespace zsq {
namespace {

bool machine_has_avx2() {
#ifdef ZSQ_HAS_AVX2
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

std::atomic<bool> enabled{machine_has_avx2()};

}  // namespace

bool simd_enabled() { return enabled.load(std::memory_order_relaxed); }

bool set_simd(bool on) { return enabled.exchange(on && machine_has_avx2()); }

}  // namespace zsq
