// Operand a of mma.m16n8k16 as a tile in memory: 16 rows x 16 columns of 16-bit elements, lane by
// lane, so that a warp loads it with 16 bytes a lane and multiplies.
//
//   lane 4g + q, element e = 0 to 7, with r = e / 2 (its register) and h = e % 2:
//     row g + 8 (r % 2), column 2q + h + 8 (r / 2)
#pragma once
#include <cstdint>

namespace sk {

constexpr int kMmaRows = 16, kMmaColumns = 16, kMmaLaneElements = 8;
constexpr int kMmaTileElements = kMmaRows * kMmaColumns, kMmaTileBytes = 2 * kMmaTileElements;

// Which element of a tile is the one in this row and column.
inline int mma_place(int row, int column) {
  const int lane = 4 * (row % 8) + column % 8 / 2;
  const int reg = row / 8 + 2 * (column / 8);
  return kMmaLaneElements * lane + 2 * reg + column % 2;
}

}  // namespace sk
