// view_images, resize_crops and their adjoints on the CPU. Contract: zsq_ext/ops/reference/image.py.
#pragma once

#include "kernels/image.h"

namespace zsq {

void view_images(const ViewArgs& args, int threads);
void resize_crops(const ResizeArgs& args, int threads);

}  // namespace zsq
