// zsq_ext._C: a table of contents. Pointers come as integers; what they point to, zsq_ext/ops has checked.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "csrc/cpu/fake_quant.h"
#include "csrc/cpu/simd.h"

#ifdef ZSQ_WITH_CUDA
#include <cuda_runtime.h>

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

void cpu_fake_quant(Address grad, Address x, Address out, Address scale, Address zero_point, int dtype, int64_t n,
                    int64_t channels, int64_t inner, int64_t qmin, int64_t qmax, int threads) {
  zsq::fake_quant({at<void>(grad), at<void>(x), at<void>(out), at<void>(scale), at<int32_t>(zero_point), n, channels,
                   inner, qmin, qmax, static_cast<zsq::DType>(dtype), threads});
}

#ifdef ZSQ_WITH_CUDA

// What a launch returned: "" or CUDA's own words, which zsq_ext raises with the op's name.
const char* words(cudaError_t error) { return error == cudaSuccess ? "" : cudaGetErrorString(error); }

const char* cuda_fake_quant(Address grad, Address x, Address out, Address scale, Address zero_point, int dtype,
                            int64_t n, int64_t channels, int64_t inner, int64_t qmin, int64_t qmax, Address stream) {
  return words(zsq::cuda_fake_quant(
      {at<void>(grad), at<void>(x), at<void>(out), at<float>(scale), at<int32_t>(zero_point), n, channels, inner,
       static_cast<float>(qmin), static_cast<float>(qmax), static_cast<zsq::DType>(dtype)},
      at<CUstream_st>(stream)));
}

#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native ops of zsq_ext. Not for direct use: see zsq_ext.ops.";

  m.def("simd_enabled", &zsq::simd_enabled);
  m.def("set_simd", &zsq::set_simd);
  m.def("cpu_fake_quant", &cpu_fake_quant, Unlocked());

#ifdef ZSQ_WITH_CUDA
  m.attr("cuda_archs") = ZSQ_CUDA_ARCHS;
  m.attr("cuda_version") = CUDART_VERSION;
  m.def("cuda_fake_quant", &cuda_fake_quant, Unlocked());
#else
  m.attr("cuda_archs") = "";
#endif
}
