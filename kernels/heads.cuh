// distill_head, cam_map, count_active and their backwards on CUDA. Contract: zsq_ext/ops/reference/heads.py.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "dtype.h"
#include "heads.h"

namespace zsq {

// Dense memory in the order of the shapes. Null is absent.
struct CudaDistillHeadArgs {
  const void* student;    // [samples][classes] in their dtype, as teacher
  const void* teacher;    // as student
  const int64_t* labels;  // [samples]
  const uint8_t* given;   // [samples] 0 or 1: who is easy, where trust is given
  HeadRow<float>* rows;   // [samples]
  uint8_t* easy;          // [samples] 0 or 1
  float* kd;              // one, as ce
  float* ce;
  int64_t* counts;  // 3: right, agreeing and easy samples
  float temperature, tau;
  double kd_weight, ce_weight;  // of the sums over samples
  int64_t samples, classes;
  Kd form;
  Trust trust;
  DType dtype;
};

cudaError_t cuda_distill_head(const CudaDistillHeadArgs& args, cudaStream_t stream);

struct CudaDistillHeadBackwardArgs {
  const void* student;         // [samples][classes] in their dtype, as the teacher and both gradients
  const void* teacher;         // as student
  const int64_t* labels;       // [samples]
  const uint8_t* easy;         // [samples] 0 or 1
  const HeadRow<float>* rows;  // [samples]
  const float* grad_kd;        // one, as grad_ce
  const float* grad_ce;
  void* dstudent;
  void* dteacher;
  float temperature;
  float kd_weight, ce_weight;
  int64_t samples, classes;
  Kd form;
  DType dtype;
};

cudaError_t cuda_distill_head_backward(const CudaDistillHeadBackwardArgs& args, cudaStream_t stream);

// An activation lies as [samples][places][channels] where the channels are last, else [samples][channels][places].
struct CudaCamMapArgs {
  const void* activation;
  const float* alpha;  // [samples][channels]
  float* maps;         // [samples][places]
  float floor;         // minus infinity for none
  int64_t samples, channels, places;
  bool last;
  DType dtype;
};

cudaError_t cuda_cam_map(const CudaCamMapArgs& args, cudaStream_t stream);

struct CudaCamMapBackwardArgs {
  const float* alpha;  // [samples][channels]
  const float* maps;   // [samples][places], as grad
  const float* grad;
  void* out;  // as the activation
  float floor;
  int64_t samples, channels, places;
  bool last;
  DType dtype;
};

cudaError_t cuda_cam_map_backward(const CudaCamMapBackwardArgs& args, cudaStream_t stream);

struct CudaCountActiveArgs {
  const void* x;   // as an activation
  int32_t* count;  // [samples][channels]
  float upper;     // NaN for none
  int64_t samples, channels, places;
  bool last;
  DType dtype;
};

cudaError_t cuda_count_active(const CudaCountActiveArgs& args, cudaStream_t stream);

}  // namespace zsq
