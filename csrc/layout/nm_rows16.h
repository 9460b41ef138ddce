// Format "nm_rows16": 16 rows side by side, so that one vector register (AVX-512) or two (AVX2, and
// four on NEON) hold the values of one slot for 16 rows. The CPU's format for every N:M pattern.
//
//   indices  uint64 [panels][words]        bits == 2: one word a pair of slots; bits == 4: one a slot
//   values   f32:    [panels][pairs][2][16]  slot 2p for 16 rows, then slot 2p + 1
//            16 bit: [panels][pairs][16][2]  both slots of a row in one 32-bit word
//
// A word holds a nibble for each row: row 2i in bits 4i of the low half, row 2i + 1 in bits 4i of
// the high half, so that broadcasting the word to 64-bit lanes and shifting lane pair i by 4i puts
// every row's nibble into its own 32-bit lane. bits == 2: the nibble is position(2p) |
// position(2p + 1) << 2. Slots are padded to an even number, rows to 16: with zeros, at position 0.
//
// 2:4 in f32 without vectors has a third section: in which order to multiply so that two rows share
// the loads of x. In each block of 64 columns the 16 rows of a panel are matched into pairs that
// have as many columns in common as every pair of the panel can; the rest of their columns stand
// alone.
//
//   order    [panels][blocks of 64 columns][528 bytes]
//              byte 0        S, columns in common of each pair, even
//              byte 8 + 65q  pair q = 0 to 7: rows a | b << 4, then S entries in common, then for
//                            the other columns an entry of a and an entry of b in turn
//            entry: column << 2 | slot of a << 1 | slot of b
//                   column in the block (6 bits), slot in its group; alone: the slot in bit 1
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

constexpr int kPairColumns = 64, kPairsPerPanel = kRows16 / 2;
constexpr int kPairListBytes = 65, kPairBlockBytes = 8 + kPairsPerPanel * kPairListBytes;

inline bool has_pairs(const sk_pattern& p, int dtype) {
  return p.family == SK_FAMILY_NM && p.kept == 2 && p.group == 4 && p.vector == 1 &&
         dtype == SK_F32;
}

// Indices and values, without `order`.
void pack_nm_values(const sk_weight& weight, const PackedHeader& header, uint8_t* base);

// A block of at most 64 columns of a 2:4 panel: which of them each row keeps, and in which slot of its
// group. Rows past n hold zeros, so any two positions do, if they differ.
struct BlockColumns {
  BlockColumns(const uint64_t* words, int64_t groups, int64_t real_rows);
  uint64_t columns[kRows16] = {};
  uint8_t slot_of[kRows16][kPairColumns] = {};
};

// Bit at which the nibble of a row starts in its word.
inline int nibble_shift(int row) { return 4 * (row >> 1) + 32 * (row & 1); }

}  // namespace sk
