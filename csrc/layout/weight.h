// The canonical form of a pruned weight: geometry, checks, and the way from and to dense.
#pragma once
#include <cstdint>
#include <string>

#include "core/dtype.h"
#include "sparsekit/sparsekit.h"

namespace sk {

// Sizes that follow from pattern, n and k. NM fields are 0 for BSR and the other way round.
struct Geometry {
  int64_t groups = 0;      // of `group` columns, the last one padded
  int64_t slots = 0;       // kept values per row: groups * kept
  int index_bits = 0;      // 2 or 4
  int64_t index_rows = 0;  // rows of the indices array: one per vector
  int64_t index_row_bytes = 0;
  int64_t block_row_count = 0, block_col_count = 0;
};

std::string pattern_name(const sk_pattern& pattern);

// Checks the pattern and the sizes, then derives the geometry.
Geometry geometry(const sk_pattern& pattern, int dtype, int64_t n, int64_t k);

struct WeightSizes {
  int64_t values = 0, indices = 0, crow_indices = 0;  // bytes
};
WeightSizes weight_sizes(const sk_pattern& pattern, int dtype, int64_t n, int64_t k, int64_t nnzb);

// Refuses a weight whose arrays have other sizes than its description; returns nnzb (0 for NM).
int64_t check_weight_sizes(const sk_weight& weight);
// The same, and every index in range and ascending.
void validate(const sk_weight& weight);

int64_t count_blocks(const sk_pattern& pattern, const uint8_t* mask, int64_t n, int64_t k);
// What compress() says to a mask of which a group, in the vector that starts with row0, keeps `count`
// positions: too many.
[[noreturn]] void fail_mask(const sk_pattern& pattern, int64_t n, int64_t k, int64_t row0,
                            int64_t group, int count);
void compress(const void* dense, int64_t row_stride, const uint8_t* mask, sk_weight& out);
void decompress(const sk_weight& weight, void* dense, int64_t row_stride);

// Position of a slot in its group: entry `slot` of one row of the canonical indices.
inline int read_index(const uint8_t* row, int64_t slot, int bits) {
  return bits == 2 ? row[slot >> 2] >> (2 * (slot & 3)) & 3
                   : row[slot >> 1] >> (4 * (slot & 1)) & 15;
}
inline void write_index(uint8_t* row, int64_t slot, int bits, int position) {
  if (bits == 2) {
    row[slot >> 2] = uint8_t(row[slot >> 2] | position << (2 * (slot & 3)));
  } else {
    row[slot >> 1] = uint8_t(row[slot >> 1] | position << (4 * (slot & 1)));
  }
}

// Calls f with a value of an unsigned type as wide as the dtype: packers move bits, they never
// round.
template <class F>
void with_element_type(int dtype, F f) {
  if (dtype_size(dtype) == 4) {
    f(uint32_t{});
  } else {
    f(uint16_t{});
  }
}

}  // namespace sk
