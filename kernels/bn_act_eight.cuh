// What a thread of bn_act's kernels does with 8 neighbours, in the forward and in the backward. Arithmetic: bn_act.h
// and fake_quant.h.
#pragma once

#include <cstring>

#include "bn_act.cuh"
#include "channel_range.h"
#include "fake_quant.h"
#include "pack.cuh"

namespace zsq {

// Neighbours per thread: a byte of the mask; 16 bytes of a 16-bit type, and twice that of float.
constexpr int kEight = 8;

// The first n of 8 neighbours. `packed` says that whole packs fit everywhere: rows are as long and memory is aligned.
template <class T>
__device__ __forceinline__ void load8(float (&out)[kEight], const T* p, int n, bool packed) {
  constexpr int kSize = Pack<T>::kSize;
  if (packed) {
#pragma unroll
    for (int k = 0; k < kEight; k += kSize) {
      if (k >= n) return;
      const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(p + k);
#pragma unroll
      for (int j = 0; j < kSize; ++j) out[k + j] = widen(pack.v[j]);
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < kEight; ++k) {
    if (k < n) out[k] = widen(p[k]);
  }
}

template <class T>
__device__ __forceinline__ void store8(T* p, const float (&v)[kEight], int n, bool packed) {
  constexpr int kSize = Pack<T>::kSize;
  if (packed) {
#pragma unroll
    for (int k = 0; k < kEight; k += kSize) {
      if (k >= n) return;
      Pack<T> pack;
#pragma unroll
      for (int j = 0; j < kSize; ++j) narrow(v[k + j], pack.v[j]);
      // Said outright: a plain store's first element gets merged with that of the loop below, and the pack torn apart.
      uint4 words;
      memcpy(&words, &pack, sizeof(words));
      __stwb(reinterpret_cast<uint4*>(p + k), words);
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < kEight; ++k) {
    if (k < n) narrow(v[k], p[k]);
  }
}

// Everything below is inlined by force: arrays passed by reference would otherwise have to live in memory.

// What is left of v once it was stored in T.
template <class T>
__device__ __forceinline__ float as_stored(float v) {
  T stored;
  narrow(v, stored);
  return widen(stored);
}

// Calls f with the activation as a constant: one branch for 8 elements, and all threads take the same.
template <class F>
__device__ __forceinline__ void with_act(Act act, const F& f) {
  switch (act) {
    case Act::none:
      return f.template run<Act::none>();
    case Act::relu:
      return f.template run<Act::relu>();
    case Act::relu6:
      return f.template run<Act::relu6>();
    case Act::silu:
      return f.template run<Act::silu>();
    case Act::hardswish:
      return f.template run<Act::hardswish>();
  }
}

struct Activate {
  float (&v)[kEight];
  uint32_t& passing;

  template <Act kAct>
  __device__ __forceinline__ void run() const {
    uint32_t bits = 0;
#pragma unroll
    for (int k = 0; k < kEight; ++k) {
      bits |= uint32_t(passes<kAct>(v[k])) << k;
      v[k] = activated<kAct>(v[k]);
    }
    passing = bits;
  }
};

// The quantizer's numbers of channel c.
__device__ __forceinline__ Grid<float> grid_of(const BnActQuant& q, int64_t c) {
  const int64_t at = c * q.stride;
  return {__ldg(static_cast<const float*>(q.scale) + at), static_cast<float>(__ldg(q.zero_point + at)),
          static_cast<float>(q.qmin), static_cast<float>(q.qmax)};
}

// g before the activation, from the one behind it, and behind the quantizer where that clips.
template <class T, bool kLast, bool kQuant>
struct Through {
  float (&g)[kEight];
  const float (&v)[kEight];
  const BnActQuant& quant;
  int64_t channel;
  int n;

  template <Act kAct>
  __device__ __forceinline__ void run() const {
    if (kQuant) {
      Grid<float> q = grid_of(quant, channel);
#pragma unroll
      for (int k = 0; k < kEight; ++k) {
        if (kLast && k > 0 && k < n && quant.stride) q = grid_of(quant, channel + k);
        g[k] = inside(as_stored<T>(activated<kAct>(v[k])), q) ? g[k] : 0.0f;
      }
    }
#pragma unroll
    for (int k = 0; k < kEight; ++k) g[k] = through<kAct>(g[k], v[k]);
  }
};

__device__ __forceinline__ float number(const void* p, int64_t c, float absent) {
  return p ? __ldg(static_cast<const float*>(p) + c) : absent;
}

// What 8 neighbours have in common, or each for itself where they lie in 8 channels.
template <bool kLast>
struct Channels {
  static constexpr int kCount = kLast ? kEight : 1;
  Norm<float> norm[kCount];
  float slope[kCount], offset[kCount];  // what a loss on the sums sends: 2 gS2 and gS1
  float first[kCount], second[kCount];  // sums
  Range<float> ends[kCount];            // of what enters the quantizer, not yet rounded: that keeps the order

  static __device__ int of(int k) { return kLast ? k : 0; }

  // From channel c on, n of them there.
  template <class A>
  __device__ __forceinline__ void read(const A& a, int64_t c, int n) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      norm[k] = {0.0f, 0.0f, 0.0f};
      slope[k] = offset[k] = first[k] = second[k] = 0.0f;
      ends[k] = empty_range<float>();
      if (kLast && k >= n) continue;
      const float mean = number(a.norm.mean, c + k, 0.0f);
      norm[k].mean = mean;
      if (a.norm.var) {
        norm[k] = zsq::norm(mean, number(a.norm.var, c + k, 1.0f), number(a.norm.gamma, c + k, 1.0f),
                            number(a.norm.beta, c + k, 0.0f), static_cast<float>(a.norm.eps));
      }
    }
  }

  __device__ __forceinline__ void read_loss(const float* s1, const float* s2, int64_t at, int n) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (kLast && k >= n) continue;
      slope[k] = mul(2.0f, __ldg(s2 + at + k));
      offset[k] = __ldg(s1 + at + k);
    }
  }
};

// 8 neighbours from element i on, n of them there, of `channel` or of the channels from there on. A grid is read where
// it is met: 8 of them kept over all rows would not leave the registers to anything else.
template <class T, bool kLast, bool kQuant, bool kEnds>
__device__ __forceinline__ void eight(const CudaBnActArgs& a, Channels<kLast>& c, int64_t channel, int64_t i,
                                      int64_t byte, int n, bool packed) {
  using C = Channels<kLast>;
  float u[kEight] = {};
  load8(u, static_cast<const T*>(a.u) + i, n, packed);
  if (a.s1) {
#pragma unroll
    for (int k = 0; k < kEight; ++k) {
      if (k >= n) continue;
      const float d = sub(u[k], c.norm[C::of(k)].mean);
      c.first[C::of(k)] = add(c.first[C::of(k)], d);
      c.second[C::of(k)] = add(c.second[C::of(k)], mul(d, d));
    }
  }
  if (!a.y) return;
#pragma unroll
  for (int k = 0; k < kEight; ++k) u[k] = before_activation(u[k], c.norm[C::of(k)]);
  if (a.residual) {
    float r[kEight] = {};
    load8(r, static_cast<const T*>(a.residual) + i, n, packed);
#pragma unroll
    for (int k = 0; k < kEight; ++k) u[k] = add(u[k], r[k]);
  }
  uint32_t passing = 0;
  with_act(a.act, Activate{u, passing});
  if (kEnds) {
#pragma unroll
    for (int k = 0; k < kEight; ++k) {
      if (k < n) c.ends[C::of(k)] = with(c.ends[C::of(k)], u[k]);
    }
  }
  if (kQuant) {
    Grid<float> q = grid_of(a.quant, channel);
#pragma unroll
    for (int k = 0; k < kEight; ++k) {
      if (kLast && k > 0 && k < n && a.quant.stride) q = grid_of(a.quant, channel + k);
      const float stored = as_stored<T>(u[k]);
      if (a.quant.clip && !inside(stored, q)) passing &= ~(1u << k);
      u[k] = fake_quant(stored, q);
    }
  }
  if (a.mask) a.mask[byte] = static_cast<uint8_t>(passing & ((1u << n) - 1));
  store8(static_cast<T*>(a.y) + i, u, n, packed);
}

template <class T, bool kLast, bool kQuant, bool kEnds>
__device__ __forceinline__ void eight(const CudaBnActBackwardArgs& a, Channels<kLast>& c, int64_t channel, int64_t i,
                                      int64_t byte, int n, bool packed) {
  using C = Channels<kLast>;
  float u[kEight] = {}, g[kEight] = {};
  load8(u, static_cast<const T*>(a.u) + i, n, packed);
  if (a.grad) {
    load8(g, static_cast<const T*>(a.grad) + i, n, packed);
    if (a.mask) {
      const uint8_t passing = a.mask[byte];
#pragma unroll
      for (int k = 0; k < kEight; ++k) g[k] = passing >> k & 1 ? g[k] : 0.0f;
    } else {
      float v[kEight];
#pragma unroll
      for (int k = 0; k < kEight; ++k) v[k] = before_activation(u[k], c.norm[C::of(k)]);
      if (a.residual) {
        float r[kEight] = {};
        load8(r, static_cast<const T*>(a.residual) + i, n, packed);
#pragma unroll
        for (int k = 0; k < kEight; ++k) v[k] = add(v[k], r[k]);
      }
      with_act(a.act, Through<T, kLast, kQuant>{g, v, a.quant, channel, n});
    }
    if (a.dr) store8(static_cast<T*>(a.dr) + i, g, n, packed);
  }
#pragma unroll
  for (int k = 0; k < kEight; ++k) {
    const int at = C::of(k);
    const float d = sub(u[k], c.norm[at].mean);
    if (a.dgamma && k < n) {
      c.first[at] = add(c.first[at], g[k]);
      c.second[at] = add(c.second[at], mul(g[k], d));
    }
    if (!a.grad_s1) {
      u[k] = mul(c.norm[at].a, g[k]);
    } else {
      const float q = of_sums(d, c.slope[at], c.offset[at]);
      u[k] = a.grad ? add(mul(c.norm[at].a, g[k]), q) : q;
    }
  }
  if (a.du) store8(static_cast<T*>(a.du) + i, u, n, packed);
}

__device__ __forceinline__ void read_loss(const CudaBnActArgs&, Channels<true>&, int64_t, int) {}
__device__ __forceinline__ void read_loss(const CudaBnActArgs&, Channels<false>&, int64_t, int) {}

template <bool kLast>
__device__ __forceinline__ void read_loss(const CudaBnActBackwardArgs& a, Channels<kLast>& c, int64_t at, int n) {
  if (a.grad_s1) c.read_loss(a.grad_s1, a.grad_s2, at, n);
}

}  // namespace zsq
