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
  static_assert(Tile::kTokenTiles % 2 == 0, "a load brings a slice of two of them");

  SK_DEVICE explicit BsrWeights(const MatmulParams& p) : p_(p) {}

  SK_DEVICE int row_tiles() const { return (p_.epilogue.n + Tile::kRows - 1) / Tile::kRows; }
  SK_DEVICE int stage_start(int block_row) const {
    return ptx::load_global_nc(first_slice() + (row_tiles() + 1 + 15) / 16 * 16 + block_row);
  }
  // The last block row that starts at or before the stage.
  SK_DEVICE int row_of(int stage) const {
    int low = 0, high = row_tiles();
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
    slice_ = ptx::load_global_nc(first_slice() + work.row_tile);
    end_ = ptx::load_global_nc(first_slice() + work.row_tile + 1);
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
    const uint8_t* from = values() + int64_t(slice) * kSliceBytes + ptx::thread_index() * 16;
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
      ptx::cp_async_16(to + uint32_t(at), some ? from + at : values(), some ? 16 : 0);
    }
  }

  // sums += a stage. `slot`: its slices; `x`: the warp's first token in the stage.
  template <int kRowTiles, int kTokenTiles>
  SK_DEVICE static void multiply(uint32_t slot, int warp_row, uint32_t x,
                                 float (&sums)[kRowTiles][kTokenTiles][4]) {
    const int lane = ptx::thread_index() % 32;
    const uint32_t fragment = slot + uint32_t(warp_row / 16 * kMmaTileBytes + lane * 16);
    // Lanes 0 to 15 point at the two chunks of 8 tokens, the others at those of the next 8.
    const uint32_t x_row = x + uint32_t((lane / 16 * 8 + lane % 8) * 128);
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      uint4 a[kRowTiles];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
        a[i] =
            ptx::load_shared<uint4>(fragment + uint32_t(slice * kSliceBytes + i * kMmaTileBytes));
      const uint32_t chunk = uint32_t(((slice * 2 + lane / 8 % 2) ^ lane % 8) * 16);
#pragma unroll
      for (int j = 0; j < kTokenTiles; j += 2) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, x_row + uint32_t(j * 1024) + chunk);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          ptx::mma_m16n8k16<typename Tile::T>(sums[i][j], a[i], b[0], b[1]);
          ptx::mma_m16n8k16<typename Tile::T>(sums[i][j + 1], a[i], b[2], b[3]);
        }
      }
    }
  }

 private:
  // Where the slice of this thread's chunk starts; past the block row's end no column at all.
  SK_DEVICE int column_of(int stage) const {
    const int slice = slice_ + stage * kSlices + ptx::thread_index() % (kStageColumns / 8) / 2;
    return slice < end_ ? ptx::load_global_nc(columns() + slice) : 1 << 30;
  }

  // Computed where they are needed: registers are short.
  SK_DEVICE const uint8_t* values() const { return p_.weight + p_.values_offset; }
  SK_DEVICE const int* columns() const {
    return reinterpret_cast<const int*>(p_.weight + p_.indices_offset);
  }
  SK_DEVICE const int* first_slice() const {
    return reinterpret_cast<const int*>(p_.weight + p_.order_offset);
  }

  const MatmulParams& p_;
  int slice_ = 0, end_ = 0, ahead_ = 0;
};

}  // namespace sk::cuda
