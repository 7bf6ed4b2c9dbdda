// The pass over all elements that bn_act and its backward share: who meets which channel's numbers, and the totals.
//
// What is done with an element is an operation: a struct of pointers, null where absent, with
//     from(i, byte)                     itself, from element i and byte `byte` of the mask on
//     one(i, bit, channel, totals)      element i, whose bit stands at `bit` in the mask; in scalar code
//     eight(i, byte, channel, totals)   elements i to i + 7, marked ZSQ_AVX2; only where float computes
//     ahead(i)                          asks for element i and its neighbours, or nothing where they end before it
//     sums                              whether sums are wanted
//     kEnds                             whether ends are
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "csrc/cpu/bn_act8.h"
#include "csrc/cpu/bn_act_channels.h"
#include "csrc/cpu/bn_act_totals.h"
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

// Where the bit of an element stands in the mask.
struct Bit {
  int64_t byte;
  int bit;
};

// One channel: n neighbours, and their totals. The operation comes by value: bytes written to the mask might otherwise
// change its pointers.
template <class Op, class C>
Totals<C, Op::kEnds> row_scalar(Op op, int64_t n, const Channel<C>& channel) {
  Totals<C, Op::kEnds> totals;
  for (int64_t i = 0; i < n; ++i) op.one(i, Bit{i / 8, static_cast<int>(i % 8)}, channel, totals);
  return totals;
}

// All channels: `count` rows of them, `bytes` apart in the mask; their totals go to the slots.
template <class Op, class C>
void rows_scalar(Op op, int64_t count, int64_t bytes, const Channels<C>& channels, int64_t group,
                 const Slots<C>& slots) {
  const int64_t n = channels.count;
  for (int64_t c = 0; c < n; ++c) {
    const Channel<C> channel = channels.at(c, group);
    Totals<C, Op::kEnds> totals;
    for (int64_t r = 0; r < count; ++r) {
      op.one(r * n + c, Bit{r * bytes + c / 8, static_cast<int>(c % 8)}, channel, totals);
    }
    put(totals, slots, c, op.sums);
  }
}

#ifdef ZSQ_HAS_AVX2

ZSQ_AVX2 inline Channel8 everywhere(const Channel<float>& c) {
  return {_mm256_set1_ps(c.norm.a), _mm256_set1_ps(c.norm.b), _mm256_set1_ps(c.norm.mean),
          _mm256_set1_ps(c.slope),  _mm256_set1_ps(c.offset), grid8_of(c.grid)};
}

// Two chains of totals: one would wait for itself. Sixteen floats are a cache line.
template <class Op>
ZSQ_AVX2 Totals<float, Op::kEnds> row_avx2(Op op, int64_t n, const Channel<float>& channel) {
  // How far ahead memory is asked for, in elements: what one core gets through while it answers.
  constexpr int64_t kAhead = 256;
  const Channel8 c = everywhere(channel);
  Totals8<Op::kEnds> even = no_totals8<Op::kEnds>(), odd = even;
  Totals<float, Op::kEnds> totals;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    op.ahead(i + kAhead);
    op.eight(i, i / 8, c, even);
    op.eight(i + 8, i / 8 + 1, c, odd);
  }
  for (; i + 8 <= n; i += 8) op.eight(i, i / 8, c, even);
  for (; i < n; ++i) op.one(i, Bit{i / 8, static_cast<int>(i % 8)}, channel, totals);
  if constexpr (Op::kEnds) totals.range = across8(even.ends, odd.ends, totals.ends());
  if (!op.sums) return totals;
  alignas(32) float t[2][8];
  _mm256_store_ps(t[0], _mm256_add_ps(even.first, odd.first));
  _mm256_store_ps(t[1], _mm256_add_ps(even.second, odd.second));
  for (int k = 0; k < 8; ++k) totals.first += t[0][k], totals.second += t[1][k];
  return totals;
}

// Rows begin to end of 8 * kEights channels from c on; the slots' totals go on from what is there.
template <int kEights, class Op>
ZSQ_AVX2 inline void block_avx2(const Op& op, int64_t begin, int64_t end, int64_t c, int64_t bytes, int64_t next,
                                const Channels<float>& channels, int64_t group, const Slots<float>& slots) {
  const int64_t n = channels.count;
  Channel8 here[kEights];
  Totals8<Op::kEnds> totals[kEights];
  for (int k = 0; k < kEights; ++k) {
    here[k] = channels.eight(c + 8 * k, group);
    totals[k] = totals8_at<Op::kEnds>(slots, c + 8 * k, op.sums);
  }
  for (int64_t r = begin; r < end; ++r) {
    for (int k = 0; k < kEights; k += 2) op.ahead((r + next) * n + c + 8 * k);
    for (int k = 0; k < kEights; ++k) op.eight(r * n + c + 8 * k, r * bytes + c / 8 + k, here[k], totals[k]);
  }
  for (int k = 0; k < kEights; ++k) put8(totals[k], slots, c + 8 * k, op.sums);
}

template <class Op>
ZSQ_AVX2 void rows_avx2(Op op, int64_t count, int64_t bytes, const Channels<float>& channels, int64_t group,
                        const Slots<float>& slots) {
  const int64_t n = channels.count, tile = rows_of_tile(n);
  clear(slots, n);
  for (int64_t begin = 0; begin < count; begin += tile) {
    const int64_t end = std::min(count, begin + tile);
    int64_t c = 0;
    // Neighbouring lines one after the other where there are as many: a line of each row in turn takes half as long
    // again.
    for (; c + 64 <= n; c += 64) block_avx2<8>(op, begin, end, c, bytes, tile, channels, group, slots);
    for (; c + 16 <= n; c += 16) block_avx2<2>(op, begin, end, c, bytes, tile, channels, group, slots);
    for (; c + 8 <= n; c += 8) block_avx2<1>(op, begin, end, c, bytes, tile, channels, group, slots);
    for (; c < n; ++c) {
      const Channel<float> here = channels.at(c, group);
      Totals<float, Op::kEnds> totals = totals_at<Op::kEnds>(slots, c, op.sums);
      for (int64_t r = begin; r < end; ++r) {
        op.one(r * n + c, Bit{r * bytes + c / 8, static_cast<int>(c % 8)}, here, totals);
      }
      put(totals, slots, c, op.sums);
    }
  }
}

#endif

template <class Op, class C>
Totals<C, Op::kEnds> row(const Op& op, int64_t n, const Channel<C>& channel, bool simd) {
#ifdef ZSQ_HAS_AVX2
  if constexpr (std::is_same_v<C, float>) {
    if (simd) return row_avx2(op, n, channel);
  }
#endif
  (void)simd;
  return row_scalar(op, n, channel);
}

template <class Op, class C>
void rows(const Op& op, int64_t count, int64_t bytes, const Channels<C>& channels, int64_t group, const Slots<C>& slots,
          bool simd) {
#ifdef ZSQ_HAS_AVX2
  if constexpr (std::is_same_v<C, float>) {
    if (simd) return rows_avx2(op, count, bytes, channels, group, slots);
  }
#endif
  (void)simd;
  rows_scalar(op, count, bytes, channels, group, slots);
}

template <class C, class Op>
Partials<C> pass(const Op& op, const Channels<C>& channels, const BnActShape& s, int threads) {
  const bool simd = simd_enabled();
  if (s.last) {
    const int64_t groups = s.per_sample ? s.samples : 1, count = s.per_sample ? s.places : s.samples * s.places;
    const int64_t size = rows_of_chunk(std::max<int64_t>(s.channels, 1)), chunks = ceil_div(count, size);
    const int64_t bytes = ceil_div(s.channels, 8);
    Partials<C> partials(op.sums, Op::kEnds, groups * chunks, s.channels);
    const int64_t grain = ceil_div(kGrain, std::max<int64_t>(std::min(size, count) * s.channels, 1));
    parallel_for(groups * chunks, grain, threads, [&](int64_t k, int64_t end) {
      for (; k < end; ++k) {
        const int64_t group = k / chunks, offset = k % chunks * size, at = group * count + offset;
        rows(op.from(at * s.channels, at * bytes), std::min(size, count - offset), bytes, channels, group,
             partials.at(k), simd);
      }
    });
    return partials;
  }
  const int64_t pieces = ceil_div(s.places, kPiece), bytes = ceil_div(s.places, 8);
  Partials<C> partials(op.sums, Op::kEnds, s.samples * pieces, s.channels);
  const int64_t grain = ceil_div(kGrain, std::max<int64_t>(std::min(kPiece, s.places), 1));
  parallel_for(s.samples * s.channels * pieces, grain, threads, [&](int64_t k, int64_t end) {
    for (; k < end; ++k) {
      const int64_t line = k / pieces, piece = k % pieces, c = line % s.channels, sample = line / s.channels;
      const int64_t offset = piece * kPiece;
      put(row(op.from(line * s.places + offset, line * bytes + offset / 8), std::min(kPiece, s.places - offset),
              channels.at(c, s.per_sample ? sample : 0), simd),
          partials.at(sample * pieces + piece), c, op.sums);
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
