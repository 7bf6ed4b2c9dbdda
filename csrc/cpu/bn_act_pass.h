// The pass over all elements that bn_act and its backward share: who meets which channel's numbers, and the sums.
//
// What is done with an element is an operation: a struct of pointers, null where absent, with
//     from(i, byte)                   itself, from element i and byte `byte` of the mask on
//     one(i, bit, channel, sums)      element i, whose bit stands at `bit` in the mask; in scalar code
//     eight(i, byte, channel, sums)   elements i to i + 7, marked ZSQ_AVX2; only where float computes
//     ahead(i)                        asks for element i and its neighbours, or nothing where they end before it
//     sums                            whether sums are wanted
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "csrc/cpu/bn_act8.h"
#include "csrc/cpu/bn_act_sums.h"
#include "csrc/cpu/parallel.h"
#include "kernels/bn_act.h"
#include "kernels/fake_quant.h"

namespace zsq {

// 64 Ki elements take one core 20 to 60 us, several times what it costs to wake another.
constexpr int64_t kGrain = 1 << 16;

// A chunk is what is summed before anything is widened to double: neighbours of one channel, or rows of all channels.
// Its size depends on nothing but the shape, so the sums do not depend on the threads. 512 additions follow one another
// in rows, half as many in neighbours.
constexpr int64_t kPiece = 8 * 512;
inline int64_t rows_of_chunk(int64_t channels) { return std::clamp<int64_t>((1 << 14) / channels, 32, 512); }

// Rows are taken together, as many as fill a page of floats: their channels' numbers are then read once for all, and
// rows that lie a page apart, which the first cache could not hold together, are not.
inline int64_t rows_of_tile(int64_t channels) { return std::max<int64_t>((1 << 10) / channels, 1); }

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
  ZSQ_AVX2 Channel8 eight(int64_t c, int64_t group) const {
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

// Where the bit of an element stands in the mask.
struct Bit {
  int64_t byte;
  int bit;
};

// One channel: n neighbours, and their sums. The operation comes by value: bytes written to the mask might otherwise
// change its pointers.
template <class Op, class C>
Sums<C> row_scalar(Op op, int64_t n, const Channel<C>& channel) {
  Sums<C> sums;
  for (int64_t i = 0; i < n; ++i) op.one(i, Bit{i / 8, static_cast<int>(i % 8)}, channel, sums);
  return sums;
}

// All channels: `count` rows of them, `bytes` apart in the mask; first and second are added to.
template <class Op, class C>
void rows_scalar(Op op, int64_t count, int64_t bytes, const Channels<C>& channels, int64_t group, C* first, C* second) {
  const int64_t n = channels.count;
  for (int64_t c = 0; c < n; ++c) {
    const Channel<C> channel = channels.at(c, group);
    Sums<C> sums;
    for (int64_t r = 0; r < count; ++r) {
      op.one(r * n + c, Bit{r * bytes + c / 8, static_cast<int>(c % 8)}, channel, sums);
    }
    if (op.sums) first[c] = sums.first, second[c] = sums.second;
  }
}

#ifdef ZSQ_HAS_AVX2

ZSQ_AVX2 inline Channel8 everywhere(const Channel<float>& c) {
  return {_mm256_set1_ps(c.norm.a), _mm256_set1_ps(c.norm.b), _mm256_set1_ps(c.norm.mean),
          _mm256_set1_ps(c.slope),  _mm256_set1_ps(c.offset), grid8_of(c.grid)};
}

// Two chains of sums: one would wait for itself. Sixteen floats are a cache line.
template <class Op>
ZSQ_AVX2 Sums<float> row_avx2(Op op, int64_t n, const Channel<float>& channel) {
  // How far ahead memory is asked for, in elements: what one core gets through while it answers.
  constexpr int64_t kAhead = 256;
  const Channel8 c = everywhere(channel);
  Sums8 even = no_sums(), odd = no_sums();
  Sums<float> sums;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    op.ahead(i + kAhead);
    op.eight(i, i / 8, c, even);
    op.eight(i + 8, i / 8 + 1, c, odd);
  }
  for (; i + 8 <= n; i += 8) op.eight(i, i / 8, c, even);
  for (; i < n; ++i) op.one(i, Bit{i / 8, static_cast<int>(i % 8)}, channel, sums);
  if (!op.sums) return sums;
  alignas(32) float t[2][8];
  _mm256_store_ps(t[0], _mm256_add_ps(even.first, odd.first));
  _mm256_store_ps(t[1], _mm256_add_ps(even.second, odd.second));
  for (int k = 0; k < 8; ++k) sums.first += t[0][k], sums.second += t[1][k];
  return sums;
}

// Rows begin to end of 8 * kEights channels from c on; first and second are added to.
template <int kEights, class Op>
ZSQ_AVX2 inline void block_avx2(const Op& op, int64_t begin, int64_t end, int64_t c, int64_t bytes, int64_t next,
                                const Channels<float>& channels, int64_t group, float* first, float* second) {
  const int64_t n = channels.count;
  Channel8 here[kEights];
  Sums8 sums[kEights];
  for (int k = 0; k < kEights; ++k) {
    here[k] = channels.eight(c + 8 * k, group);
    sums[k] = no_sums();
    if (op.sums) sums[k] = {_mm256_loadu_ps(first + c + 8 * k), _mm256_loadu_ps(second + c + 8 * k)};
  }
  for (int64_t r = begin; r < end; ++r) {
    for (int k = 0; k < kEights; k += 2) op.ahead((r + next) * n + c + 8 * k);
    for (int k = 0; k < kEights; ++k) op.eight(r * n + c + 8 * k, r * bytes + c / 8 + k, here[k], sums[k]);
  }
  for (int k = 0; op.sums && k < kEights; ++k) {
    _mm256_storeu_ps(first + c + 8 * k, sums[k].first);
    _mm256_storeu_ps(second + c + 8 * k, sums[k].second);
  }
}

template <class Op>
ZSQ_AVX2 void rows_avx2(Op op, int64_t count, int64_t bytes, const Channels<float>& channels, int64_t group,
                        float* first, float* second) {
  const int64_t n = channels.count, tile = rows_of_tile(n);
  if (op.sums) std::fill(first, first + n, 0.0f), std::fill(second, second + n, 0.0f);
  for (int64_t begin = 0; begin < count; begin += tile) {
    const int64_t end = std::min(count, begin + tile);
    int64_t c = 0;
    // Neighbouring lines one after the other where there are as many: a line of each row in turn takes half as long
    // again.
    for (; c + 64 <= n; c += 64) block_avx2<8>(op, begin, end, c, bytes, tile, channels, group, first, second);
    for (; c + 16 <= n; c += 16) block_avx2<2>(op, begin, end, c, bytes, tile, channels, group, first, second);
    for (; c + 8 <= n; c += 8) block_avx2<1>(op, begin, end, c, bytes, tile, channels, group, first, second);
    for (; c < n; ++c) {
      const Channel<float> here = channels.at(c, group);
      Sums<float> sums;
      if (op.sums) sums = {first[c], second[c]};
      for (int64_t r = begin; r < end; ++r) {
        op.one(r * n + c, Bit{r * bytes + c / 8, static_cast<int>(c % 8)}, here, sums);
      }
      if (op.sums) first[c] = sums.first, second[c] = sums.second;
    }
  }
}

#endif

template <class Op, class C>
Sums<C> row(const Op& op, int64_t n, const Channel<C>& channel, bool simd) {
#ifdef ZSQ_HAS_AVX2
  if constexpr (std::is_same_v<C, float>) {
    if (simd) return row_avx2(op, n, channel);
  }
#endif
  (void)simd;
  return row_scalar(op, n, channel);
}

template <class Op, class C>
void rows(const Op& op, int64_t count, int64_t bytes, const Channels<C>& channels, int64_t group, C* first, C* second,
          bool simd) {
#ifdef ZSQ_HAS_AVX2
  if constexpr (std::is_same_v<C, float>) {
    if (simd) return rows_avx2(op, count, bytes, channels, group, first, second);
  }
#endif
  (void)simd;
  rows_scalar(op, count, bytes, channels, group, first, second);
}

template <class C, class Op>
Partials<C> pass(const Op& op, const Channels<C>& channels, const BnActShape& s, int threads) {
  const bool simd = simd_enabled();
  if (s.last) {
    const int64_t groups = s.per_sample ? s.samples : 1, count = s.per_sample ? s.places : s.samples * s.places;
    const int64_t size = rows_of_chunk(std::max<int64_t>(s.channels, 1)), chunks = ceil_div(count, size);
    const int64_t bytes = ceil_div(s.channels, 8);
    Partials<C> partials(op.sums, groups * chunks, s.channels);
    const int64_t grain = ceil_div(kGrain, std::max<int64_t>(std::min(size, count) * s.channels, 1));
    parallel_for(groups * chunks, grain, threads, [&](int64_t k, int64_t end) {
      for (; k < end; ++k) {
        const int64_t group = k / chunks, offset = k % chunks * size, at = group * count + offset;
        rows(op.from(at * s.channels, at * bytes), std::min(size, count - offset), bytes, channels, group,
             partials.first(k), partials.second(k), simd);
      }
    });
    return partials;
  }
  const int64_t pieces = ceil_div(s.places, kPiece), bytes = ceil_div(s.places, 8);
  Partials<C> partials(op.sums, s.samples * pieces, s.channels);
  const int64_t grain = ceil_div(kGrain, std::max<int64_t>(std::min(kPiece, s.places), 1));
  parallel_for(s.samples * s.channels * pieces, grain, threads, [&](int64_t k, int64_t end) {
    for (; k < end; ++k) {
      const int64_t line = k / pieces, piece = k % pieces, c = line % s.channels, sample = line / s.channels;
      const int64_t offset = piece * kPiece;
      const Sums<C> sums = row(op.from(line * s.places + offset, line * bytes + offset / 8),
                               std::min(kPiece, s.places - offset), channels.at(c, s.per_sample ? sample : 0), simd);
      if (!op.sums) continue;
      partials.first(sample * pieces + piece)[c] = sums.first;
      partials.second(sample * pieces + piece)[c] = sums.second;
    }
  });
  return partials;
}

// Calls run<kAct, T, C>(args, threads) of the caller for args.act and args.dtype.
template <template <Act, class, class> class Run, class T, class C, class Args>
void with_act(const Args& args, int threads) {
  switch (args.act) {
    case Act::none:
      return Run<Act::none, T, C>::call(args, threads);
    case Act::relu:
      return Run<Act::relu, T, C>::call(args, threads);
    case Act::relu6:
      return Run<Act::relu6, T, C>::call(args, threads);
    case Act::silu:
      return Run<Act::silu, T, C>::call(args, threads);
    case Act::hardswish:
      return Run<Act::hardswish, T, C>::call(args, threads);
  }
}

template <template <Act, class, class> class Run, class Args>
void with_dtype(const Args& args, int threads) {
  switch (args.dtype) {
    case DType::f32:
      return with_act<Run, float, float>(args, threads);
    case DType::f16:
      return with_act<Run, f16, float>(args, threads);
    case DType::bf16:
      return with_act<Run, bf16, float>(args, threads);
    case DType::f64:
      return with_act<Run, double, double>(args, threads);
  }
}

}  // namespace zsq
