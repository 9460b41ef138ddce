#include "layout/nm_mma_sp.h"

#include <cstring>

#include "layout/format.h"

namespace sk {
namespace {

int64_t column_tiles(const Geometry& g) { return ceil_div(g.groups, kSpUnitGroups); }

// Where the values and the positions of one group of a row stand.
struct Place {
  Place(int64_t row, int64_t group, int64_t tiles) {
    const int64_t unit = (row / kMmaRows * tiles + group / kSpUnitGroups) * kSpUnitBytes;
    const int in_row = int(row % kMmaRows), in_group = int(group % kSpUnitGroups);
    const int step_groups = kSpUnitGroups / 2;
    values = unit + in_group / step_groups * kMmaTileBytes +
             2 * mma_place(in_row, 2 * (in_group % step_groups));
    metadata = unit + kSpMetadataOffset + 4 * (4 * (in_row % 8) + in_group / 4);
    shift = 16 * (in_row / 8) + 4 * (in_group % 4);
  }
  int64_t values, metadata;  // bytes from the first unit; both values lie side by side
  int shift;                 // of the four bits in the word of metadata
};

}  // namespace

bool holds_nm_mma_sp(const sk_pattern& p, int dtype) {
  return p.kept == 2 && p.group == 4 && dtype_size(dtype) == 2;
}

void layout_nm_mma_sp(PackedHeader& h) {
  const Geometry g = geometry(h.pattern, h.dtype, h.n, h.k);
  const int64_t units = ceil_div(h.n, kMmaRows) * column_tiles(g);
  SectionCursor cursor;
  h.panel_rows = kMmaRows;
  h.order_offset = cursor.take(0);
  h.indices_offset = cursor.take(0);
  h.values_offset = cursor.take(units * kSpUnitBytes, kGpuLine);
  h.bytes = cursor.end();
}

void pack_nm_mma_sp(const sk_weight& w, const PackedHeader& h, uint8_t* base) {
  const Geometry g = geometry(w.pattern, w.dtype, w.n, w.k);
  const uint16_t* from = static_cast<const uint16_t*>(w.values);
  uint8_t* units = base + h.values_offset;
  for (int64_t unit = 0; unit < h.bytes - h.values_offset; unit += kSpUnitBytes) {
    uint32_t* metadata = reinterpret_cast<uint32_t*>(units + unit + kSpMetadataOffset);
    for (int lane = 0; lane < 32; ++lane) metadata[lane] = kSpPaddingMetadata;
  }
  for (int64_t row = 0; row < w.n; ++row) {
    const uint8_t* indices =
        static_cast<const uint8_t*>(w.indices) + row / w.pattern.vector * g.index_row_bytes;
    for (int64_t group = 0; group < g.groups; ++group) {
      const Place at(row, group, column_tiles(g));
      std::memcpy(units + at.values, from + row * g.slots + 2 * group, 4);
      const uint32_t positions =
          uint32_t(read_index(indices, 2 * group, 2) | read_index(indices, 2 * group + 1, 2) << 2);
      uint32_t& metadata = *reinterpret_cast<uint32_t*>(units + at.metadata);
      metadata = (metadata & ~(15u << at.shift)) | positions << at.shift;
    }
  }
}

void unpack_nm_mma_sp(const PackedWeight& packed, sk_weight& out) {
  const Geometry g = geometry(out.pattern, out.dtype, out.n, out.k);
  const uint8_t* units = packed.values<uint8_t>();
  uint16_t* to = static_cast<uint16_t*>(out.values);
  uint8_t* indices = static_cast<uint8_t*>(out.indices);
  std::memset(indices, 0, size_t(out.indices_bytes));
  for (int64_t row = 0; row < out.n; ++row) {
    for (int64_t group = 0; group < g.groups; ++group) {
      const Place at(row, group, column_tiles(g));
      std::memcpy(to + row * g.slots + 2 * group, units + at.values, 4);
      if (row % out.pattern.vector) continue;  // the vector's first row speaks for all
      const uint32_t positions =
          *reinterpret_cast<const uint32_t*>(units + at.metadata) >> at.shift;
      uint8_t* row_indices = indices + row / out.pattern.vector * g.index_row_bytes;
      write_index(row_indices, 2 * group, 2, int(positions & 3));
      write_index(row_indices, 2 * group + 1, 2, int(positions >> 2 & 3));
    }
  }
}

}  // namespace sk
