// 2:4 weights in the format nm_mma_sp (layout/README.md): mma.sp, half the multiplications of dense.
//
// A unit is 16 rows by 64 columns, one stage of 16 rows: 1152 bytes, the registers of two instructions and the
// metadata of both in one 32-bit register a lane, which the instruction's selector tells apart.
#pragma once
#include "cuda/matmul_mma.cuh"
#include "layout/nm_mma_sp.h"

namespace sk::cuda {

template <class Tile>
class NmWeights {
  static constexpr int kUnitBytes = kSpUnitBytes,
                       kUnits = Tile::kRows / 16;  // units of a tile in one stage
  static constexpr int kUnitsPerWarp = kUnits / (Tile::kThreads / 32);
  static_assert(kUnits % (Tile::kThreads / 32) == 0, "copies come out even");

 public:
  static constexpr int kStageBytes = kUnits * kUnitBytes;

  SK_DEVICE explicit NmWeights(const MatmulParams& p) : p_(p) {}

  SK_DEVICE int row_tiles() const { return (p_.epilogue.n + Tile::kRows - 1) / Tile::kRows; }
  SK_DEVICE int stage_start(int row_tile) const { return row_tile * stages(); }
  SK_DEVICE int row_of(int stage) const { return stage / stages(); }

  SK_DEVICE void start_tile(const Work& work) {
#pragma unroll
    for (int i = 0; i < kUnitsPerWarp; ++i) {
      int unit = work.row_tile * kUnits + ptx::thread_index() / 32 * kUnitsPerWarp + i;
      const int units = (p_.epilogue.n + 15) / 16;
      if (unit >= units) unit = units - 1;  // past n: any row will do, it is not stored
      from_[i] = p_.weight + p_.values_offset +
                 (int64_t(unit) * stages() + work.begin) * kUnitBytes +
                 ptx::thread_index() % 32 * 16;
    }
  }
  // First column of a chunk of 8 columns of a stage.
  SK_DEVICE int column(int stage, int chunk) const { return stage * kStageColumns + chunk * 8; }

  // Stages are asked for in turn. Each warp copies whole units: 512 bytes of values, twice, then the metadata.
  SK_DEVICE void copy(uint32_t slot, int /*stage*/) {
    const int lane = ptx::thread_index() % 32;
    uint32_t to =
        slot + uint32_t(ptx::thread_index() / 32 * kUnitsPerWarp * kUnitBytes + lane * 16);
#pragma unroll
    for (int i = 0; i < kUnitsPerWarp; ++i, to += kUnitBytes) {
      ptx::cp_async_16(to, from_[i]);
      ptx::cp_async_16(to + kMmaTileBytes, from_[i] + kMmaTileBytes);
      if (lane < 8) ptx::cp_async_16(to + kSpMetadataOffset, from_[i] + kSpMetadataOffset);
      from_[i] += kUnitBytes;
    }
  }

  // sums += 64 columns. `slot`: the stage's units; `x`: the warp's first token in the stage.
  template <int kRowTiles, int kTokenTiles>
  SK_DEVICE static void multiply(uint32_t slot, int warp_row, uint32_t x,
                                 float (&sums)[kRowTiles][kTokenTiles][4]) {
    const int lane = ptx::thread_index() % 32;
    const uint32_t unit = slot + uint32_t(warp_row / 16 * kUnitBytes);
    const uint32_t x_row = x + uint32_t(lane % 8 * 128);
    uint32_t metadata[kRowTiles];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
      metadata[i] = ptx::load_shared<uint32_t>(
          unit + uint32_t(i * kUnitBytes + kSpMetadataOffset + lane * 4));
    step<0>(unit, x_row, metadata, sums);
    step<1>(unit, x_row, metadata, sums);
  }

 private:
  // Columns 32 kStep and the next 31: one instruction for each 16 rows and 8 tokens.
  template <int kStep, int kRowTiles, int kTokenTiles>
  SK_DEVICE static void step(uint32_t unit, uint32_t x_row, const uint32_t (&metadata)[kRowTiles],
                             float (&sums)[kRowTiles][kTokenTiles][4]) {
    const int lane = ptx::thread_index() % 32;
    const uint32_t chunk = uint32_t(((kStep * 4 + lane / 8) ^ lane % 8) * 16);
    uint4 a[kRowTiles];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
      a[i] = ptx::load_shared<uint4>(unit +
                                     uint32_t(i * kUnitBytes + kStep * kMmaTileBytes + lane * 16));
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b, x_row + uint32_t(j * 1024) + chunk);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
        ptx::mma_sp_m16n8k32<typename Tile::T, kStep>(sums[i][j], a[i], b, metadata[i]);
    }
  }

  SK_DEVICE int stages() const { return (p_.k + kStageColumns - 1) / kStageColumns; }

  const MatmulParams& p_;
  const uint8_t* from_[kUnitsPerWarp];
};

}  // namespace sk::cuda
