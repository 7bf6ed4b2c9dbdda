// The channels' own numbers, as the passes of bn_act and its backward meet them: one channel's, or eight neighbours'.
#pragma once

#include <cstdint>
#include <vector>

#include "csrc/cpu/bn_act8.h"
#include "kernels/bn_act.h"
#include "kernels/fake_quant.h"

namespace zsq {

// One channel's numbers: its norm, what a loss on the sums sends to it (2 gS2 and gS1), and its quantizer.
template <class C>
struct Channel {
  Norm<C> norm;
  C slope{}, offset{};
  Grid<C> grid{};
};

// The numbers of all channels, each kind side by side, so that those of eight neighbours are a load each.
template <class C>
class Channels {
 public:
  Channels(const BnActNorm& norm, const BnActQuant& quant, const void* s1, const void* s2, int64_t count)
      : count(count),
        quant_(quant),
        mean_(static_cast<const C*>(norm.mean)),
        s1_(static_cast<const C*>(s1)),
        s2_(static_cast<const C*>(s2)),
        a_(count),
        b_(count) {
    const C *var = static_cast<const C*>(norm.var), *gamma = static_cast<const C*>(norm.gamma),
            *beta = static_cast<const C*>(norm.beta);
    for (int64_t c = 0; var && c < count; ++c) {
      const Norm<C> n = zsq::norm(mean_[c], var[c], gamma ? gamma[c] : C(1), beta ? beta[c] : C(0), C(norm.eps));
      a_[c] = n.a, b_[c] = n.b;
    }
  }

  // Of channel c in a group of the loss's.
  Channel<C> at(int64_t c, int64_t group) const {
    Channel<C> out{{a_[c], b_[c], mean_[c]}};
    if (s1_) out.slope = mul(C(2), s2_[group * count + c]), out.offset = s1_[group * count + c];
    if (quant_.scale) {
      out.grid = {static_cast<const C*>(quant_.scale)[c * quant_.stride], C(quant_.zero_point[c * quant_.stride]),
                  C(quant_.qmin), C(quant_.qmax)};
    }
    return out;
  }

#ifdef ZSQ_HAS_AVX2

  // Of channels c to c + 7.
  ZSQ_AVX2_INLINE Channel8 eight(int64_t c, int64_t group) const {
    Channel8 out{_mm256_loadu_ps(&a_[c]), _mm256_loadu_ps(&b_[c]), _mm256_loadu_ps(mean_ + c), {}, {}, {}};
    if (s1_) {
      out.slope = _mm256_mul_ps(_mm256_set1_ps(2.0f), _mm256_loadu_ps(s2_ + group * count + c));
      out.offset = _mm256_loadu_ps(s1_ + group * count + c);
    }
    if (quant_.scale) {
      const float* scale = static_cast<const float*>(quant_.scale) + c * quant_.stride;
      const int32_t* zero_point = quant_.zero_point + c * quant_.stride;
      const bool one = quant_.stride == 0;
      const __m256i zero_points =
          one ? _mm256_set1_epi32(*zero_point) : _mm256_loadu_si256(reinterpret_cast<const __m256i*>(zero_point));
      out.grid = {one ? _mm256_set1_ps(*scale) : _mm256_loadu_ps(scale), _mm256_cvtepi32_ps(zero_points),
                  _mm256_set1_ps(static_cast<float>(quant_.qmin)), _mm256_set1_ps(static_cast<float>(quant_.qmax))};
    }
    return out;
  }

#endif

  const int64_t count;

 private:
  const BnActQuant quant_;
  const C *const mean_, *const s1_, *const s2_;
  std::vector<C> a_, b_;
};

}  // namespace zsq
