// How a kernel with tokens in its lanes takes a weight from a panel, where those of neighbouring rows
// lie side by side. Generic: in every lane of a vector. An instruction set whose multiply-add takes
// one lane of a vector specialises this (simd_neon.h).
#pragma once
#include <cstring>

#include "core/dtype.h"

namespace sk {
namespace {

template <class S>
struct Weights {
  using One = typename S::V;  // what S::fma takes as its first operand

  // Row `r` of the kRows rows that start at `rows`. Constant once the loops are unrolled.
  template <int kRows>
  static One row(const float* rows, int r) {
    return S::set1(rows[r]);
  }
  template <int kRows>
  static One row(const bf16* rows, int r) {
    return S::set1(to_float(rows[r]));
  }
  // The same where 16-bit weights lie in pairs, [row][2].
  template <int kRows>
  static One row_of_pairs(const bf16* pairs, int r, bool second) {
    int32_t word;
    std::memcpy(&word, pairs + 2 * r, 4);
    return second ? S::high_bf16(S::set1(word)) : S::low_bf16(S::set1(word));
  }
};

}  // namespace
}  // namespace sk
