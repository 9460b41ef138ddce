// Format "bsr_rows": the rows of a block interleaved in panels of P = 16, 8, 4, 2 or 1 (the largest
// that divides block_rows), so that the P weights which meet one activation lie side by side.
//
// The columns are cut into segments: one for P >= 4, of 64 to 256 columns for narrow panels, whose
// kernels read one segment of many rows before the next and find it in one piece.
//
//   order    int32  [segments][block rows], and the end: first block of each
//   indices  uint32 [nnzb]              first column of each block (not its block column)
//            uint8  [nnzb]              narrow panels: block column in the segment
//   values   per segment, per block row, per panel of it, per block:
//            f32, or an odd block_cols: [block_cols][P]
//            16 bit, even block_cols:   [block_cols / 2][P][2]   two columns in one 32-bit word
#pragma once
#include <algorithm>
#include <cstdint>

#include "layout/format.h"

namespace sk {

inline int bsr_panel_rows(int block_rows) {
  int rows = 16;
  while (block_rows % rows) rows /= 2;
  return rows;
}

inline bool bsr_narrow(int panel_rows) { return panel_rows < 4; }

// Block columns of a segment: an even number, for about 24 kept columns of a row, as ends of loops
// and sums cost less the longer they are, while x is to stay near, and few enough for a byte.
inline int64_t bsr_segment_blocks(const PackedHeader& h) {
  const int64_t rows = h.pattern.block_rows, cols = h.pattern.block_cols;
  if (!bsr_narrow(h.panel_rows)) return ceil_div(h.k, cols);
  const int64_t kept = std::max<int64_t>(1, h.nnzb * rows * cols);
  const int64_t columns = std::clamp<int64_t>(24 * h.n * h.k / kept, 64, 256);
  return 2 * ceil_div(columns, 2 * cols);
}

// Are two columns of a 16-bit block stored as one word?
inline bool bsr_paired(const PackedHeader& h) {
  return dtype_size(h.dtype) == 2 && h.pattern.block_cols % 2 == 0;
}

}  // namespace sk
