// The dtype codes that zsq_ext passes to the native module. zsq_ext/ops/layout.py holds the same table.
#pragma once

namespace zsq {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2, f64 = 3 };

// What a code is stored as.
enum class CodeType : int { i8 = 0, u8 = 1, i32 = 2 };

}  // namespace zsq
