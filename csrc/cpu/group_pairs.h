// What the bf16 kernels for 2:4 share that multiply by dot products of pairs. A group of four
// activations has six pairs; all six are laid out once per tile, so that one indexed load fetches
// exactly the two activations a row kept:
//
//   panel   [group][(0,1) (0,2) (1,2) (0,3) (1,3) (2,3)][token]     one 32-bit word each
#pragma once
#include <cstdint>

namespace sk {
namespace {

constexpr int kPairs = 6;

// Which of the six for a nibble position0 | position1 << 2: position0 + position1 (position1 - 1) /
// 2, as a table of nibbles.
constexpr uint64_t pair_table() {
  uint64_t table = 0;
  for (int second = 1; second < 4; ++second) {
    for (int first = 0; first < second; ++first) {
      table |= uint64_t(first + second * (second - 1) / 2) << (4 * (first | second << 2));
    }
  }
  return table;
}

}  // namespace
}  // namespace sk
