// view_images, resize_crops and their adjoints: a thread takes one element of a line of y and walks down a few lines.
// Contract: zsq_ext/ops/reference/image.py; index maps and arithmetic: image.h.
//
// Neighbouring threads read and write neighbouring elements, so a warp's access is whole sectors at any offset, which
// wider ones per thread could not be. What a line shares with the one above it stays in registers or in the first
// cache, so that x is read from memory once.
#include "image.cuh"
#include "pack.cuh"

namespace zsq {
namespace {

constexpr int kThreads = 256;
// Lines per thread: of view_images' reads, which are those of the lines and of one on either side, a fifth are
// repeated.
constexpr int64_t kLines = 8;

__host__ __device__ int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where a thread stands: element `i` of the lines from `row` to `end` of a plane of y.
struct Stand {
  int64_t plane, row, end, i;
};

__device__ Stand stand(const Lines& l, int64_t height) {
  const int64_t id = int64_t(blockIdx.x) * kThreads + threadIdx.x, pieces = ceil_div(height, kLines);
  const int64_t line = quotient(id, l.out), plane = quotient(line, pieces), row = (line - plane * pieces) * kLines;
  return {plane, row, row + kLines < height ? row + kLines : height, id - line * l.out};
}

// An element of a line as a pixel of it, and the channel among those side by side.
struct Place {
  int64_t pixel, channel;
};

__device__ Place place(const Lines& l, int64_t i) {
  const int64_t pixel = quotient(i, l.step);
  return {pixel, i - pixel * l.step};
}

template <class T>
__global__ void __launch_bounds__(kThreads) view_images_kernel(ViewArgs a, int64_t threads) {
  if (int64_t(blockIdx.x) * kThreads + threadIdx.x >= threads) return;
  const ImageShape& s = a.shape;
  const Lines l = lines_of(s);
  const Stand at = stand(l, s.out_height);
  const Place p = place(l, at.i);
  const Window w = window_of(a, l.sample(at.plane));
  const bool smooth = a.edge != 0;
  const Smoothing<float> k = smoothing(static_cast<float>(a.edge));
  const int64_t channel = l.step == l.channels ? p.channel : at.plane % l.channels;
  const bool clipped = a.low != nullptr;
  const float low = clipped ? __ldg(static_cast<const float*>(a.low) + channel) : 0.0f;
  const float high = clipped ? __ldg(static_cast<const float*>(a.high) + channel) : 0.0f;

  const int64_t column = w.flip ? w.right - p.pixel : w.right + p.pixel;
  const bool has_before = column >= 1 && column <= s.in_width, has_here = column >= 0 && column < s.in_width;
  const bool has_after = column >= -1 && column < s.in_width - 1;
  const T* x = static_cast<const T*>(a.x) + at.plane * s.in_height * l.in + column * l.step + p.channel;
  const auto across = [&](int64_t row) {
    if (row < 0 || row >= s.in_height) return 0.0f;
    const T* here = x + row * l.in;
    const float v = has_here ? widen(here[0]) : 0.0f;
    if (!smooth) return v;
    return smoothed(has_before ? widen(here[-l.step]) : 0.0f, v, has_after ? widen(here[l.step]) : 0.0f, k);
  };

  T* y = static_cast<T*>(a.y) + (at.plane * s.out_height + at.row) * l.out + at.i;
  const int64_t row = at.row + w.down;
  float up = smooth ? across(row - 1) : 0.0f, here = across(row);
#pragma unroll
  for (int64_t j = 0; j < kLines; ++j) {
    if (at.row + j >= at.end) return;
    const float below = smooth || at.row + j + 1 < at.end ? across(row + j + 1) : 0.0f;
    const float v = smooth ? smoothed(up, here, below, k) : here;
    narrow(clipped ? clip(v, low, high) : v, y[j * l.out]);
    up = here;
    here = below;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) resize_crops_kernel(ResizeArgs a, int64_t threads) {
  if (int64_t(blockIdx.x) * kThreads + threadIdx.x >= threads) return;
  const ImageShape& s = a.shape;
  const Lines l = lines_of(s);
  const Stand at = stand(l, s.out_height);
  const Place p = place(l, at.i);
  const Crop crop = crop_of(a, l.sample(at.plane));
  const Taps<float> across = taps_of<float>(crop.columns, crop.flip ? s.out_width - 1 - p.pixel : p.pixel);
  const T* x = static_cast<const T*>(a.x) + at.plane * s.in_height * l.in + p.channel;
  const T* first = x + (crop.columns.start + across.first) * l.step;
  const T* second = x + (crop.columns.start + across.second) * l.step;
  T* y = static_cast<T*>(a.y) + at.plane * s.out_height * l.out + at.i;
  for (int64_t row = at.row; row < at.end; ++row) {
    const Taps<float> down = taps_of<float>(crop.rows, row);
    const int64_t upper = (crop.rows.start + down.first) * l.in, lower = (crop.rows.start + down.second) * l.in;
    const float above = blend(widen(first[upper]), widen(second[upper]), across);
    const float below = blend(widen(first[lower]), widen(second[lower]), across);
    narrow(blend(above, below, down), y[row * l.out]);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) resize_crops_backward_kernel(ResizeArgs a, int64_t threads) {
  if (int64_t(blockIdx.x) * kThreads + threadIdx.x >= threads) return;
  const ImageShape& s = a.shape;
  const Lines l = lines_of(s);
  const Stand at = stand(l, s.out_height);
  const Place p = place(l, at.i);
  const Crop crop = crop_of(a, l.sample(at.plane));
  const Axis &rows = crop.rows, &columns = crop.columns;
  const int64_t column = p.pixel - columns.start;
  const bool inside = column >= 0 && column < columns.extent;
  const int64_t begin = inside ? columns.first_at(column - 1) : 0, end = inside ? columns.first_at(column + 1) : 0;
  const T* x = static_cast<const T*>(a.x) + at.plane * s.in_height * l.in + p.channel;
  T* y = static_cast<T*>(a.y) + at.plane * s.out_height * l.out + at.i;
  for (int64_t row = at.row; row < at.end; ++row) {
    const int64_t q = row - rows.start;
    float total = 0.0f;
    if (q >= 0 && q < rows.extent) {
      const int64_t top = rows.first_at(q - 1), bottom = rows.first_at(q + 1);
      for (int64_t o = begin; o < end; ++o) {
        const T* line = x + (crop.flip ? columns.size - 1 - o : o) * l.step;
        float sum = 0.0f;
        for (int64_t r = top; r < bottom; ++r) {
          sum = add(sum, mul(weight_of<float>(rows, r, q), widen(line[r * l.in])));
        }
        total = add(total, mul(weight_of<float>(columns, o, column), sum));
      }
    }
    narrow(total, y[row * l.out]);
  }
}

int64_t threads_of(const ImageShape& s) {
  const Lines l = lines_of(s);
  return l.planes * ceil_div(s.out_height, kLines) * l.out;
}

template <class Args>
cudaError_t launch(void (*f32)(Args, int64_t), void (*f16)(Args, int64_t), void (*bf16)(Args, int64_t),
                   const Args& args, cudaStream_t stream) {
  const int64_t threads = threads_of(args.shape);
  if (threads == 0) return cudaSuccess;
  const auto kernel = args.dtype == DType::f32 ? f32 : args.dtype == DType::f16 ? f16 : bf16;
  if (args.dtype == DType::f64) return cudaErrorInvalidValue;
  kernel<<<static_cast<unsigned>(ceil_div(threads, kThreads)), kThreads, 0, stream>>>(args, threads);
  return cudaGetLastError();
}

}  // namespace

cudaError_t cuda_view_images(const ViewArgs& args, cudaStream_t stream) {
  return launch(view_images_kernel<float>, view_images_kernel<__half>, view_images_kernel<__nv_bfloat16>, args, stream);
}

cudaError_t cuda_resize_crops(const ResizeArgs& args, cudaStream_t stream) {
  if (!args.adjoint) {
    return launch(resize_crops_kernel<float>, resize_crops_kernel<__half>, resize_crops_kernel<__nv_bfloat16>, args,
                  stream);
  }
  return launch(resize_crops_backward_kernel<float>, resize_crops_backward_kernel<__half>,
                resize_crops_backward_kernel<__nv_bfloat16>, args, stream);
}

}  // namespace zsq
