#include "layout/weight.h"

#include <algorithm>
#include <vector>

namespace sk {
namespace {

constexpr int64_t kMaxSize = int64_t{1} << 31;  // per dimension: offsets of a panel stay in 32 bits
constexpr int64_t kMaxElements = int64_t{1} << 48;  // n * k: no size of any format overflows

int64_t read_crow(const sk_weight& w, int64_t row) {
  return static_cast<const int32_t*>(w.crow_indices)[row];
}

template <class T>
void compress_nm(const T* dense, int64_t row_stride, const uint8_t* mask, sk_weight& out) {
  const sk_pattern& p = out.pattern;
  const Geometry g = geometry(p, out.dtype, out.n, out.k);
  T* values = static_cast<T*>(out.values);
  uint8_t* indices = static_cast<uint8_t*>(out.indices);
  std::fill_n(indices, g.index_rows * g.index_row_bytes, uint8_t(0));
  std::vector<int> kept(size_t(p.group));
  for (int64_t v = 0; v < g.index_rows; ++v) {
    const int64_t row0 = v * p.vector, row1 = std::min(out.n, row0 + p.vector);
    for (int64_t group = 0; group < g.groups; ++group) {
      const int64_t col0 = group * p.group, width = std::min<int64_t>(p.group, out.k - col0);
      int count = 0;
      std::fill(kept.begin(), kept.end(), 0);
      for (int64_t row = row0; row < row1; ++row) {
        for (int64_t c = 0; c < width; ++c) kept[size_t(c)] |= mask[row * out.k + col0 + c] != 0;
      }
      for (int flag : kept) count += flag;
      if (count > p.kept) fail_mask(p, out.n, out.k, row0, group, count);
      for (int c = 0; count < p.kept; ++c) {  // fill up with zeros at the lowest free positions
        if (!kept[size_t(c)]) kept[size_t(c)] = 2, ++count;
      }
      int64_t slot = group * p.kept;
      for (int c = 0; c < p.group; ++c) {
        if (!kept[size_t(c)]) continue;
        write_index(indices + v * g.index_row_bytes, slot, g.index_bits, c);
        for (int64_t row = row0; row < row1; ++row) {
          const bool keep = c < width && mask[row * out.k + col0 + c];
          values[row * g.slots + slot] = keep ? dense[row * row_stride + col0 + c] : T(0);
        }
        ++slot;
      }
    }
  }
}

template <class T>
void compress_bsr(const T* dense, int64_t row_stride, const uint8_t* mask, sk_weight& out) {
  const sk_pattern& p = out.pattern;
  const Geometry g = geometry(p, out.dtype, out.n, out.k);
  const int64_t capacity = out.indices_bytes / 4;
  T* values = static_cast<T*>(out.values);
  int32_t* columns = static_cast<int32_t*>(out.indices);
  int32_t* crow = static_cast<int32_t*>(out.crow_indices);
  int64_t block = 0;
  crow[0] = 0;
  for (int64_t br = 0; br < g.block_row_count; ++br) {
    const int64_t row0 = br * p.block_rows, row1 = std::min(out.n, row0 + p.block_rows);
    for (int64_t bc = 0; bc < g.block_col_count; ++bc) {
      const int64_t col0 = bc * p.block_cols, col1 = std::min(out.k, col0 + p.block_cols);
      bool any = false;
      for (int64_t row = row0; row < row1 && !any; ++row) {
        any = std::any_of(mask + row * out.k + col0, mask + row * out.k + col1,
                          [](uint8_t b) { return b != 0; });
      }
      if (!any) continue;
      SK_REQUIRE(block < capacity, "compress: the mask keeps more blocks than the ", capacity,
                 " that the arrays hold; size them with sk_count_blocks");
      T* to = values + block * p.block_rows * p.block_cols;
      for (int64_t row = row0; row < row0 + p.block_rows; ++row) {
        for (int64_t col = col0; col < col0 + p.block_cols; ++col) {
          const bool keep = row < row1 && col < col1 && mask[row * out.k + col];
          *to++ = keep ? dense[row * row_stride + col] : T(0);
        }
      }
      columns[block++] = int32_t(bc);
    }
    crow[br + 1] = int32_t(block);
  }
  SK_REQUIRE(block == capacity, "compress: the mask keeps ", block, " blocks, the arrays hold ",
             capacity, "; size them with sk_count_blocks");
}

template <class T>
void decompress_nm(const sk_weight& w, T* dense, int64_t row_stride) {
  const Geometry g = geometry(w.pattern, w.dtype, w.n, w.k);
  const T* values = static_cast<const T*>(w.values);
  const uint8_t* indices = static_cast<const uint8_t*>(w.indices);
  for (int64_t row = 0; row < w.n; ++row) {
    const uint8_t* positions = indices + row / w.pattern.vector * g.index_row_bytes;
    for (int64_t slot = 0; slot < g.slots; ++slot) {
      const int64_t col =
          slot / w.pattern.kept * w.pattern.group + read_index(positions, slot, g.index_bits);
      if (col < w.k) dense[row * row_stride + col] = values[row * g.slots + slot];
    }
  }
}

template <class T>
void decompress_bsr(const sk_weight& w, T* dense, int64_t row_stride) {
  const sk_pattern& p = w.pattern;
  const Geometry g = geometry(p, w.dtype, w.n, w.k);
  const T* values = static_cast<const T*>(w.values);
  const int32_t* columns = static_cast<const int32_t*>(w.indices);
  for (int64_t br = 0; br < g.block_row_count; ++br) {
    for (int64_t b = read_crow(w, br); b < read_crow(w, br + 1); ++b) {
      const T* block = values + b * p.block_rows * p.block_cols;
      const int64_t row0 = br * p.block_rows, col0 = columns[b] * int64_t(p.block_cols);
      const int64_t rows = std::min<int64_t>(p.block_rows, w.n - row0);
      const int64_t cols = std::min<int64_t>(p.block_cols, w.k - col0);
      for (int64_t row = 0; row < rows; ++row) {
        std::copy_n(block + row * p.block_cols, cols, dense + (row0 + row) * row_stride + col0);
      }
    }
  }
}

}  // namespace

std::string pattern_name(const sk_pattern& p) {
  if (p.family == SK_FAMILY_BSR) return concat("bsr", p.block_rows, "x", p.block_cols);
  return concat(p.kept, ":", p.group, p.vector > 1 ? concat("v", p.vector) : "");
}

void fail_mask(const sk_pattern& p, int64_t n, int64_t k, int64_t row0, int64_t group, int count) {
  const int64_t row1 = std::min(n, row0 + p.vector);
  const int64_t col0 = group * p.group, col1 = std::min(k, col0 + p.group);
  throw Error(SK_INVALID_ARGUMENT,
              concat("mask: does not fit ", pattern_name(p), ": rows ", row0, " to ", row1 - 1,
                     ", columns ", col0, " to ", col1 - 1, " keep ", count, " positions, at most ",
                     p.kept, " are allowed; make the mask with sparsekit.mask"));
}

Geometry geometry(const sk_pattern& p, int dtype, int64_t n, int64_t k) {
  dtype_size(dtype);
  SK_REQUIRE(n >= 1 && k >= 1 && n < kMaxSize && k < kMaxSize,
             "weight: expected n and k from 1 to 2^31 - 1, got n=", n, ", k=", k);
  SK_REQUIRE(n * k <= kMaxElements, "weight: expected at most 2^48 elements, got n=", n, ", k=", k);
  Geometry g;
  if (p.family == SK_FAMILY_NM) {
    SK_REQUIRE(p.group == 2 || p.group == 4 || p.group == 8 || p.group == 16,
               "N:M pattern: expected M in 2, 4, 8, 16, got ", p.group);
    SK_REQUIRE(p.kept >= 1 && p.kept < p.group, "N:M pattern: expected 1 <= N < M, got ", p.kept,
               ":", p.group);
    SK_REQUIRE(p.vector == 1 || p.vector == 4 || p.vector == 8 || p.vector == 16,
               "N:M pattern: expected a vector of 1, 4, 8 or 16 rows, got ", p.vector);
    g.groups = ceil_div(k, p.group);
    g.slots = g.groups * p.kept;
    g.index_bits = p.group <= 4 ? 2 : 4;
    g.index_rows = ceil_div(n, p.vector);
    g.index_row_bytes = ceil_div(g.slots * g.index_bits, 8);
  } else {
    SK_REQUIRE(p.family == SK_FAMILY_BSR, "pattern: expected family nm (0) or bsr (1), got ",
               p.family);
    SK_REQUIRE(p.block_rows >= 1 && p.block_rows <= 128 && p.block_cols >= 1 && p.block_cols <= 128,
               "block-sparse pattern: expected block sides from 1 to 128, got ", p.block_rows, "x",
               p.block_cols);
    g.block_row_count = ceil_div(n, p.block_rows);
    g.block_col_count = ceil_div(k, p.block_cols);
  }
  return g;
}

WeightSizes weight_sizes(const sk_pattern& p, int dtype, int64_t n, int64_t k, int64_t nnzb) {
  const Geometry g = geometry(p, dtype, n, k);
  if (p.family == SK_FAMILY_NM) {
    return {n * g.slots * dtype_size(dtype), g.index_rows * g.index_row_bytes, 0};
  }
  SK_REQUIRE(nnzb >= 0 && nnzb <= std::min(g.block_row_count * g.block_col_count, kMaxSize - 1),
             "bsr: expected 0 to ", g.block_row_count * g.block_col_count, " blocks, got ", nnzb);
  return {nnzb * p.block_rows * p.block_cols * dtype_size(dtype), nnzb * 4,
          (g.block_row_count + 1) * 4};
}

int64_t check_weight_sizes(const sk_weight& w) {
  const bool bsr = w.pattern.family == SK_FAMILY_BSR;
  SK_REQUIRE(!bsr || w.indices_bytes % 4 == 0, "bsr: expected int32 col_indices, got ",
             w.indices_bytes, " bytes");
  const int64_t nnzb = bsr ? w.indices_bytes / 4 : 0;
  const WeightSizes want = weight_sizes(w.pattern, w.dtype, w.n, w.k, nnzb);
  const auto check = [&](const char* name, const void* data, int64_t got, int64_t expected) {
    SK_REQUIRE(got == expected, "weight: ", name, " of a ", pattern_name(w.pattern), " ",
               dtype_name(w.dtype), " weight with n=", w.n, ", k=", w.k, " take ", expected,
               " bytes, got ", got);
    SK_REQUIRE(data || expected == 0, "weight: ", name, " is NULL");
  };
  check("values", w.values, w.values_bytes, want.values);
  check("indices", w.indices, w.indices_bytes, want.indices);
  check("crow_indices", w.crow_indices, w.crow_indices_bytes, want.crow_indices);
  return nnzb;
}

void validate(const sk_weight& w) {
  const int64_t nnzb = check_weight_sizes(w);
  const sk_pattern& p = w.pattern;
  const Geometry g = geometry(p, w.dtype, w.n, w.k);
  if (p.family == SK_FAMILY_NM) {
    const uint8_t* indices = static_cast<const uint8_t*>(w.indices);
    for (int64_t v = 0; v < g.index_rows; ++v) {
      const uint8_t* row = indices + v * g.index_row_bytes;
      for (int64_t slot = 0; slot < g.slots; ++slot) {
        const int position = read_index(row, slot, g.index_bits);
        SK_REQUIRE(position < p.group, "indices: position ", position, " in row ", v, ", slot ",
                   slot, " is outside its group of ", p.group);
        SK_REQUIRE(slot % p.kept == 0 || position > read_index(row, slot - 1, g.index_bits),
                   "indices: positions in row ", v, ", group ", slot / p.kept,
                   " are not ascending");
      }
    }
    return;
  }
  const int32_t* columns = static_cast<const int32_t*>(w.indices);
  SK_REQUIRE(read_crow(w, 0) == 0, "crow_indices: expected 0 first, got ", read_crow(w, 0));
  SK_REQUIRE(read_crow(w, g.block_row_count) == nnzb,
             "crow_indices: expected the number of blocks, ", nnzb, ", last, got ",
             read_crow(w, g.block_row_count));
  for (int64_t br = 0; br < g.block_row_count; ++br) {
    const int64_t first = read_crow(w, br), end = read_crow(w, br + 1);
    SK_REQUIRE(first <= end && end <= nnzb, "crow_indices: block row ", br, " runs from ", first,
               " to ", end, " of ", nnzb, " blocks");
    for (int64_t b = first; b < end; ++b) {
      SK_REQUIRE(columns[b] >= 0 && columns[b] < g.block_col_count, "col_indices: block column ",
                 columns[b], " in block row ", br, " is outside 0 to ", g.block_col_count - 1);
      SK_REQUIRE(b == first || columns[b] > columns[b - 1], "col_indices: block row ", br,
                 " is not ascending");
    }
  }
}

int64_t count_blocks(const sk_pattern& p, const uint8_t* mask, int64_t n, int64_t k) {
  const Geometry g = geometry(p, SK_F32, n, k);
  SK_REQUIRE(p.family == SK_FAMILY_BSR, "count_blocks: expected a block-sparse pattern, got ",
             pattern_name(p));
  std::vector<uint8_t> hit(size_t(g.block_col_count));
  int64_t total = 0;
  for (int64_t br = 0; br < g.block_row_count; ++br) {
    std::fill(hit.begin(), hit.end(), uint8_t(0));
    for (int64_t row = br * p.block_rows; row < std::min(n, (br + 1) * p.block_rows); ++row) {
      for (int64_t col = 0; col < k; ++col) {
        if (mask[row * k + col]) hit[size_t(col / p.block_cols)] = 1;
      }
    }
    for (uint8_t h : hit) total += h;
  }
  return total;
}

void compress(const void* dense, int64_t row_stride, const uint8_t* mask, sk_weight& out) {
  check_weight_sizes(out);
  SK_REQUIRE(dense && mask, "compress: dense and mask may not be NULL");
  SK_REQUIRE(row_stride >= out.k, "compress: a row stride of ", row_stride,
             " is less than k=", out.k);
  with_element_type(out.dtype, [&](auto element) {
    using T = decltype(element);
    if (out.pattern.family == SK_FAMILY_NM) {
      compress_nm(static_cast<const T*>(dense), row_stride, mask, out);
    } else {
      compress_bsr(static_cast<const T*>(dense), row_stride, mask, out);
    }
  });
}

void decompress(const sk_weight& w, void* dense, int64_t row_stride) {
  validate(w);
  SK_REQUIRE(dense, "decompress: dense is NULL");
  SK_REQUIRE(row_stride >= w.k, "decompress: a row stride of ", row_stride,
             " is less than k=", w.k);
  with_element_type(w.dtype, [&](auto element) {
    using T = decltype(element);
    T* to = static_cast<T*>(dense);
    for (int64_t row = 0; row < w.n; ++row) std::fill_n(to + row * row_stride, w.k, T(0));
    if (w.pattern.family == SK_FAMILY_NM) {
      decompress_nm(w, to, row_stride);
    } else {
      decompress_bsr(w, to, row_stride);
    }
  });
}

}  // namespace sk
