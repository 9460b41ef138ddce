#include "layout/bsr_rows.h"

namespace sk {
namespace {

int64_t segments(const PackedHeader& h) {
  return ceil_div(ceil_div(h.k, h.pattern.block_cols), bsr_segment_blocks(h));
}

// Calls f(canonical, first, count, segment) for the `count` blocks of each segment of each block
// row: where they begin in the canonical arrays and in the packed ones. `order` is complete.
template <class F>
void for_each_run(const PackedHeader& h, const int32_t* order, F f) {
  const int64_t block_rows = ceil_div(h.n, h.pattern.block_rows);
  int64_t canonical = 0;
  for (int64_t row = 0; row < block_rows; ++row) {
    for (int64_t segment = 0; segment < segments(h); ++segment) {
      const int32_t* at = order + segment * block_rows + row;
      f(canonical, int64_t(at[0]), int64_t(at[1]) - at[0], segment);
      canonical += at[1] - at[0];
    }
  }
}

// Calls f(index in the canonical values, index in the packed values) for every element.
template <class F>
void for_each_element(const PackedHeader& h, const int32_t* order, F f) {
  const int rows = h.pattern.block_rows, cols = h.pattern.block_cols, panel_rows = h.panel_rows;
  const bool paired = bsr_paired(h);
  for_each_run(h, order, [&](int64_t canonical, int64_t first, int64_t count, int64_t) {
    for (int64_t b = 0; b < count; ++b) {
      for (int row = 0; row < rows; ++row) {
        const int64_t panel = row / panel_rows, lane = row % panel_rows;
        const int64_t base = first * rows * cols + (panel * count + b) * cols * panel_rows;
        for (int col = 0; col < cols; ++col) {
          const int64_t inner = paired ? (int64_t(col >> 1) * panel_rows + lane) * 2 + (col & 1)
                                       : int64_t(col) * panel_rows + lane;
          f(((canonical + b) * rows + row) * cols + col, base + inner);
        }
      }
    }
  });
}

// First block of each segment of each block row, and the end.
void fill_order(const PackedHeader& h, const int32_t* crow, const int32_t* columns,
                int32_t* order) {
  const int64_t block_rows = ceil_div(h.n, h.pattern.block_rows);
  for (int64_t row = 0; row < block_rows; ++row) {
    for (int64_t b = crow[row]; b < crow[row + 1]; ++b)
      ++order[columns[b] / bsr_segment_blocks(h) * block_rows + row + 1];
  }
  for (int64_t i = 0; i < segments(h) * block_rows; ++i) order[i + 1] += order[i];
}

}  // namespace

void layout_bsr_rows(PackedHeader& h) {
  const WeightSizes sizes = weight_sizes(h.pattern, h.dtype, h.n, h.k, h.nnzb);
  SectionCursor cursor;
  h.panel_rows = bsr_panel_rows(h.pattern.block_rows);
  h.order_offset = cursor.take((segments(h) * ceil_div(h.n, h.pattern.block_rows) + 1) * 4);
  h.indices_offset = cursor.take(h.nnzb * (bsr_narrow(h.panel_rows) ? 1 : 4));
  h.values_offset = cursor.take(sizes.values);
  h.bytes = cursor.end();
}

void pack_bsr_rows(const sk_weight& w, const PackedHeader& h, uint8_t* base) {
  const int32_t* columns = static_cast<const int32_t*>(w.indices);
  int32_t* order = reinterpret_cast<int32_t*>(base + h.order_offset);
  fill_order(h, static_cast<const int32_t*>(w.crow_indices), columns, order);
  uint8_t* narrow = base + h.indices_offset;
  uint32_t* wide = reinterpret_cast<uint32_t*>(narrow);
  for_each_run(h, order, [&](int64_t canonical, int64_t first, int64_t count, int64_t segment) {
    for (int64_t b = 0; b < count; ++b) {
      const int32_t column = columns[canonical + b];
      if (bsr_narrow(h.panel_rows)) {
        narrow[first + b] = uint8_t(column - segment * bsr_segment_blocks(h));
      } else {
        wide[first + b] = uint32_t(column) * uint32_t(h.pattern.block_cols);
      }
    }
  });
  with_element_type(w.dtype, [&](auto element) {
    using T = decltype(element);
    const T* from = static_cast<const T*>(w.values);
    T* to = reinterpret_cast<T*>(base + h.values_offset);
    for_each_element(h, order,
                     [&](int64_t canonical, int64_t packed) { to[packed] = from[canonical]; });
  });
}

void unpack_bsr_rows(const PackedWeight& packed, sk_weight& out) {
  const PackedHeader& h = *packed.header;
  const int32_t* order = packed.section<int32_t>(h.order_offset);
  int32_t *crow = static_cast<int32_t*>(out.crow_indices),
          *columns = static_cast<int32_t*>(out.indices);
  *crow = 0;
  for_each_run(h, order, [&](int64_t canonical, int64_t first, int64_t count, int64_t segment) {
    for (int64_t b = first; b < first + count; ++b) {
      *columns++ = bsr_narrow(h.panel_rows)
                       ? int32_t(packed.indices<uint8_t>()[b] + segment * bsr_segment_blocks(h))
                       : int32_t(packed.indices<uint32_t>()[b] / uint32_t(h.pattern.block_cols));
    }
    if (segment == segments(h) - 1) *++crow = int32_t(canonical + count);
  });
  with_element_type(out.dtype, [&](auto element) {
    using T = decltype(element);
    const T* from = packed.values<T>();
    T* to = static_cast<T*>(out.values);
    for_each_element(h, order, [&](int64_t canonical, int64_t p) { to[canonical] = from[p]; });
  });
}

}  // namespace sk
