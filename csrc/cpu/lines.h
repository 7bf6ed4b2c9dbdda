// What the image loops share: how the lines of all planes are handed to threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "csrc/cpu/parallel.h"
#include "kernels/image.h"

namespace zsq {

// Calls body(plane, begin, end) for stretches of lines of y that cover all planes.
template <class Body>
void for_lines(const Lines& l, int64_t height, int threads, const Body& body) {
  // 64 Ki elements take one core 10 to 50 us, several times what it costs to wake another.
  const int64_t grain = std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(l.out, 1));
  if (l.out == 0) return;
  parallel_for(l.planes * height, grain, threads, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t plane = begin / height, row = begin - plane * height;
      const int64_t stop = std::min(end - plane * height, height);
      body(plane, row, stop);
      begin = plane * height + stop;
    }
  });
}

}  // namespace zsq
