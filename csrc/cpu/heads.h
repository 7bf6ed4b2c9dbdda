// distill_head, cam_map, count_active and their backwards on the CPU. Contract: zsq_ext/ops/reference/heads.py.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/heads.h"

namespace zsq {

// Dense memory in the order of the shapes. "compute" is float, or double where the logits are double. Null is absent.
struct DistillHeadArgs {
  const void* student;    // [samples][classes] in their dtype, as teacher
  const void* teacher;    // as student
  const int64_t* labels;  // [samples]
  const uint8_t* given;   // [samples] 0 or 1: who is easy, where trust is given
  void* rows;             // [samples] HeadRow of compute
  uint8_t* easy;          // [samples] 0 or 1
  void* kd;               // one of compute, as ce
  void* ce;
  int64_t* counts;  // 3: right, agreeing and easy samples
  double temperature, tau;
  double kd_weight, ce_weight;  // of the sums over samples
  int64_t samples, classes;
  Kd form;
  Trust trust;
  DType dtype;
};

void distill_head(const DistillHeadArgs& args, int threads);

struct DistillHeadBackwardArgs {
  const void* student;    // [samples][classes] in their dtype, as the teacher and both gradients
  const void* teacher;    // as student
  const int64_t* labels;  // [samples]
  const uint8_t* easy;    // [samples] 0 or 1
  const void* rows;       // [samples] HeadRow of compute
  const void* grad_kd;    // one of compute, as grad_ce
  const void* grad_ce;
  void* dstudent;
  void* dteacher;
  double temperature;
  double kd_weight, ce_weight;
  int64_t samples, classes;
  Kd form;
  DType dtype;
};

void distill_head_backward(const DistillHeadBackwardArgs& args, int threads);

// An activation lies as [samples][places][channels] where the channels are last, else [samples][channels][places].
struct CamMapArgs {
  const void* activation;
  const void* alpha;  // [samples][channels] compute
  void* maps;         // [samples][places] compute
  double floor;       // minus infinity for none
  int64_t samples, channels, places;
  bool last;
  DType dtype;
};

void cam_map(const CamMapArgs& args, int threads);

struct CamMapBackwardArgs {
  const void* alpha;  // [samples][channels] compute
  const void* maps;   // [samples][places] compute, as grad
  const void* grad;
  void* out;  // as the activation
  double floor;
  int64_t samples, channels, places;
  bool last;
  DType dtype;
};

void cam_map_backward(const CamMapBackwardArgs& args, int threads);

struct CountActiveArgs {
  const void* x;   // as an activation
  int32_t* count;  // [samples][channels]
  double upper;    // infinity for none
  int64_t samples, channels, places;
  bool last;
  DType dtype;
};

void count_active(const CountActiveArgs& args, int threads);

}  // namespace zsq
