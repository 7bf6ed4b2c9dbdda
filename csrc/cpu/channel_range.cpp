#include "csrc/cpu/channel_range.h"

#include <algorithm>
#include <vector>

#include "csrc/cpu/extremes.h"
#include "csrc/cpu/parallel.h"

namespace zsq {
namespace {

// 64 Ki elements take one core some 10 us.
constexpr int64_t kGrain = 1 << 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory is cut into tasks, each of which leaves the range of every channel it meets; those are united at the end.
template <class T, class C>
class Pass {
 public:
  Pass(const ChannelRangeArgs& a) : a_(a), x_(static_cast<const T*>(a.x)), block_(a.channels * a.inner) {}

  void run(int threads) {
    if (block_ <= kGrain) {
      blocks(threads);
    } else {
      rows(threads);
    }
  }

 private:
  // A task takes some of the outer blocks, which hold all channels.
  void blocks(int threads) {
    const int64_t outer = a_.n / block_, per_task = std::max<int64_t>(1, kGrain / block_);
    cut(ceil_div(outer, per_task), a_.channels);
    parallel_for(tasks_, 1, threads, [&](int64_t k, int64_t end) {
      for (; k < end; ++k) {
        const T* x = x_ + k * per_task * block_;
        for (const T* stop = x_ + std::min(outer, (k + 1) * per_task) * block_; x < stop; x += block_) {
          if (a_.inner == 1) {
            ranges_of(x, a_.channels, lo(k), hi(k), simd_);
          } else {
            for (int64_t c = 0; c < a_.channels; ++c) widen_by(x + c * a_.inner, a_.inner, k, c);
          }
        }
      }
    });
    unite([](int64_t, int64_t slot) { return slot; });
  }

  // A task takes a piece of a row, which lies in one channel.
  void rows(int threads) {
    const int64_t pieces = ceil_div(a_.inner, kGrain), piece = ceil_div(a_.inner, pieces);
    cut(a_.n / a_.inner * pieces, 1);
    parallel_for(tasks_, std::max<int64_t>(1, kGrain / piece), threads, [&](int64_t k, int64_t end) {
      for (; k < end; ++k) {
        const int64_t at = k % pieces * piece;
        widen_by(x_ + k / pieces * a_.inner + at, std::min(piece, a_.inner - at), k, 0);
      }
    });
    unite([&](int64_t k, int64_t) { return k / pieces % a_.channels; });
  }

  void cut(int64_t tasks, int64_t slots) {
    tasks_ = tasks, slots_ = slots;
    lo_.assign(tasks * slots, empty_range<C>().lo);
    hi_.assign(tasks * slots, empty_range<C>().hi);
  }

  C* lo(int64_t task) { return lo_.data() + task * slots_; }
  C* hi(int64_t task) { return hi_.data() + task * slots_; }

  void widen_by(const T* x, int64_t n, int64_t task, int64_t slot) {
    const Range<C> range = range_of(x, n, Range<C>{lo(task)[slot], hi(task)[slot]}, simd_);
    lo(task)[slot] = range.lo, hi(task)[slot] = range.hi;
  }

  template <class ChannelOf>
  void unite(const ChannelOf& channel_of) {
    std::vector<Range<C>> total(a_.channels, empty_range<C>());
    for (int64_t k = 0; k < tasks_; ++k) {
      for (int64_t slot = 0; slot < slots_; ++slot) {
        Range<C>& range = total[channel_of(k, slot)];
        range = united(range, {lo(k)[slot], hi(k)[slot]});
      }
    }
    for (int64_t c = 0; c < a_.channels; ++c) {
      const Range<C> range = reported(total[c]);
      static_cast<C*>(a_.lo)[c] = range.lo;
      static_cast<C*>(a_.hi)[c] = range.hi;
    }
  }

  const ChannelRangeArgs& a_;
  const T* x_;
  const int64_t block_;
  const bool simd_ = simd_enabled();
  int64_t tasks_ = 0, slots_ = 0;
  std::vector<C> lo_, hi_;  // [tasks][slots]
};

}  // namespace

void channel_range(const ChannelRangeArgs& args, int threads) {
  switch (args.dtype) {
    case DType::f32:
      return Pass<float, float>(args).run(threads);
    case DType::f16:
      return Pass<f16, float>(args).run(threads);
    case DType::bf16:
      return Pass<bf16, float>(args).run(threads);
    case DType::f64:
      return Pass<double, double>(args).run(threads);
  }
}

}  // namespace zsq
