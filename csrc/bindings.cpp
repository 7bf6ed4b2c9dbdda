// zsq_ext._C: a table of contents. What the pointers point to, zsq_ext/ops has checked.
#include "csrc/bind.h"
#include "csrc/cpu/adaround.h"
#include "csrc/cpu/bn_act.h"
#include "csrc/cpu/channel_range.h"
#include "csrc/cpu/fake_quant.h"
#include "csrc/cpu/heads.h"
#include "csrc/cpu/lp_error.h"
#include "csrc/cpu/qdrop.h"
#include "csrc/cpu/image.h"
#include "csrc/cpu/simd.h"

#ifdef ZSQ_WITH_CUDA
#include <cuda_runtime.h>

#include "kernels/adaround.cuh"
#include "kernels/bn_act.cuh"
#include "kernels/channel_range.cuh"
#include "kernels/fake_quant.cuh"
#include "kernels/heads.cuh"
#include "kernels/lp_error.cuh"
#include "kernels/qdrop.cuh"
#include "kernels/image.cuh"

namespace {

// m.name(*fields, stream), which returns "" or CUDA's own words.
template <class Args>
void def_cuda(pybind11::module_& m, const char* name, cudaError_t (*launch)(const Args&, cudaStream_t)) {
  m.def(name, [launch](const pybind11::args& values) {
    const Args args = zsq::filled<Args>(values, 1);
    const cudaStream_t stream = zsq::Field{values[values.size() - 1]};
    pybind11::gil_scoped_release unlocked;
    const cudaError_t error = launch(args, stream);
    return error == cudaSuccess ? "" : cudaGetErrorString(error);
  });
}

// m.name(*fields), the bytes that the launcher of the same arguments wants in their field `workspace`.
template <class Args>
void def_workspace(pybind11::module_& m, const char* name, int64_t (*bytes)(const Args&)) {
  m.def(name, [bytes](const pybind11::args& values) { return bytes(zsq::filled<Args>(values)); });
}

}  // namespace
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native ops of zsq_ext. Not for direct use: see zsq_ext.ops.";

  m.def("simd_enabled", &zsq::simd_enabled);
  m.def("set_simd", &zsq::set_simd);
  zsq::def_cpu(m, "cpu_adaround", &zsq::adaround);
  zsq::def_cpu(m, "cpu_fake_quant", &zsq::fake_quant);
  zsq::def_cpu(m, "cpu_fake_quant_lsq_backward", &zsq::fake_quant_lsq_backward);
  zsq::def_cpu(m, "cpu_fake_quant_many", &zsq::fake_quant_many);
  zsq::def_cpu(m, "cpu_fake_quant_codes", &zsq::fake_quant_codes);
  zsq::def_cpu(m, "cpu_fake_quant_minmax", &zsq::fake_quant_minmax);
  zsq::def_cpu(m, "cpu_channel_range", &zsq::channel_range);
  zsq::def_cpu(m, "cpu_lp_error", &zsq::lp_error);
  zsq::def_cpu(m, "cpu_bn_act", &zsq::bn_act);
  zsq::def_cpu(m, "cpu_bn_act_backward", &zsq::bn_act_backward);
  zsq::def_cpu(m, "cpu_distill_head", &zsq::distill_head);
  zsq::def_cpu(m, "cpu_distill_head_backward", &zsq::distill_head_backward);
  zsq::def_cpu(m, "cpu_cam_map", &zsq::cam_map);
  zsq::def_cpu(m, "cpu_cam_map_backward", &zsq::cam_map_backward);
  zsq::def_cpu(m, "cpu_count_active", &zsq::count_active);
  zsq::def_cpu(m, "cpu_qdrop", &zsq::qdrop);
  // For tests: the generator itself, whose counters no tensor reaches.
  m.def("philox", [](uint64_t counter, uint64_t upper, uint64_t key) {
    const zsq::Words w = zsq::philox(counter, upper, key);
    return pybind11::make_tuple(w.word[0], w.word[1], w.word[2], w.word[3]);
  });
  zsq::def_cpu(m, "cpu_view_images", &zsq::view_images);
  zsq::def_cpu(m, "cpu_resize_crops", &zsq::resize_crops);

#ifdef ZSQ_WITH_CUDA
  m.attr("cuda_archs") = ZSQ_CUDA_ARCHS;
  m.attr("cuda_version") = CUDART_VERSION;
  def_cuda(m, "cuda_adaround", &zsq::cuda_adaround);
  def_workspace(m, "cuda_adaround_workspace", &zsq::cuda_adaround_workspace);
  def_cuda(m, "cuda_fake_quant", &zsq::cuda_fake_quant);
  def_cuda(m, "cuda_fake_quant_lsq_backward", &zsq::cuda_fake_quant_lsq_backward);
  def_workspace(m, "cuda_fake_quant_lsq_backward_workspace", &zsq::cuda_fake_quant_lsq_workspace);
  def_cuda(m, "cuda_fake_quant_many", &zsq::cuda_fake_quant_many);
  def_workspace(m, "cuda_fake_quant_many_workspace", &zsq::cuda_fake_quant_many_workspace);
  def_cuda(m, "cuda_fake_quant_codes", &zsq::cuda_fake_quant_codes);
  def_cuda(m, "cuda_fake_quant_minmax", &zsq::cuda_fake_quant_minmax);
  def_cuda(m, "cuda_channel_range", &zsq::cuda_channel_range);
  def_workspace(m, "cuda_channel_range_workspace", &zsq::cuda_channel_range_workspace);
  def_cuda(m, "cuda_lp_error", &zsq::cuda_lp_error);
  def_workspace(m, "cuda_lp_error_workspace", &zsq::cuda_lp_error_workspace);
  def_cuda(m, "cuda_bn_act", &zsq::cuda_bn_act);
  def_workspace(m, "cuda_bn_act_workspace", &zsq::cuda_bn_act_workspace);
  def_cuda(m, "cuda_bn_act_backward", &zsq::cuda_bn_act_backward);
  def_workspace(m, "cuda_bn_act_backward_workspace", &zsq::cuda_bn_act_backward_workspace);
  def_cuda(m, "cuda_distill_head", &zsq::cuda_distill_head);
  def_cuda(m, "cuda_distill_head_backward", &zsq::cuda_distill_head_backward);
  def_cuda(m, "cuda_cam_map", &zsq::cuda_cam_map);
  def_cuda(m, "cuda_cam_map_backward", &zsq::cuda_cam_map_backward);
  def_cuda(m, "cuda_count_active", &zsq::cuda_count_active);
  def_cuda(m, "cuda_qdrop", &zsq::cuda_qdrop);
  def_cuda(m, "cuda_view_images", &zsq::cuda_view_images);
  def_cuda(m, "cuda_resize_crops", &zsq::cuda_resize_crops);
#else
  m.attr("cuda_archs") = "";
#endif
}
