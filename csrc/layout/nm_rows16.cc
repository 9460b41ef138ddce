#include "layout/nm_rows16.h"

#include <cstring>

namespace sk {
namespace {

// Index of a row's slot in the values of its panel.
template <class T>
int64_t value_index(int64_t slot, int row) {
  return sizeof(T) == 4 ? slot * kRows16 + row : ((slot >> 1) * kRows16 + row) * 2 + (slot & 1);
}

}  // namespace

void layout_nm_rows16(PackedHeader& h) {
  const NmRows16 r = nm_rows16(h);
  SectionCursor cursor;
  h.panel_rows = kRows16;
  h.crow_offset = cursor.take(0);
  h.indices_offset = cursor.take(r.panels * r.words * 8);
  h.values_offset = cursor.take(r.panels * r.pairs * 2 * kRows16 * dtype_size(h.dtype));
  h.bytes = cursor.end();
}

void pack_nm_rows16(const sk_weight& w, const PackedHeader& h, uint8_t* base) {
  const NmRows16 r = nm_rows16(h);
  const Geometry g = geometry(w.pattern, w.dtype, w.n, w.k);
  uint64_t* words = reinterpret_cast<uint64_t*>(base + h.indices_offset);
  with_element_type(w.dtype, [&](auto element) {
    using T = decltype(element);
    const T* from = static_cast<const T*>(w.values);
    T* to = reinterpret_cast<T*>(base + h.values_offset);
    for (int64_t row = 0; row < w.n; ++row) {
      const int64_t panel = row / kRows16;
      const int lane = int(row % kRows16);
      const uint8_t* indices = static_cast<const uint8_t*>(w.indices) + row / w.pattern.vector * g.index_row_bytes;
      for (int64_t slot = 0; slot < r.slots; ++slot) {
        const uint64_t position = uint64_t(read_index(indices, slot, r.index_bits));
        const int64_t word = r.index_bits == 2 ? slot >> 1 : slot;
        const int shift = nibble_shift(lane) + (r.index_bits == 2 ? 2 * int(slot & 1) : 0);
        words[panel * r.words + word] |= position << shift;
        to[panel * r.pairs * 2 * kRows16 + value_index<T>(slot, lane)] = from[row * r.slots + slot];
      }
    }
  });
}

void unpack_nm_rows16(const PackedWeight& packed, sk_weight& out) {
  const NmRows16 r = nm_rows16(*packed.header);
  const Geometry g = geometry(out.pattern, out.dtype, out.n, out.k);
  const uint64_t* words = packed.indices<uint64_t>();
  uint8_t* indices = static_cast<uint8_t*>(out.indices);
  std::memset(indices, 0, size_t(out.indices_bytes));
  with_element_type(out.dtype, [&](auto element) {
    using T = decltype(element);
    const T* from = packed.values<T>();
    T* to = static_cast<T*>(out.values);
    for (int64_t row = 0; row < out.n; ++row) {
      const int64_t panel = row / kRows16;
      const int lane = int(row % kRows16);
      for (int64_t slot = 0; slot < r.slots; ++slot) {
        to[row * r.slots + slot] = from[panel * r.pairs * 2 * kRows16 + value_index<T>(slot, lane)];
        if (row % out.pattern.vector) continue;  // the vector's first row speaks for all
        const uint64_t nibble =
            words[panel * r.words + (r.index_bits == 2 ? slot >> 1 : slot)] >> nibble_shift(lane);
        const int position = r.index_bits == 2 ? int(nibble >> (2 * (slot & 1))) & 3 : int(nibble) & 15;
        write_index(indices + row / out.pattern.vector * g.index_row_bytes, slot, r.index_bits, position);
      }
    }
  });
}

}  // namespace sk
