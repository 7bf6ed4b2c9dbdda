// The dtype codes that zsq_ext passes to the native module. zsq_ext/ops/layout.py holds the same table.
#pragma once

namespace zsq {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2, f64 = 3 };

}  // namespace zsq
