// Format "nm_mma_sp": 2:4 in 16 bit as the registers of mma.sp.m16n8k32, for tensor cores.
//
//   values  [row tiles][column tiles] units of 16 rows x 64 columns, 1152 bytes each:
//             0     [2 steps of 32 columns] a tile (layout/mma_tile.h) of the 16 kept columns
//             1024  uint32 [32 lanes]: metadata. Lane 4g + q: columns 16q to 16q + 15 of row g in
//                   the low half, of row g + 8 in the high half; four bits a group of four columns,
//                   position of the first kept value | position of the second << 2
//
// Step s takes its metadata from the lanes 4g + 2s and 4g + 2s + 1: the selector of mma.sp is s.
// Rows past n and groups past k hold zeros at the positions 0 and 1: the hardware wants ascending
// positions everywhere.
#pragma once
#include <cstdint>

#include "layout/mma_tile.h"

namespace sk {

constexpr int kSpUnitColumns = 64, kSpUnitGroups = kSpUnitColumns / 4;
constexpr int kSpMetadataOffset = 2 * kMmaTileBytes;
constexpr int kSpUnitBytes = kSpMetadataOffset + 32 * 4;
constexpr uint32_t kSpPaddingMetadata = 0x44444444;  // positions 0 and 1 in eight groups

}  // namespace sk
