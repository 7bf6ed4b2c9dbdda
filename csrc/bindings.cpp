// zsq_ext._C: a table of contents. Pointers come as integers; what they point to, zsq_ext/ops has checked.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "csrc/cpu/bn_act.h"
#include "csrc/cpu/fake_quant.h"
#include "csrc/cpu/simd.h"

#ifdef ZSQ_WITH_CUDA
#include <cuda_runtime.h>

#include "kernels/bn_act.cuh"
#include "kernels/fake_quant.cuh"
#endif

namespace py = pybind11;
using Address = std::uintptr_t;
using Unlocked = py::call_guard<py::gil_scoped_release>;

namespace {

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

zsq::FakeQuantArgs fake_quant_args(Address grad, Address x, Address out, Address scale, Address zero_point,
                                   bool learned, int dtype, int64_t n, int64_t channels, int64_t inner, int64_t qmin,
                                   int64_t qmax, int threads) {
  return {at<void>(grad),
          at<void>(x),
          at<void>(out),
          at<void>(scale),
          at<void>(zero_point),
          learned,
          n,
          channels,
          inner,
          qmin,
          qmax,
          static_cast<zsq::DType>(dtype),
          threads};
}

void cpu_fake_quant(Address grad, Address x, Address out, Address scale, Address zero_point, bool learned, int dtype,
                    int64_t n, int64_t channels, int64_t inner, int64_t qmin, int64_t qmax, int threads) {
  zsq::fake_quant(
      fake_quant_args(grad, x, out, scale, zero_point, learned, dtype, n, channels, inner, qmin, qmax, threads));
}

void cpu_fake_quant_lsq_backward(Address grad, Address x, Address out, Address scale, Address zero_point, bool learned,
                                 int dtype, int64_t n, int64_t channels, int64_t inner, int64_t qmin, int64_t qmax,
                                 int threads, Address dscale, Address dzero_point) {
  zsq::fake_quant_lsq_backward(
      fake_quant_args(grad, x, out, scale, zero_point, learned, dtype, n, channels, inner, qmin, qmax, threads),
      at<void>(dscale), at<void>(dzero_point));
}

void cpu_bn_act(Address u, Address residual, Address y, Address mask, Address mean, Address var, Address gamma,
                Address beta, Address s1, Address s2, double eps, int64_t samples, int64_t channels, int64_t places,
                bool last, bool per_sample, int act, int dtype, int threads) {
  zsq::bn_act({at<void>(u), at<void>(residual), at<void>(y), at<uint8_t>(mask), at<void>(mean), at<void>(var),
               at<void>(gamma), at<void>(beta), at<void>(s1), at<void>(s2), eps, samples, channels, places, last,
               per_sample, static_cast<zsq::Act>(act), static_cast<zsq::DType>(dtype), threads});
}

void cpu_bn_act_backward(Address u, Address grad, Address residual, Address mask, Address mean, Address var,
                         Address gamma, Address beta, Address grad_s1, Address grad_s2, Address du, Address dr,
                         Address dgamma, Address dbeta, double eps, int64_t samples, int64_t channels, int64_t places,
                         bool last, bool per_sample, int act, int dtype, int threads) {
  zsq::bn_act_backward({at<void>(u),
                        at<void>(grad),
                        at<void>(residual),
                        at<uint8_t>(mask),
                        at<void>(mean),
                        at<void>(var),
                        at<void>(gamma),
                        at<void>(beta),
                        at<void>(grad_s1),
                        at<void>(grad_s2),
                        at<void>(du),
                        at<void>(dr),
                        at<void>(dgamma),
                        at<void>(dbeta),
                        eps,
                        samples,
                        channels,
                        places,
                        last,
                        per_sample,
                        static_cast<zsq::Act>(act),
                        static_cast<zsq::DType>(dtype),
                        threads});
}

#ifdef ZSQ_WITH_CUDA

// What a launch returned: "" or CUDA's own words, which zsq_ext raises with the op's name.
const char* words(cudaError_t error) { return error == cudaSuccess ? "" : cudaGetErrorString(error); }

zsq::CudaFakeQuantArgs cuda_fake_quant_args(Address grad, Address x, Address out, Address scale, Address zero_point,
                                            bool learned, int dtype, int64_t n, int64_t channels, int64_t inner,
                                            int64_t qmin, int64_t qmax) {
  return {at<void>(grad),
          at<void>(x),
          at<void>(out),
          at<float>(scale),
          at<void>(zero_point),
          learned,
          n,
          channels,
          inner,
          static_cast<float>(qmin),
          static_cast<float>(qmax),
          static_cast<zsq::DType>(dtype)};
}

const char* cuda_fake_quant(Address grad, Address x, Address out, Address scale, Address zero_point, bool learned,
                            int dtype, int64_t n, int64_t channels, int64_t inner, int64_t qmin, int64_t qmax,
                            Address stream) {
  return words(zsq::cuda_fake_quant(
      cuda_fake_quant_args(grad, x, out, scale, zero_point, learned, dtype, n, channels, inner, qmin, qmax),
      at<CUstream_st>(stream)));
}

int64_t cuda_bn_act_chunks(int64_t samples, int64_t channels, int64_t places, bool last, bool per_sample) {
  return zsq::cuda_bn_act_chunks({samples, channels, places, last, per_sample});
}

const char* cuda_bn_act(Address u, Address residual, Address y, Address mask, Address mean, Address var, Address gamma,
                        Address beta, Address s1, Address s2, double eps, int64_t samples, int64_t channels,
                        int64_t places, bool last, bool per_sample, int act, int dtype, Address partials,
                        Address stream) {
  return words(zsq::cuda_bn_act({at<void>(u),
                                 at<void>(residual),
                                 at<void>(y),
                                 at<uint8_t>(mask),
                                 at<float>(mean),
                                 at<float>(var),
                                 at<float>(gamma),
                                 at<float>(beta),
                                 at<float>(s1),
                                 at<float>(s2),
                                 at<float>(partials),
                                 static_cast<float>(eps),
                                 {samples, channels, places, last, per_sample},
                                 static_cast<zsq::Act>(act),
                                 static_cast<zsq::DType>(dtype)},
                                at<CUstream_st>(stream)));
}

const char* cuda_bn_act_backward(Address u, Address grad, Address residual, Address mask, Address mean, Address var,
                                 Address gamma, Address beta, Address grad_s1, Address grad_s2, Address du, Address dr,
                                 Address dgamma, Address dbeta, double eps, int64_t samples, int64_t channels,
                                 int64_t places, bool last, bool per_sample, int act, int dtype, Address partials,
                                 Address stream) {
  return words(zsq::cuda_bn_act_backward({at<void>(u),
                                          at<void>(grad),
                                          at<void>(residual),
                                          at<uint8_t>(mask),
                                          at<float>(mean),
                                          at<float>(var),
                                          at<float>(gamma),
                                          at<float>(beta),
                                          at<float>(grad_s1),
                                          at<float>(grad_s2),
                                          at<void>(du),
                                          at<void>(dr),
                                          at<float>(dgamma),
                                          at<float>(dbeta),
                                          at<float>(partials),
                                          static_cast<float>(eps),
                                          {samples, channels, places, last, per_sample},
                                          static_cast<zsq::Act>(act),
                                          static_cast<zsq::DType>(dtype)},
                                         at<CUstream_st>(stream)));
}

const char* cuda_fake_quant_lsq_backward(Address grad, Address x, Address out, Address scale, Address zero_point,
                                         bool learned, int dtype, int64_t n, int64_t channels, int64_t inner,
                                         int64_t qmin, int64_t qmax, Address stream, Address dscale,
                                         Address dzero_point, Address workspace) {
  return words(zsq::cuda_fake_quant_lsq_backward(
      cuda_fake_quant_args(grad, x, out, scale, zero_point, learned, dtype, n, channels, inner, qmin, qmax),
      at<float>(dscale), at<float>(dzero_point), at<void>(workspace), at<CUstream_st>(stream)));
}

int64_t cuda_fake_quant_lsq_workspace(int dtype, int64_t n, int64_t channels, int64_t inner) {
  return zsq::cuda_fake_quant_lsq_workspace(n, channels, inner, static_cast<zsq::DType>(dtype));
}

#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native ops of zsq_ext. Not for direct use: see zsq_ext.ops.";

  m.def("simd_enabled", &zsq::simd_enabled);
  m.def("set_simd", &zsq::set_simd);
  m.def("cpu_fake_quant", &cpu_fake_quant, Unlocked());
  m.def("cpu_fake_quant_lsq_backward", &cpu_fake_quant_lsq_backward, Unlocked());
  m.def("cpu_bn_act", &cpu_bn_act, Unlocked());
  m.def("cpu_bn_act_backward", &cpu_bn_act_backward, Unlocked());

#ifdef ZSQ_WITH_CUDA
  m.attr("cuda_archs") = ZSQ_CUDA_ARCHS;
  m.attr("cuda_version") = CUDART_VERSION;
  m.def("cuda_fake_quant", &cuda_fake_quant, Unlocked());
  m.def("cuda_bn_act_chunks", &cuda_bn_act_chunks);
  m.def("cuda_bn_act", &cuda_bn_act, Unlocked());
  m.def("cuda_bn_act_backward", &cuda_bn_act_backward, Unlocked());
  m.def("cuda_fake_quant_lsq_backward", &cuda_fake_quant_lsq_backward, Unlocked());
  m.def("cuda_fake_quant_lsq_workspace", &cuda_fake_quant_lsq_workspace);
#else
  m.attr("cuda_archs") = "";
#endif
}
