// Philox-4x32-10, a counter-based generator: the same counter and key give the same 128 bits anywhere. Its constants
// and rounds are J. Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011. Shared by the CPU and CUDA.
#pragma once

#include <cstdint>

#include "arith.h"

namespace zsq {

constexpr uint32_t kPhiloxA = 0xD2511F53u, kPhiloxB = 0xCD9E8D57u;        // multipliers
constexpr uint32_t kPhiloxKeyA = 0x9E3779B9u, kPhiloxKeyB = 0xBB67AE85u;  // what the key grows by in each round
constexpr int kPhiloxRounds = 10;

struct Words {
  uint32_t word[4];
};

ZSQ_HD uint32_t high_product(uint32_t a, uint32_t b) { return static_cast<uint32_t>((uint64_t{a} * b) >> 32); }

// The lower 64 bits of the counter, its upper ones, and the key; all least significant word first.
ZSQ_HD Words philox(uint64_t counter, uint64_t upper, uint64_t key) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = static_cast<uint32_t>(upper), c3 = static_cast<uint32_t>(upper >> 32);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint32_t n0 = high_product(kPhiloxB, c2) ^ c1 ^ k0, n2 = high_product(kPhiloxA, c0) ^ c3 ^ k1;
    c1 = kPhiloxB * c2;
    c3 = kPhiloxA * c0;
    c0 = n0;
    c2 = n2;
    k0 += kPhiloxKeyA;
    k1 += kPhiloxKeyB;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace zsq
