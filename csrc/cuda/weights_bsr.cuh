// Block-sparse weights in the format bsr_mma (layout/README.md): dense mma on the blocks that are there.
//
// Blocks are cut into slices of 16 columns. A stage is up to four slices of a block row, from anywhere along k:
// only the copy of x knows where.
#pragma once
#include "cuda/matmul_mma.cuh"
#include "layout/bsr_mma.h"

namespace sk::cuda {

// Tile::kRows is the rows of a block.
template <class Tile>
class BsrWeights {
  static constexpr int kSliceBytes = Tile::kRows * 32, kSlices = kStageSlices;

 public:
  static constexpr int kStageBytes = kSlices * kSliceBytes;
  static_assert(kStageBytes % (Tile::kThreads * 16) == 0, "copies come out even");

  SK_DEVICE explicit BsrWeights(const MatmulParams& p)
      : values_(p.weight + p.values_offset),
        columns_(reinterpret_cast<const int*>(p.weight + p.indices_offset)),
        first_slice_(reinterpret_cast<const int*>(p.weight + p.order_offset)),
        block_rows_((p.epilogue.n + Tile::kRows - 1) / Tile::kRows),
        first_stage_(first_slice_ + (block_rows_ + 1 + 15) / 16 * 16) {}

  SK_DEVICE int row_tiles() const { return block_rows_; }
  SK_DEVICE int stage_start(int block_row) const {
    return ptx::load_global_nc(first_stage_ + block_row);
  }
  // The last block row that starts at or before the stage.
  SK_DEVICE int row_of(int stage) const {
    int low = 0, high = block_rows_;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (stage_start(middle) <= stage) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }

  SK_DEVICE void start_tile(const Work& work) {
    slice_ = ptx::load_global_nc(first_slice_ + work.row_tile);
    end_ = ptx::load_global_nc(first_slice_ + work.row_tile + 1);
    ahead_ = column_of(work.begin);
  }

  // Columns are asked for stage by stage; each was loaded a stage before.
  SK_DEVICE int column(int stage, int chunk) {
    const int column = ahead_;
    ahead_ = column_of(stage + 1);
    return column + chunk % 2 * 8;
  }

  // Slices past the block row's end come as zeros, so that what stands there cannot matter.
  SK_DEVICE void copy(uint32_t slot, int stage) const {
    const int slice = slice_ + stage * kSlices;
    const uint8_t* from = values_ + int64_t(slice) * kSliceBytes + ptx::thread_index() * 16;
    const uint32_t to = slot + uint32_t(ptx::thread_index() * 16);
    const int bytes = (end_ - slice) * kSliceBytes;
    if (bytes >= kStageBytes) {
#pragma unroll
      for (int at = 0; at < kStageBytes; at += Tile::kThreads * 16)
        ptx::cp_async_16(to + uint32_t(at), from + at);
      return;
    }
#pragma unroll
    for (int at = 0; at < kStageBytes; at += Tile::kThreads * 16) {
      const bool some = ptx::thread_index() * 16 + at < bytes;
      ptx::cp_async_16(to + uint32_t(at), some ? from + at : values_, some ? 16 : 0);
    }
  }

  // sums += a stage. `slot`: its slices; `x`: the warp's first token in the stage.
  template <int kRowTiles, int kTokenTiles>
  SK_DEVICE static void multiply(uint32_t slot, int warp_row, uint32_t x,
                                 float (&sums)[kRowTiles][kTokenTiles][4]) {
    const int lane = ptx::thread_index() % 32;
    const uint32_t fragment = slot + uint32_t(warp_row / 16 * kMmaTileBytes + lane * 16);
    const uint32_t x_row = x + uint32_t(lane % 8 * 128);
#pragma unroll
    for (int pair = 0; pair < kSlices / 2; ++pair) {
      uint4 a[2][kRowTiles];
#pragma unroll
      for (int s = 0; s < 2; ++s) {
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i)
          a[s][i] = ptx::load_shared<uint4>(
              fragment + uint32_t((2 * pair + s) * kSliceBytes + i * kMmaTileBytes));
      }
      const uint32_t chunk = uint32_t(((pair * 4 + lane / 8) ^ lane % 8) * 16);
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, x_row + uint32_t(j * 1024) + chunk);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          ptx::mma_m16n8k16<typename Tile::T>(sums[i][j], a[0][i], b[0], b[1]);
          ptx::mma_m16n8k16<typename Tile::T>(sums[i][j], a[1][i], b[2], b[3]);
        }
      }
    }
  }

 private:
  // Where the slice of this thread's chunk starts; past the block row's end no column at all.
  SK_DEVICE int column_of(int stage) const {
    const int slice = slice_ + stage * kSlices + ptx::thread_index() % (kStageColumns / 8) / 2;
    return slice < end_ ? ptx::load_global_nc(columns_ + slice) : 1 << 30;
  }

  const uint8_t* values_;
  const int* columns_;
  const int* first_slice_;
  const int block_rows_;
  const int* first_stage_;
  int slice_ = 0, end_ = 0, ahead_ = 0;
};

}  // namespace sk::cuda
