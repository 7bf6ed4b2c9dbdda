// view_images, resize_crops and their adjoints on CUDA. Contract: zsq_ext/ops/reference/image.py.
#pragma once

#include <cuda_runtime.h>

#include "image.h"

namespace zsq {

// Both launch nothing for an empty y.
cudaError_t cuda_view_images(const ViewArgs& args, cudaStream_t stream);
cudaError_t cuda_resize_crops(const ResizeArgs& args, cudaStream_t stream);

}  // namespace zsq
