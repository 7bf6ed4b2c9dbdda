// What one thread does for a pack of a tensor, alone or among many.
#pragma once

#include "fake_quant.cuh"
#include "grid.cuh"
#include "pack.cuh"

namespace zsq {

// How the elements of one pack meet the channels.
enum class Channels {
  kOne,    // all in one channel: per tensor, or inner is a multiple of the pack
  kEach,   // channels last, whole packs: element k is in channel c + k
  kMixed,  // anything else: counted element by element
};

// The elements from i on that a thread takes: the forward, or the straight-through gradient.
template <class T, Channels kChannels, bool kBackward>
__device__ void fake_quant_pack(const CudaFakeQuantArgs& a, int64_t i, bool aligned) {
  constexpr int kSize = Pack<T>::kSize;
  Pack<T> x{}, grad{}, out;
  load(x, static_cast<const T*>(a.x), i, a.n, aligned);
  if (kBackward) load(grad, static_cast<const T*>(a.grad), i, a.n, aligned);

  Place at = a.channels == 1 ? Place{0, 0} : place(i, a);
  Grid<float> q = grid_of(a, at.channel);
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    if (k > 0 && kChannels == Channels::kEach) q = grid_of(a, at.channel + k);
    if (k > 0 && kChannels == Channels::kMixed) {
      if (++at.offset == a.inner) {
        at.offset = 0;
        if (++at.channel == a.channels) at.channel = 0;
        q = grid_of(a, at.channel);
      }
    }
    const float v = widen(x.v[k]);
    if (kBackward) {
      out.v[k] = inside(v, q) ? grad.v[k] : T(0.0f);
    } else {
      narrow(fake_quant(v, q), out.v[k]);
    }
  }
  store(out, static_cast<T*>(a.out), i, a.n, aligned);
}

inline Channels meeting(const CudaFakeQuantArgs& a, int size) {
  if (a.channels == 1 || a.inner % size == 0) return Channels::kOne;
  return a.inner == 1 && a.channels % size == 0 ? Channels::kEach : Channels::kMixed;
}

}  // namespace zsq
