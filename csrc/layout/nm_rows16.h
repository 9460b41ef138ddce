// Format "nm_rows16": 16 rows side by side, so that one vector register (AVX-512) or two (AVX2, and four
// on NEON) hold the values of one slot for 16 rows. The CPU's format for every N:M pattern.
//
//   indices  uint64 [panels][words]    bits == 2: one word a pair of slots; bits == 4: one word a slot
//   values   f32:    [panels][pairs][2][16]         slot 2p for 16 rows, then slot 2p + 1
//            16 bit: [panels][pairs][16][2]         both slots of a row in one 32-bit word
//
// A word holds a nibble for each row: row 2i in bits 4i of the low half, row 2i + 1 in bits 4i of the
// high half, so that broadcasting the word to 64-bit lanes and shifting lane pair i by 4i puts every
// row's nibble into its own 32-bit lane. bits == 2: the nibble is position(2p) | position(2p + 1) << 2.
// Slots are padded to an even number, rows to 16: with zeros, at position 0.
#pragma once
#include <cstdint>

#include "layout/format.h"

namespace sk {

constexpr int kRows16 = 16;

struct NmRows16 {  // sizes of one panel
  int64_t panels, groups, slots, pairs, words;
  int index_bits;
};

inline NmRows16 nm_rows16(const PackedHeader& h) {
  const Geometry g = geometry(h.pattern, h.dtype, h.n, h.k);
  NmRows16 r{};
  r.panels = ceil_div(h.n, kRows16);
  r.groups = g.groups;
  r.slots = g.slots;
  r.pairs = ceil_div(g.slots, 2);
  r.index_bits = g.index_bits;
  r.words = g.index_bits == 2 ? r.pairs : 2 * r.pairs;
  return r;
}

// Bit at which the nibble of a row starts in its word.
inline int nibble_shift(int row) { return 4 * (row >> 1) + 32 * (row & 1); }

}  // namespace sk
