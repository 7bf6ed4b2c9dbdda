// A small pool of threads for loops over elements.
#pragma once

#include <cstdint>
#include <functional>

namespace zsq {

// Calls body(begin, end) over pieces of [0, n) on at most `threads` threads, the caller's among them. Pieces
// start at multiples of `grain`; which thread takes which is not fixed, so body must not care. With one piece,
// or while another call holds the pool, the caller does all of it alone.
void parallel_for(int64_t n, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& body);

}  // namespace zsq
