// What bn_act and its backward gather of a channel: two sums, and where kEnds the ends of what enters the quantizer.
// And how those of the chunks are added up and united.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "csrc/cpu/extremes.h"
#include "kernels/channel_range.h"

namespace zsq {

// Where a chunk leaves its totals, [channels] each; null where they are not wanted.
template <class C>
struct Slots {
  C *first = nullptr, *second = nullptr, *lo = nullptr, *hi = nullptr;
};

// Whether sums are wanted is an operation's word wherever it is asked: from a pointer the compiler would not know it.
template <class C, bool kEnds>
struct Totals {
  C first{}, second{};
};

// Here too the range is of numbers alone, and a NaN stands beside it, as a number would: three selections, where a
// comparison that lets NaN in, or a flag, takes branches and four times as long.
template <class C>
struct Totals<C, true> {
  C first{}, second{};
  Range<C> range = empty_range<C>();
  C nan{};

  void take(C v) {
    range.lo = v < range.lo ? v : range.lo;
    range.hi = v > range.hi ? v : range.hi;
    nan = v != v ? v : nan;
  }

  Range<C> ends() const { return nan != nan ? Range<C>{nan, nan} : range; }
};

template <class C, bool kEnds>
void put(const Totals<C, kEnds>& totals, const Slots<C>& slots, int64_t c, bool sums) {
  if (sums) slots.first[c] = totals.first, slots.second[c] = totals.second;
  if constexpr (kEnds) slots.lo[c] = totals.ends().lo, slots.hi[c] = totals.ends().hi;
}

// What was put there.
template <bool kEnds, class C>
Totals<C, kEnds> totals_at(const Slots<C>& slots, int64_t c, bool sums) {
  Totals<C, kEnds> totals;
  if (sums) totals.first = slots.first[c], totals.second = slots.second[c];
  if constexpr (kEnds) totals.range = {slots.lo[c], slots.hi[c]};
  return totals;
}

// As if nothing had been met in any of the channels.
template <class C>
void clear(const Slots<C>& slots, int64_t channels) {
  if (slots.first) std::fill_n(slots.first, channels, C(0)), std::fill_n(slots.second, channels, C(0));
  if (!slots.lo) return;
  std::fill_n(slots.lo, channels, empty_range<C>().lo);
  std::fill_n(slots.hi, channels, empty_range<C>().hi);
}

#ifdef ZSQ_HAS_AVX2

// Of eight lanes.
template <bool kEnds>
struct Totals8 {
  __m256 first, second;
};

template <>
struct Totals8<true> {
  __m256 first, second;
  Ends8 ends;
};

template <bool kEnds>
ZSQ_AVX2 inline Totals8<kEnds> no_totals8() {
  Totals8<kEnds> totals;
  totals.first = totals.second = _mm256_setzero_ps();
  if constexpr (kEnds) totals.ends = no_ends8();
  return totals;
}

template <bool kEnds>
ZSQ_AVX2 inline void put8(const Totals8<kEnds>& totals, const Slots<float>& slots, int64_t c, bool sums) {
  if (sums) _mm256_storeu_ps(slots.first + c, totals.first), _mm256_storeu_ps(slots.second + c, totals.second);
  if constexpr (kEnds) put_ends8(totals.ends, slots.lo + c, slots.hi + c);
}

template <bool kEnds>
ZSQ_AVX2 inline Totals8<kEnds> totals8_at(const Slots<float>& slots, int64_t c, bool sums) {
  Totals8<kEnds> totals = no_totals8<kEnds>();
  if (sums) totals.first = _mm256_loadu_ps(slots.first + c), totals.second = _mm256_loadu_ps(slots.second + c);
  if constexpr (kEnds) totals.ends = ends8_at(slots.lo + c, slots.hi + c);
  return totals;
}

#endif

// The totals of all chunks, a plane [chunks][channels] of each kind, and their second stage.
template <class C>
class Partials {
 public:
  Partials(bool sums, bool ends, int64_t chunks, int64_t channels)
      : sums_(sums),
        ends_(ends),
        chunks_(chunks),
        channels_(channels),
        plane_(chunks * channels),
        memory_(sums || ends ? new C[2 * (int(sums) + int(ends)) * plane_] : nullptr) {}

  Slots<C> at(int64_t chunk) const {
    C* plane = memory_.get() + chunk * channels_;
    Slots<C> slots;
    if (sums_) slots.first = plane, slots.second = plane + plane_, plane += 2 * plane_;
    if (ends_) slots.lo = plane, slots.hi = plane + plane_;
    return slots;
  }

  // first_out[group][channel] = the sum over the group's chunks, in their order; likewise the second sums.
  void add_up(int64_t groups, C* first_out, C* second_out) const {
    const int64_t chunks = plane_ ? chunks_ / groups : 0;
    std::vector<double> sums(channels_);
    for (int64_t g = 0; g < groups; ++g) {
      for (const bool is_first : {true, false}) {
        std::fill(sums.begin(), sums.end(), 0.0);
        const C* p = is_first ? at(g * chunks).first : at(g * chunks).second;
        for (int64_t k = 0; k < chunks; ++k, p += channels_) {
          for (int64_t c = 0; c < channels_; ++c) sums[c] += static_cast<double>(p[c]);
        }
        C* out = (is_first ? first_out : second_out) + g * channels_;
        for (int64_t c = 0; c < channels_; ++c) out[c] = static_cast<C>(sums[c]);
      }
    }
  }

  // lo[channel] and hi[channel] = the ends of all chunks.
  void unite(C* lo, C* hi, bool simd) const {
    clear(Slots<C>{nullptr, nullptr, lo, hi}, channels_);
    for (int64_t k = 0; k < chunks_; ++k) {
      const Slots<C> slots = at(k);  // no chunk is empty, so either end of it is a value
      ranges_of(slots.lo, channels_, lo, hi, simd);
      ranges_of(slots.hi, channels_, lo, hi, simd);
    }
  }

 private:
  bool sums_, ends_;
  int64_t chunks_, channels_, plane_;
  std::unique_ptr<C[]> memory_;
};

}  // namespace zsq
