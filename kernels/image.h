// Where view_images, resize_crops and their adjoints read, and what they do with it, as zsq_ext/ops/reference/image.py
// defines them. Shared by the CPU and CUDA.
#pragma once

#include <cstdint>

#include "arith.h"
#include "dtype.h"

namespace zsq {

// Dense images, [samples, channels, height, width], or [samples, height, width, channels] where channels are last.
struct ImageShape {
  int64_t samples, channels;
  int64_t in_height, in_width, out_height, out_width;
  bool last;
};

// The same memory as planes of lines. Elements `step` apart are neighbours in a row of pixels, so that both layouts are
// one: a line is a row of one channel, or of all channels side by side.
struct Lines {
  int64_t planes, channels, step, in, out;  // in, out: elements of a line

  ZSQ_HD int64_t sample(int64_t plane) const { return step == channels ? plane : plane / channels; }
  ZSQ_HD int64_t channel(int64_t plane, int64_t i) const { return step == channels ? i % step : plane % channels; }
};

ZSQ_HD Lines lines_of(const ImageShape& s) {
  // With one channel the layouts are the same memory, and a plane is a sample.
  const int64_t step = s.last ? s.channels : 1;
  return {s.last ? s.samples : s.samples * s.channels, s.channels, step, s.in_width * step, s.out_width * step};
}

// view_images, or its adjoint of a gradient x, which has no clip.
struct ViewArgs {
  const void* x;       // [samples, channels, in_height, in_width]
  void* y;             // [samples, channels, out_height, out_width]
  const int64_t* top;  // [samples], as left and flip
  const int64_t* left;
  const bool* flip;
  const void* low;  // [channels] float, or double where x is double; as high; both or neither
  const void* high;
  double edge;  // the weight of either neighbour along an axis; 0 does not smooth
  bool adjoint;
  ImageShape shape;
  DType dtype;
};

// Element (row, column) of y is the smoothed x at (row + down, column + right), or (row + down, right - column) where
// flipped. The kernel is symmetric, so flipping before it and after it is the same.
struct Window {
  int64_t down, right;
  bool flip;
};

ZSQ_HD Window window_of(const ViewArgs& a, int64_t sample) {
  const ImageShape& s = a.shape;
  const int64_t sign = a.adjoint ? -1 : 1;
  const int64_t room_down = sign * (s.in_height - s.out_height), room_right = sign * (s.in_width - s.out_width);
  const int64_t top = clamp(a.top[sample], int64_t(0), room_down);
  const int64_t left = clamp(a.left[sample], int64_t(0), room_right);
  const bool flip = a.flip[sample];
  const int64_t width = a.adjoint ? s.out_width : s.in_width;
  return {sign * top, flip ? width - 1 - left : sign * left, flip};
}

template <class T>
struct Smoothing {
  T centre, edge;
};

template <class T>
ZSQ_HD Smoothing<T> smoothing(T edge) {
  return {sub(T(1), add(edge, edge)), edge};
}

// One axis of the kernel.
template <class T>
ZSQ_HD T smoothed(T before, T here, T after, const Smoothing<T>& k) {
  return add(mul(k.centre, here), mul(k.edge, add(before, after)));
}

// NaN fails both comparisons and stays; where low > high, high wins.
template <class T>
ZSQ_HD T clip(T v, T low, T high) {
  v = v < low ? low : v;
  return v > high ? high : v;
}

// resize_crops, or its adjoint of a gradient x.
struct ResizeArgs {
  const void* x;       // [samples, channels, in_height, in_width]
  void* y;             // [samples, channels, out_height, out_width]
  const int64_t* top;  // [samples], as left, height, width and flip
  const int64_t* left;
  const int64_t* height;
  const int64_t* width;
  const bool* flip;
  bool adjoint;
  ImageShape shape;
  DType dtype;
};

// 64-bit division takes some 80 instructions on a GPU, and hardly any image needs it. a >= 0, b > 0.
ZSQ_HD int64_t quotient(int64_t a, int64_t b) {
#ifdef __CUDA_ARCH__
  if ((uint64_t(a | b) >> 32) == 0) return uint32_t(a) / uint32_t(b);
#endif
  return a / b;
}

// Along one axis: `extent` pixels from `start` on become `size`.
struct Axis {
  int64_t start, extent, size;

  // Output pixel o is at place(o) / (2 size) pixels into the crop, and does not leave it.
  ZSQ_HD int64_t place(int64_t o) const {
    return clamp((2 * o + 1) * extent - size, int64_t(0), (extent - 1) * 2 * size);
  }

  // The first output pixel whose place is at pixel p of the crop or beyond it.
  ZSQ_HD int64_t first_at(int64_t p) const {
    if (p <= 0) return 0;
    if (p >= extent) return size;
    const int64_t n = (2 * p + 1) * size - extent;
    return n <= 0 ? 0 : quotient(n + 2 * extent - 1, 2 * extent);
  }
};

// A crop outside the image is moved into it, so that nothing is read where nothing is.
ZSQ_HD Axis axis_of(int64_t start, int64_t extent, int64_t full, int64_t size) {
  extent = clamp(extent, int64_t(1), full);
  return {clamp(start, int64_t(0), full - extent), extent, size};
}

// The two pixels of the crop that an output pixel reads, the second with weight `second_weight`.
template <class T>
struct Taps {
  int64_t first, second;
  T first_weight, second_weight;
};

template <class T>
ZSQ_HD Taps<T> taps_of(const Axis& axis, int64_t o) {
  const int64_t place = axis.place(o), first = quotient(place, 2 * axis.size);
  const T w = div(T(place - first * 2 * axis.size), T(2 * axis.size));
  return {first, first + 1 < axis.extent ? first + 1 : first, sub(T(1), w), w};
}

template <class T>
ZSQ_HD T blend(T a, T b, const Taps<T>& taps) {
  return add(mul(taps.first_weight, a), mul(taps.second_weight, b));
}

// The weight with which output pixel o reads pixel p of the crop. It must: first_at(p - 1) <= o < first_at(p + 1).
template <class T>
ZSQ_HD T weight_of(const Axis& axis, int64_t o, int64_t p) {
  const int64_t unit = 2 * axis.size, beyond = axis.place(o) - p * unit;
  const T w = div(T(beyond < 0 ? beyond + unit : beyond), T(unit));
  return beyond < 0 ? w : sub(T(1), w);
}

// The rows and the columns of a crop: of y where it is the output's, of x under the adjoint.
struct Crop {
  Axis rows, columns;
  bool flip;
};

ZSQ_HD Crop crop_of(const ResizeArgs& a, int64_t sample) {
  const ImageShape& s = a.shape;
  const bool back = a.adjoint;
  return {
      axis_of(a.top[sample], a.height[sample], back ? s.out_height : s.in_height, back ? s.in_height : s.out_height),
      axis_of(a.left[sample], a.width[sample], back ? s.out_width : s.in_width, back ? s.in_width : s.out_width),
      a.flip[sample]};
}

}  // namespace zsq
