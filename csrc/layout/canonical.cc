// Formats "nm" and "bsr": the canonical arrays one after the other. What the scalar kernels read.
#include <cstring>

#include "layout/format.h"

namespace sk {
namespace {

void layout_arrays(PackedHeader& h) {
  const WeightSizes sizes = weight_sizes(h.pattern, h.dtype, h.n, h.k, h.nnzb);
  SectionCursor cursor;
  h.panel_rows = 1;
  h.order_offset = cursor.take(sizes.crow_indices);
  h.indices_offset = cursor.take(sizes.indices);
  h.values_offset = cursor.take(sizes.values);
  h.bytes = cursor.end();
}

void copy(void* to, const void* from, int64_t bytes) {
  if (bytes) std::memcpy(to, from, size_t(bytes));  // an empty array may be NULL
}

void pack_arrays(const sk_weight& w, const PackedHeader& h, uint8_t* base) {
  copy(base + h.order_offset, w.crow_indices, w.crow_indices_bytes);
  copy(base + h.indices_offset, w.indices, w.indices_bytes);
  copy(base + h.values_offset, w.values, w.values_bytes);
}

void unpack_arrays(const PackedWeight& packed, sk_weight& out) {
  const PackedHeader& h = *packed.header;
  copy(out.crow_indices, packed.base + h.order_offset, out.crow_indices_bytes);
  copy(out.indices, packed.base + h.indices_offset, out.indices_bytes);
  copy(out.values, packed.base + h.values_offset, out.values_bytes);
}

}  // namespace

void layout_nm(PackedHeader& h) { layout_arrays(h); }
void pack_nm(const sk_weight& w, const PackedHeader& h, uint8_t* base) { pack_arrays(w, h, base); }
void unpack_nm(const PackedWeight& packed, sk_weight& out) { unpack_arrays(packed, out); }
void layout_bsr(PackedHeader& h) { layout_arrays(h); }
void pack_bsr(const sk_weight& w, const PackedHeader& h, uint8_t* base) { pack_arrays(w, h, base); }
void unpack_bsr(const PackedWeight& packed, sk_weight& out) { unpack_arrays(packed, out); }

}  // namespace sk
