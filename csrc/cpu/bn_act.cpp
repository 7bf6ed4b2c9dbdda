#include "csrc/cpu/bn_act.h"

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "csrc/cpu/half.h"
#include "csrc/cpu/exp8.h"
#include "csrc/cpu/parallel.h"
#include "csrc/cpu/simd.h"

namespace zsq {
namespace {

// 64 Ki elements take one core 20 to 60 us, several times what it costs to wake another.
constexpr int64_t kGrain = 1 << 16;

// A chunk is what is summed before anything is widened to double: neighbours of one channel, or rows of all channels.
// Its size depends on nothing but the shape, so the sums do not depend on the threads. 512 additions follow one
// another in either; rows that do not fit into the second cache any more are cut shorter.
constexpr int64_t kPiece = 8 * 512;
int64_t rows_of_chunk(int64_t channels) { return std::clamp<int64_t>((1 << 14) / channels, 32, 512); }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What the loops below do with a stretch of elements. Absent pointers are null.
template <class T>
struct Forward {
  const T* u;
  const T* residual;
  T* y;
  bool sums;

  Forward operator+(int64_t i) const { return {u + i, residual ? residual + i : nullptr, y ? y + i : nullptr, sums}; }
};

template <class T>
struct Backward {
  const T* u;
  const T* grad;
  const T* residual;
  T* du;
  T* dr;
  bool sums, stats;

  Backward operator+(int64_t i) const {
    return {u + i,
            grad ? grad + i : nullptr,
            residual ? residual + i : nullptr,
            du ? du + i : nullptr,
            dr ? dr + i : nullptr,
            sums,
            stats};
  }
};

// One channel's numbers: its norm, and for the backward what a loss on the sums sends to it.
template <class C>
struct Channel {
  Norm<C> norm;
  C slope, offset;
};

template <class C>
struct Sums {
  C first{}, second{};
};

// Where the bits of element i and its neighbours go; `byte` is null where none are wanted.
struct Bits {
  uint8_t* byte;

  Bits operator+(int64_t bytes) const { return {byte ? byte + bytes : nullptr}; }
  void put(int bit, bool on) const {
    if (bit == 0) *byte = 0;
    *byte |= static_cast<uint8_t>(on << bit);
  }
};

struct ConstBits {
  const uint8_t* byte;

  ConstBits operator+(int64_t bytes) const { return {byte ? byte + bytes : nullptr}; }
};

template <Act kAct, class T, class C>
inline void one(const Forward<T>& s, int64_t i, Bits bits, int bit, const Channel<C>& channel, Sums<C>& sums) {
  const C u = widen(s.u[i]);
  if (s.y) {
    C v = before_activation(u, channel.norm);
    if (s.residual) v = add(v, C(widen(s.residual[i])));
    if (bits.byte) bits.put(bit, passes<kAct>(v));
    narrow(activated<kAct>(v), s.y[i]);
  }
  if (s.sums) {
    const C d = sub(u, channel.norm.mean);
    sums.first += d;
    sums.second += mul(d, d);
  }
}

template <Act kAct, class T, class C>
inline void one(const Backward<T>& s, int64_t i, ConstBits bits, int bit, const Channel<C>& channel, Sums<C>& sums) {
  const C u = widen(s.u[i]), d = sub(u, channel.norm.mean);
  C w{};
  if (s.grad) {
    C g = widen(s.grad[i]);
    if (bits.byte) {
      g = *bits.byte >> bit & 1 ? g : C(0);
    } else if (kAct != Act::none) {
      C v = before_activation(u, channel.norm);
      if (s.residual) v = add(v, C(widen(s.residual[i])));
      g = through<kAct>(g, v);
    }
    if (s.dr) narrow(g, s.dr[i]);
    if (s.sums) {
      sums.first += g;
      sums.second += mul(g, d);
    }
    w = mul(channel.norm.a, g);
  }
  if (s.du) {
    if (s.stats) {
      const C q = of_sums(d, channel.slope, channel.offset);
      w = s.grad ? add(w, q) : q;
    }
    narrow(w, s.du[i]);
  }
}

// One channel: n neighbours. The stretch comes by value: bytes written to the mask might otherwise change its pointers.
template <Act kAct, class S, class B, class C>
Sums<C> row_scalar(S s, B bits, int64_t n, const Channel<C>& channel) {
  Sums<C> sums;
  for (int64_t i = 0; i < n; ++i) one<kAct>(s, i, bits + i / 8, static_cast<int>(i % 8), channel, sums);
  return sums;
}

// All channels: rows of them, `bytes` apart in the mask.
template <Act kAct, class S, class B, class C>
void rows_scalar(S s, B bits, int64_t bytes, int64_t rows, const std::vector<Channel<C>>& channels, C* first,
                 C* second) {
  const int64_t n = static_cast<int64_t>(channels.size());
  for (int64_t c = 0; c < n; ++c) {
    Sums<C> sums;
    for (int64_t r = 0; r < rows; ++r) {
      one<kAct>(s, r * n + c, bits + (r * bytes + c / 8), static_cast<int>(c % 8), channels[c], sums);
    }
    if (s.sums) first[c] = sums.first, second[c] = sums.second;
  }
}

#ifdef ZSQ_HAS_AVX2

struct Channel8 {
  __m256 a, b, mean, slope, offset;
};

struct Sums8 {
  __m256 first, second;
};

ZSQ_AVX2 inline Sums8 no_sums() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }

ZSQ_AVX2 inline Channel8 everywhere(const Channel<float>& c) {
  return {_mm256_set1_ps(c.norm.a), _mm256_set1_ps(c.norm.b), _mm256_set1_ps(c.norm.mean), _mm256_set1_ps(c.slope),
          _mm256_set1_ps(c.offset)};
}

ZSQ_AVX2 inline Channel8 side_by_side(const Channel<float>* c) {
  alignas(32) float t[5][8];
  for (int k = 0; k < 8; ++k) {
    t[0][k] = c[k].norm.a;
    t[1][k] = c[k].norm.b;
    t[2][k] = c[k].norm.mean;
    t[3][k] = c[k].slope;
    t[4][k] = c[k].offset;
  }
  return {_mm256_load_ps(t[0]), _mm256_load_ps(t[1]), _mm256_load_ps(t[2]), _mm256_load_ps(t[3]), _mm256_load_ps(t[4])};
}

ZSQ_AVX2 inline __m256 one_plus_exp_of_minus(__m256 v) {
  return _mm256_add_ps(_mm256_set1_ps(1.0f), exp8(_mm256_xor_ps(v, _mm256_set1_ps(-0.0f))));
}

// The functions of kernels/bn_act.h, for eight.
template <Act kAct>
ZSQ_AVX2 inline __m256 activated8(__m256 v) {
  const __m256 zero = _mm256_setzero_ps(), six = _mm256_set1_ps(6.0f);
  if constexpr (kAct == Act::relu) return _mm256_max_ps(zero, v);
  if constexpr (kAct == Act::relu6) return _mm256_min_ps(six, _mm256_max_ps(zero, v));
  if constexpr (kAct == Act::silu) return _mm256_div_ps(v, one_plus_exp_of_minus(v));
  if constexpr (kAct == Act::hardswish) {
    const __m256 gate = _mm256_min_ps(six, _mm256_max_ps(zero, _mm256_add_ps(v, _mm256_set1_ps(3.0f))));
    return _mm256_mul_ps(_mm256_mul_ps(v, gate), _mm256_set1_ps(static_cast<float>(1.0 / 6)));
  }
  return v;
}

template <Act kAct>
ZSQ_AVX2 inline __m256 passes8(__m256 v) {
  const __m256 above = _mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NLE_UQ);
  if constexpr (kAct == Act::relu6) return _mm256_and_ps(above, _mm256_cmp_ps(v, _mm256_set1_ps(6.0f), _CMP_NGE_UQ));
  return above;
}

template <Act kAct>
ZSQ_AVX2 inline __m256 through8(__m256 g, __m256 v) {
  const __m256 one = _mm256_set1_ps(1.0f), three = _mm256_set1_ps(3.0f);
  if constexpr (kAct == Act::relu || kAct == Act::relu6) return _mm256_and_ps(g, passes8<kAct>(v));
  if constexpr (kAct == Act::silu) {
    const __m256 s = _mm256_div_ps(one, one_plus_exp_of_minus(v));
    const __m256 slope = _mm256_mul_ps(s, _mm256_add_ps(one, _mm256_mul_ps(v, _mm256_sub_ps(one, s))));
    return _mm256_mul_ps(g, slope);
  }
  if constexpr (kAct == Act::hardswish) {
    const __m256 third = _mm256_set1_ps(static_cast<float>(1.0 / 3));
    const __m256 slope = _mm256_add_ps(_mm256_mul_ps(v, third), _mm256_set1_ps(0.5f));
    const __m256 inside = _mm256_cmp_ps(v, three, _CMP_LT_OQ);
    const __m256 out = _mm256_blendv_ps(g, _mm256_mul_ps(g, slope), inside);
    return _mm256_andnot_ps(_mm256_cmp_ps(v, _mm256_set1_ps(-3.0f), _CMP_LE_OQ), out);
  }
  return g;
}

ZSQ_AVX2 inline __m256 lanes_of(uint8_t byte) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(byte), bit), bit));
}

template <Act kAct, class T>
ZSQ_AVX2 inline void eight(const Forward<T>& s, int64_t i, Bits bits, const Channel8& c, Sums8& sums) {
  const __m256 u = load8(s.u + i);
  if (s.y) {
    __m256 v = _mm256_add_ps(_mm256_mul_ps(c.a, u), c.b);
    if (s.residual) v = _mm256_add_ps(v, load8(s.residual + i));
    if (bits.byte) *bits.byte = static_cast<uint8_t>(_mm256_movemask_ps(passes8<kAct>(v)));
    store8(s.y + i, activated8<kAct>(v));
  }
  if (s.sums) {
    const __m256 d = _mm256_sub_ps(u, c.mean);
    sums.first = _mm256_add_ps(sums.first, d);
    sums.second = _mm256_add_ps(sums.second, _mm256_mul_ps(d, d));
  }
}

template <Act kAct, class T>
ZSQ_AVX2 inline void eight(const Backward<T>& s, int64_t i, ConstBits bits, const Channel8& c, Sums8& sums) {
  const __m256 u = load8(s.u + i), d = _mm256_sub_ps(u, c.mean);
  __m256 w = _mm256_setzero_ps();
  if (s.grad) {
    __m256 g = load8(s.grad + i);
    if (bits.byte) {
      g = _mm256_and_ps(g, lanes_of(*bits.byte));
    } else if (kAct != Act::none) {
      __m256 v = _mm256_add_ps(_mm256_mul_ps(c.a, u), c.b);
      if (s.residual) v = _mm256_add_ps(v, load8(s.residual + i));
      g = through8<kAct>(g, v);
    }
    if (s.dr) store8(s.dr + i, g);
    if (s.sums) {
      sums.first = _mm256_add_ps(sums.first, g);
      sums.second = _mm256_add_ps(sums.second, _mm256_mul_ps(g, d));
    }
    w = _mm256_mul_ps(c.a, g);
  }
  if (s.du) {
    if (s.stats) {
      const __m256 q = _mm256_add_ps(_mm256_mul_ps(c.slope, d), c.offset);
      w = s.grad ? _mm256_add_ps(w, q) : q;
    }
    store8(s.du + i, w);
  }
}

template <Act kAct, class S, class B>
ZSQ_AVX2 Sums<float> row_avx2(S s, B bits, int64_t n, const Channel<float>& channel) {
  const Channel8 c = everywhere(channel);
  Sums8 lanes = no_sums();
  Sums<float> sums;
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) eight<kAct>(s, i, bits + i / 8, c, lanes);
  for (; i < n; ++i) one<kAct>(s, i, bits + i / 8, static_cast<int>(i % 8), channel, sums);
  alignas(32) float t[2][8];
  _mm256_store_ps(t[0], lanes.first);
  _mm256_store_ps(t[1], lanes.second);
  for (int k = 0; k < 8; ++k) sums.first += t[0][k], sums.second += t[1][k];
  return sums;
}

// 16 channels at a time where there are as many: a cache line of floats.
template <Act kAct, class S, class B>
ZSQ_AVX2 void rows_avx2(S s, B bits, int64_t bytes, int64_t rows, const std::vector<Channel<float>>& channels,
                        float* first, float* second) {
  const int64_t n = static_cast<int64_t>(channels.size());
  int64_t c = 0;
  for (; c + 16 <= n; c += 16) {
    const Channel8 left = side_by_side(&channels[c]), right = side_by_side(&channels[c + 8]);
    Sums8 sums[2] = {no_sums(), no_sums()};
    for (int64_t r = 0; r < rows; ++r) {
      eight<kAct>(s, r * n + c, bits + (r * bytes + c / 8), left, sums[0]);
      eight<kAct>(s, r * n + c + 8, bits + (r * bytes + c / 8 + 1), right, sums[1]);
    }
    for (int k = 0; s.sums && k < 2; ++k) {
      _mm256_storeu_ps(first + c + 8 * k, sums[k].first);
      _mm256_storeu_ps(second + c + 8 * k, sums[k].second);
    }
  }
  for (; c + 8 <= n; c += 8) {
    const Channel8 here = side_by_side(&channels[c]);
    Sums8 sums = no_sums();
    for (int64_t r = 0; r < rows; ++r) eight<kAct>(s, r * n + c, bits + (r * bytes + c / 8), here, sums);
    if (s.sums) {
      _mm256_storeu_ps(first + c, sums.first);
      _mm256_storeu_ps(second + c, sums.second);
    }
  }
  for (; c < n; ++c) {
    Sums<float> sums;
    for (int64_t r = 0; r < rows; ++r) {
      one<kAct>(s, r * n + c, bits + (r * bytes + c / 8), static_cast<int>(c % 8), channels[c], sums);
    }
    if (s.sums) first[c] = sums.first, second[c] = sums.second;
  }
}

#endif

template <Act kAct, class S, class B, class C>
Sums<C> row(const S& s, B bits, int64_t n, const Channel<C>& channel, bool simd) {
#ifdef ZSQ_HAS_AVX2
  if constexpr (std::is_same_v<C, float>) {
    if (simd) return row_avx2<kAct>(s, bits, n, channel);
  }
#endif
  (void)simd;
  return row_scalar<kAct>(s, bits, n, channel);
}

template <Act kAct, class S, class B, class C>
void rows(const S& s, B bits, int64_t bytes, int64_t count, const std::vector<Channel<C>>& channels, C* first,
          C* second, bool simd) {
#ifdef ZSQ_HAS_AVX2
  if constexpr (std::is_same_v<C, float>) {
    if (simd) return rows_avx2<kAct>(s, bits, bytes, count, channels, first, second);
  }
#endif
  (void)simd;
  rows_scalar<kAct>(s, bits, bytes, count, channels, first, second);
}

// The parameters of all channels. Without var there is no y, and only the mean is read.
template <class C, class A>
std::vector<Channel<C>> channels_of(const A& a) {
  const C *mean = static_cast<const C*>(a.mean), *var = static_cast<const C*>(a.var);
  const C *gamma = static_cast<const C*>(a.gamma), *beta = static_cast<const C*>(a.beta);
  std::vector<Channel<C>> channels(a.shape.channels);
  for (int64_t c = 0; c < a.shape.channels; ++c) {
    channels[c].norm.mean = mean[c];
    if (var) channels[c].norm = norm(mean[c], var[c], gamma ? gamma[c] : C(1), beta ? beta[c] : C(0), C(a.eps));
  }
  return channels;
}

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

// Runs a pass over all elements, one chunk after the other. `set(group, channels)` writes what a loss sends to the
// channels of a group.
template <Act kAct, class C, class S, class B, class A, class Set>
std::unique_ptr<Partials<C>> pass(const A& a, int threads, const S& all, B bits, bool per_sample, const Set& set) {
  const bool simd = simd_enabled();
  const std::vector<Channel<C>> channels = channels_of<C>(a);
  if (a.shape.last) {
    const int64_t groups = per_sample ? a.shape.samples : 1,
                  count = per_sample ? a.shape.places : a.shape.samples * a.shape.places;
    const int64_t size = rows_of_chunk(std::max<int64_t>(a.shape.channels, 1)), chunks = ceil_div(count, size);
    const int64_t bytes = ceil_div(a.shape.channels, 8);
    auto partials = std::make_unique<Partials<C>>(all.sums, groups * chunks, a.shape.channels);
    const int64_t grain = ceil_div(kGrain, std::max<int64_t>(std::min(size, count) * a.shape.channels, 1));
    parallel_for(groups * chunks, grain, threads, [&](int64_t begin, int64_t end) {
      std::vector<Channel<C>> mine = channels;
      for (int64_t k = begin; k < end; ++k) {
        const int64_t group = k / chunks, offset = k % chunks * size, at = group * count + offset;
        if (k == begin || offset == 0) set(group, mine);
        rows<kAct>(all + at * a.shape.channels, bits + at * bytes, bytes, std::min(size, count - offset), mine,
                   partials->first(k), partials->second(k), simd);
      }
    });
    return partials;
  }
  const int64_t pieces = ceil_div(a.shape.places, kPiece), bytes = ceil_div(a.shape.places, 8);
  auto partials = std::make_unique<Partials<C>>(all.sums, a.shape.samples * pieces, a.shape.channels);
  const int64_t grain = ceil_div(kGrain, std::max<int64_t>(std::min(kPiece, a.shape.places), 1));
  parallel_for(a.shape.samples * a.shape.channels * pieces, grain, threads, [&](int64_t begin, int64_t end) {
    std::vector<Channel<C>> mine = channels;
    for (int64_t k = begin; k < end; ++k) {
      const int64_t line = k / pieces, piece = k % pieces, c = line % a.shape.channels,
                    sample = line / a.shape.channels;
      if (k == begin || (c == 0 && piece == 0)) set(per_sample ? sample : 0, mine);
      const int64_t offset = piece * kPiece;
      const Sums<C> sums = row<kAct>(all + (line * a.shape.places + offset), bits + (line * bytes + offset / 8),
                                     std::min(kPiece, a.shape.places - offset), mine[c], simd);
      if (all.sums) {
        partials->first(sample * pieces + piece)[c] = sums.first;
        partials->second(sample * pieces + piece)[c] = sums.second;
      }
    }
  });
  return partials;
}

template <Act kAct, class T, class C>
void forward(const BnActArgs& a, int threads) {
  const Forward<T> all{static_cast<const T*>(a.u), static_cast<const T*>(a.residual), static_cast<T*>(a.y),
                       a.s1 != nullptr};
  const auto partials =
      pass<kAct, C>(a, threads, all, Bits{a.mask}, a.shape.per_sample, [](int64_t, std::vector<Channel<C>>&) {});
  if (a.s1) partials->add_up(a.shape.per_sample ? a.shape.samples : 1, static_cast<C*>(a.s1), static_cast<C*>(a.s2));
}

template <Act kAct, class T, class C>
void backward(const BnActBackwardArgs& a, int threads) {
  const C *s1 = static_cast<const C*>(a.grad_s1), *s2 = static_cast<const C*>(a.grad_s2);
  const Backward<T> all{static_cast<const T*>(a.u),
                        static_cast<const T*>(a.grad),
                        static_cast<const T*>(a.residual),
                        static_cast<T*>(a.du),
                        static_cast<T*>(a.dr),
                        a.dgamma != nullptr,
                        s1 != nullptr};
  const auto set = [&](int64_t group, std::vector<Channel<C>>& channels) {
    for (int64_t c = 0; s1 && c < a.shape.channels; ++c) {
      channels[c].slope = C(2) * s2[group * a.shape.channels + c];
      channels[c].offset = s1[group * a.shape.channels + c];
    }
  };
  const auto partials = pass<kAct, C>(a, threads, all, ConstBits{a.mask}, a.shape.per_sample && s1, set);
  if (a.dgamma) {
    C* dgamma = static_cast<C*>(a.dgamma);
    partials->add_up(1, static_cast<C*>(a.dbeta), dgamma);
    for (int64_t c = 0; c < a.shape.channels; ++c) {
      dgamma[c] = mul(dgamma[c], inverse_deviation(static_cast<const C*>(a.var)[c], C(a.eps)));
    }
  }
}

template <Act kAct, class T, class C>
void run(const BnActArgs& a, int threads) {
  forward<kAct, T, C>(a, threads);
}

template <Act kAct, class T, class C>
void run(const BnActBackwardArgs& a, int threads) {
  backward<kAct, T, C>(a, threads);
}

template <class T, class C, class A>
void with_act(const A& a, int threads) {
  switch (a.act) {
    case Act::none:
      return run<Act::none, T, C>(a, threads);
    case Act::relu:
      return run<Act::relu, T, C>(a, threads);
    case Act::relu6:
      return run<Act::relu6, T, C>(a, threads);
    case Act::silu:
      return run<Act::silu, T, C>(a, threads);
    case Act::hardswish:
      return run<Act::hardswish, T, C>(a, threads);
  }
}

template <class A>
void with_dtype(const A& a, int threads) {
  switch (a.dtype) {
    case DType::f32:
      return with_act<float, float>(a, threads);
    case DType::f16:
      return with_act<f16, float>(a, threads);
    case DType::bf16:
      return with_act<bf16, float>(a, threads);
    case DType::f64:
      return with_act<double, double>(a, threads);
  }
}

}  // namespace

void bn_act(const BnActArgs& args, int threads) { with_dtype(args, threads); }

void bn_act_backward(const BnActBackwardArgs& args, int threads) { with_dtype(args, threads); }

}  // namespace zsq
