// The two sums over a channel that bn_act and its backward take, and how those of the chunks are added up.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

namespace zsq {

template <class C>
struct Sums {
  C first{}, second{};
};

// The partial sums of all chunks, [chunks][channels] twice, and their second stage.
template <class C>
class Partials {
 public:
  Partials(bool wanted, int64_t chunks, int64_t channels)
      : channels_(channels), second_(wanted ? chunks * channels : 0), memory_(wanted ? new C[2 * second_] : nullptr) {}

  C* first(int64_t chunk) const { return memory_.get() + chunk * channels_; }
  C* second(int64_t chunk) const { return first(chunk) + second_; }

  // first_out[group][channel] = the sum over the group's chunks, in their order; likewise the second sums.
  void add_up(int64_t groups, C* first_out, C* second_out) const {
    const int64_t chunks = second_ ? second_ / channels_ / groups : 0;
    std::vector<double> sums(channels_);
    for (int64_t g = 0; g < groups; ++g) {
      for (const bool is_first : {true, false}) {
        std::fill(sums.begin(), sums.end(), 0.0);
        const C* p = is_first ? first(g * chunks) : second(g * chunks);
        for (int64_t k = 0; k < chunks; ++k, p += channels_) {
          for (int64_t c = 0; c < channels_; ++c) sums[c] += static_cast<double>(p[c]);
        }
        C* out = (is_first ? first_out : second_out) + g * channels_;
        for (int64_t c = 0; c < channels_; ++c) out[c] = static_cast<C>(sums[c]);
      }
    }
  }

 private:
  int64_t channels_, second_;
  std::unique_ptr<C[]> memory_;
};

}  // namespace zsq
