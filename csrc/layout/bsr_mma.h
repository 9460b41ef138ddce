// Format "bsr_mma": blocks of 16, 32, 64 or 128 rows and columns in 16 bit as the registers of
// mma.m16n8k16, for tensor cores. Blocks are cut into slices of 16 columns; those of a block row
// lie one after the other, as do its stages of at most four slices: what a thread block works on
// between two barriers. An empty block row has one stage without slices, because its output is
// written all the same.
//
//   order    int32 [block rows + 1]    first slice of each block row
//            int32 [block rows + 1]    first stage of each block row, on the next multiple of 64
//   indices  int32 [slices]            first column of each slice
//   values   [slices][block_rows / 16] tiles (layout/mma_tile.h), from a multiple of 128 on
#pragma once
#include <cstdint>

#include "layout/mma_tile.h"

namespace sk {

struct PackedHeader;

constexpr int kSliceColumns = kMmaColumns, kStageSlices = 4;

int64_t bsr_mma_block_rows(const PackedHeader& header);
int64_t bsr_mma_slices(const PackedHeader& header);
// Bytes from the start of the buffer to the first slices and the first stages of the block rows.
int64_t bsr_mma_slices_offset(const PackedHeader& header);
int64_t bsr_mma_stages_offset(const PackedHeader& header);

}  // namespace sk
