#include "layout/bsr_rows.h"

#include <cstring>

namespace sk {
namespace {

// Calls f(index in the canonical values, index in the packed values) for every element.
template <class F>
void for_each_element(const PackedHeader& h, const int32_t* crow, F f) {
  const int rows = h.pattern.block_rows, cols = h.pattern.block_cols, panel_rows = h.panel_rows;
  const bool paired = bsr_paired(h);
  const int64_t block_rows = ceil_div(h.n, rows);
  for (int64_t br = 0; br < block_rows; ++br) {
    const int64_t first = crow[br], count = crow[br + 1] - first;
    for (int64_t b = 0; b < count; ++b) {
      for (int row = 0; row < rows; ++row) {
        const int64_t panel = row / panel_rows, lane = row % panel_rows;
        const int64_t base = first * rows * cols + (panel * count + b) * cols * panel_rows;
        for (int col = 0; col < cols; ++col) {
          const int64_t inner = paired ? (int64_t(col >> 1) * panel_rows + lane) * 2 + (col & 1)
                                       : int64_t(col) * panel_rows + lane;
          f(((first + b) * rows + row) * cols + col, base + inner);
        }
      }
    }
  }
}

}  // namespace

void layout_bsr_rows(PackedHeader& h) {
  const WeightSizes sizes = weight_sizes(h.pattern, h.dtype, h.n, h.k, h.nnzb);
  SectionCursor cursor;
  h.panel_rows = bsr_panel_rows(h.pattern.block_rows);
  h.order_offset = cursor.take(sizes.crow_indices);
  h.indices_offset = cursor.take(sizes.indices);
  h.values_offset = cursor.take(sizes.values);
  h.bytes = cursor.end();
}

void pack_bsr_rows(const sk_weight& w, const PackedHeader& h, uint8_t* base) {
  const int32_t* crow = static_cast<const int32_t*>(w.crow_indices);
  const int32_t* columns = static_cast<const int32_t*>(w.indices);
  std::memcpy(base + h.order_offset, crow, size_t(w.crow_indices_bytes));
  uint32_t* starts = reinterpret_cast<uint32_t*>(base + h.indices_offset);
  for (int64_t b = 0; b < h.nnzb; ++b)
    starts[b] = uint32_t(columns[b]) * uint32_t(h.pattern.block_cols);
  with_element_type(w.dtype, [&](auto element) {
    using T = decltype(element);
    const T* from = static_cast<const T*>(w.values);
    T* to = reinterpret_cast<T*>(base + h.values_offset);
    for_each_element(h, crow,
                     [&](int64_t canonical, int64_t packed) { to[packed] = from[canonical]; });
  });
}

void unpack_bsr_rows(const PackedWeight& packed, sk_weight& out) {
  const PackedHeader& h = *packed.header;
  std::memcpy(out.crow_indices, packed.crow(), size_t(out.crow_indices_bytes));
  int32_t* columns = static_cast<int32_t*>(out.indices);
  for (int64_t b = 0; b < h.nnzb; ++b) {
    columns[b] = int32_t(packed.indices<uint32_t>()[b] / uint32_t(h.pattern.block_cols));
  }
  with_element_type(out.dtype, [&](auto element) {
    using T = decltype(element);
    const T* from = packed.values<T>();
    T* to = static_cast<T*>(out.values);
    for_each_element(h, packed.crow(),
                     [&](int64_t canonical, int64_t p) { to[canonical] = from[p]; });
  });
}

}  // namespace sk
