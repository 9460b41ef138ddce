#include "layout/nm_rows16.h"

#include <algorithm>
#include <cstring>

namespace sk {
namespace {

// Index of a row's slot in the values of its panel.
template <class T>
int64_t value_index(int64_t slot, int row) {
  return sizeof(T) == 4 ? slot * kRows16 + row : ((slot >> 1) * kRows16 + row) * 2 + (slot & 1);
}

// Finds partners among 16 rows so that every pair has at least `least` columns in common, by trying
// partners in turn; gives up after a number of steps, which costs speed and nothing else.
class Matching {
 public:
  explicit Matching(const uint64_t* columns) {
    for (int a = 0; a < kRows16; ++a) {
      for (int b = 0; b < kRows16; ++b)
        common_[a][b] = __builtin_popcountll(columns[a] & columns[b]);
    }
  }

  // partner[row], for the largest even `least` that is found; returns it.
  int best(int columns_per_row, int* partner) {
    for (int least = columns_per_row & ~1; least > 0; least -= 2) {
      std::fill_n(partner_, kRows16, -1);
      steps_ = 0;
      if (!match(0, least)) continue;
      std::copy_n(partner_, kRows16, partner);
      return least;
    }
    for (int row = 0; row < kRows16; ++row) partner[row] = row ^ 1;
    return 0;
  }

 private:
  bool match(int row, int least) {
    while (row < kRows16 && partner_[row] >= 0) ++row;
    if (row == kRows16) return true;
    for (int other = row + 1; other < kRows16; ++other) {
      if (partner_[other] >= 0 || common_[row][other] < least) continue;
      if (++steps_ > 500) return false;
      partner_[row] = other, partner_[other] = row;
      if (match(row + 1, least)) return true;
      partner_[row] = partner_[other] = -1;
    }
    return false;
  }

  int common_[kRows16][kRows16];
  int partner_[kRows16];
  int steps_ = 0;
};

// One block of one panel; `words` are its position words.
void pack_pair_block(const uint64_t* words, int64_t groups, int64_t real_rows, uint8_t* out) {
  const BlockColumns block(words, groups, real_rows);
  const auto& [columns, slot_of] = block;
  int partner[kRows16];
  const int common = Matching(columns).best(int(2 * groups), partner);
  out[0] = uint8_t(common);
  uint8_t* list = out + 8;
  for (int a = 0; a < kRows16; ++a) {
    const int b = partner[a];
    if (b < a) continue;
    uint64_t shared = columns[a] & columns[b];
    while (__builtin_popcountll(shared) > common) shared &= shared - 1;
    uint64_t only_a = columns[a] & ~shared, only_b = columns[b] & ~shared;
    uint8_t* at = list;
    *at++ = uint8_t(a | b << 4);
    for (; shared; shared &= shared - 1) {
      const int column = __builtin_ctzll(shared);
      *at++ = uint8_t(column << 2 | slot_of[a][column] << 1 | slot_of[b][column]);
    }
    for (; only_a; only_a &= only_a - 1, only_b &= only_b - 1) {
      const int column_a = __builtin_ctzll(only_a), column_b = __builtin_ctzll(only_b);
      *at++ = uint8_t(column_a << 2 | slot_of[a][column_a] << 1);
      *at++ = uint8_t(column_b << 2 | slot_of[b][column_b] << 1);
    }
    list += kPairListBytes;
  }
}

}  // namespace

BlockColumns::BlockColumns(const uint64_t* words, int64_t groups, int64_t real_rows) {
  for (int row = 0; row < kRows16; ++row) {
    for (int64_t g = 0; g < groups; ++g) {
      for (int slot = 0; slot < 2; ++slot) {
        const int position =
            row < real_rows ? int(words[g] >> (nibble_shift(row) + 2 * slot)) & 3 : slot;
        const int64_t column = 4 * g + position;
        columns[row] |= uint64_t{1} << column;
        slot_of[row][column] = uint8_t(slot);
      }
    }
  }
}

void layout_nm_rows16(PackedHeader& h) {
  const NmRows16 r = nm_rows16(h);
  SectionCursor cursor;
  h.panel_rows = kRows16;
  h.indices_offset = cursor.take(r.panels * r.words * 8);
  h.values_offset = cursor.take(r.panels * r.pairs * 2 * kRows16 * dtype_size(h.dtype));
  const int64_t blocks = has_pairs(h.pattern, h.dtype) ? ceil_div(h.k, kPairColumns) : 0;
  h.order_offset = cursor.take(r.panels * blocks * kPairBlockBytes);
  h.bytes = cursor.end();
}

void pack_nm_values(const sk_weight& w, const PackedHeader& h, uint8_t* base) {
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
      const uint8_t* indices =
          static_cast<const uint8_t*>(w.indices) + row / w.pattern.vector * g.index_row_bytes;
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

void pack_nm_rows16(const sk_weight& w, const PackedHeader& h, uint8_t* base) {
  pack_nm_values(w, h, base);
  if (!has_pairs(w.pattern, w.dtype)) return;
  const NmRows16 r = nm_rows16(h);
  const uint64_t* words = reinterpret_cast<const uint64_t*>(base + h.indices_offset);
  const int64_t blocks = ceil_div(w.k, kPairColumns), groups = kPairColumns / 4;
  for (int64_t panel = 0; panel < r.panels; ++panel) {
    for (int64_t block = 0; block < blocks; ++block) {
      pack_pair_block(words + panel * r.words + block * groups,
                      std::min(groups, r.groups - block * groups), w.n - panel * kRows16,
                      base + h.order_offset + (panel * blocks + block) * kPairBlockBytes);
    }
  }
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
        const int position =
            r.index_bits == 2 ? int(nibble >> (2 * (slot & 1))) & 3 : int(nibble) & 15;
        write_index(indices + row / out.pattern.vector * g.index_row_bytes, slot, r.index_bits,
                    position);
      }
    }
  });
}

}  // namespace sk
