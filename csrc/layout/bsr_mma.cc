#include "layout/bsr_mma.h"

#include <algorithm>

#include "layout/format.h"

namespace sk {
namespace {

int slices_per_block(const PackedHeader& h) { return h.pattern.block_cols / kSliceColumns; }

bool is_side(int side) { return side == 16 || side == 32 || side == 64 || side == 128; }

int64_t row_starts_bytes(const PackedHeader& h) {  // of one of the two arrays in `order`
  return 4 * (bsr_mma_block_rows(h) + 1);
}

// Calls f(index in the canonical values, index in the packed values) for every element.
template <class F>
void for_each_element(const PackedHeader& h, F f) {
  const int rows = h.pattern.block_rows, cols = h.pattern.block_cols, tiles = rows / kMmaRows;
  for (int64_t block = 0; block < h.nnzb; ++block) {
    for (int row = 0; row < rows; ++row) {
      for (int col = 0; col < cols; ++col) {
        const int64_t slice = block * slices_per_block(h) + col / kSliceColumns;
        const int64_t tile = slice * tiles + row / kMmaRows;
        f((block * rows + row) * cols + col,
          tile * kMmaTileElements + mma_place(row % kMmaRows, col % kSliceColumns));
      }
    }
  }
}

}  // namespace

int64_t bsr_mma_block_rows(const PackedHeader& h) { return ceil_div(h.n, h.pattern.block_rows); }
int64_t bsr_mma_slices(const PackedHeader& h) { return h.nnzb * slices_per_block(h); }
int64_t bsr_mma_slices_offset(const PackedHeader& h) { return h.order_offset; }
int64_t bsr_mma_stages_offset(const PackedHeader& h) {
  return h.order_offset + round_up(row_starts_bytes(h), kAlignment);
}

bool holds_bsr_mma(const sk_pattern& p, int dtype) {
  return is_side(p.block_rows) && is_side(p.block_cols) && dtype_size(dtype) == 2;
}

void layout_bsr_mma(PackedHeader& h) {
  const WeightSizes sizes = weight_sizes(h.pattern, h.dtype, h.n, h.k, h.nnzb);
  const int64_t slices = bsr_mma_slices(h);
  SK_REQUIRE(slices < int64_t{1} << 31,
             "pack: format bsr_mma holds at most 2^31 - 1 slices of 16 columns, ", h.nnzb,
             " blocks of ", h.pattern.block_cols, " columns are ", slices,
             "; split the weight along n");
  SectionCursor cursor;
  h.panel_rows = kMmaRows;
  h.order_offset = cursor.take(round_up(row_starts_bytes(h), kAlignment) + row_starts_bytes(h));
  h.indices_offset = cursor.take(4 * slices);
  h.values_offset = cursor.take(sizes.values, kGpuLine);
  h.bytes = cursor.end();
}

void pack_bsr_mma(const sk_weight& w, const PackedHeader& h, uint8_t* base) {
  const int per_block = slices_per_block(h);
  const int32_t* crow = static_cast<const int32_t*>(w.crow_indices);
  const int32_t* block_columns = static_cast<const int32_t*>(w.indices);
  int32_t* first_slice = reinterpret_cast<int32_t*>(base + bsr_mma_slices_offset(h));
  int32_t* first_stage = reinterpret_cast<int32_t*>(base + bsr_mma_stages_offset(h));
  for (int64_t row = 0; row < bsr_mma_block_rows(h); ++row) {
    const int slices = (crow[row + 1] - crow[row]) * per_block;
    first_slice[row + 1] = first_slice[row] + slices;
    first_stage[row + 1] =
        first_stage[row] + int(std::max<int64_t>(1, ceil_div(slices, kStageSlices)));
  }
  int32_t* columns = reinterpret_cast<int32_t*>(base + h.indices_offset);
  for (int64_t slice = 0; slice < bsr_mma_slices(h); ++slice) {
    columns[slice] = block_columns[slice / per_block] * h.pattern.block_cols +
                     int(slice % per_block) * kSliceColumns;
  }
  const uint16_t* from = static_cast<const uint16_t*>(w.values);
  uint16_t* to = reinterpret_cast<uint16_t*>(base + h.values_offset);
  for_each_element(h, [&](int64_t canonical, int64_t packed) { to[packed] = from[canonical]; });
}

void unpack_bsr_mma(const PackedWeight& packed, sk_weight& out) {
  const PackedHeader& h = *packed.header;
  const int per_block = slices_per_block(h);
  int32_t* crow = static_cast<int32_t*>(out.crow_indices);
  for (int64_t row = 0; row <= bsr_mma_block_rows(h); ++row) {
    crow[row] = packed.crow()[row] / per_block;
  }
  int32_t* block_columns = static_cast<int32_t*>(out.indices);
  for (int64_t block = 0; block < h.nnzb; ++block) {
    block_columns[block] = packed.indices<int32_t>()[block * per_block] / h.pattern.block_cols;
  }
  const uint16_t* from = packed.values<uint16_t>();
  uint16_t* to = static_cast<uint16_t*>(out.values);
  for_each_element(h,
                   [&](int64_t canonical, int64_t packed_at) { to[canonical] = from[packed_at]; });
}

}  // namespace sk
