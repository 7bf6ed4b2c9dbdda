// Many tensors in one launch: a table of records goes by value, so that no copy has to be waited for and a CUDA graph
// holds it.
#pragma once

#include <cstdint>

namespace zsq {

// The last of `count` records, ordered by their first `block`, that begins at this block or before.
template <class Record>
__device__ inline const Record& record_at(const Record* records, int count, int64_t block) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (records[middle].block <= block) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return records[low];
}

}  // namespace zsq
