// Format "bsr_rows": the rows of a block interleaved in panels of P = 16, 8, 4, 2 or 1 (the largest
// that divides block_rows), so that the P weights which meet one activation lie side by side.
//
//   order    int32  [block rows + 1]    crow_indices
//   indices  uint32 [nnzb]              first column of each block (not its block column)
//   values   per block row, per panel of it, per block:
//            f32, or an odd block_cols: [block_cols][P]
//            16 bit, even block_cols:   [block_cols / 2][P][2]   two columns in one 32-bit word
#pragma once
#include <cstdint>

#include "layout/format.h"

namespace sk {

inline int bsr_panel_rows(int block_rows) {
  int rows = 16;
  while (block_rows % rows) rows /= 2;
  return rows;
}

// Are two columns of a 16-bit block stored as one word?
inline bool bsr_paired(const PackedHeader& h) {
  return dtype_size(h.dtype) == 2 && h.pattern.block_cols % 2 == 0;
}

}  // namespace sk
