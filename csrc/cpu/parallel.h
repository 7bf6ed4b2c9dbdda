// Loops over elements, on the threads of PyTorch's own loops.
#pragma once

#include <cstdint>
#include <functional>

namespace zsq {

// Calls body(begin, end) over pieces of [0, n) on at most `threads` threads, the caller's among them. Pieces
// start at multiples of `grain`; which thread takes which is not fixed, so body must not care.
void parallel_for(int64_t n, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& body);

}  // namespace zsq
