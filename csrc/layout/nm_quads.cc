#include "layout/nm_quads.h"

#include <algorithm>
#include <cstring>

namespace sk {
namespace {

// Sets of a quad's rows, as bits: the order of steps in a list.
constexpr int kAll = 15;
constexpr int kThrees[4] = {7, 11, 13, 14};
constexpr int kTwos[6] = {3, 12, 5, 10, 9, 6};

// How often each kind of step comes; a row takes part in all + 3 threes + 3 twos of them and has
// the rest of its columns for itself.
struct Counts {
  int all, threes, twos;
  int shared() const { return all + 3 * (threes + twos); }
};

// The most sharing first. Random 2:4 reaches the fourth line for nine blocks of ten, and the kernel's
// loops run best if their lengths do not change: the search ends there. The first three are for masks
// whose rows resemble each other.
constexpr Counts kLadder[] = {{12, 4, 2}, {8, 4, 3}, {5, 4, 3}, {3, 3, 3}, {2, 3, 3}, {2, 2, 4},
                              {1, 2, 3},  {0, 1, 3}, {0, 0, 2}, {0, 0, 1}, {0, 0, 0}};
constexpr int kSteps = int(sizeof kLadder / sizeof kLadder[0]), kGoodEnough = 3, kTries = 32;

// The columns of a block by which of a quad's four rows keep them.
class Quad {
 public:
  Quad(const uint64_t* columns, const int* rows) {
    for (int set = 0; set < 16; ++set) {
      columns_[set] = ~uint64_t{0};
      for (int i = 0; i < 4; ++i)
        columns_[set] &= set >> i & 1 ? columns[rows[i]] : ~columns[rows[i]];
      count_[set] = __builtin_popcountll(columns_[set]);
    }
  }

  // Splits columns of more rows into steps for fewer until there are enough steps of each kind.
  bool reach(const Counts& want) {
    count_[kAll] -= want.all;  // those stay; the others may be split
    if (count_[kAll] < 0) return false;
    for (int three : kThrees) {
      while (count_[three] < want.threes) {
        if (!split(kAll, three)) return false;
      }
      count_[three] -= want.threes;
    }
    for (;;) {
      // The pair of rows that has the fewest columns of three rows to spare goes first.
      int neediest = 0, least = 1 << 20;
      for (int two : kTwos) {
        if (count_[two] >= want.twos) continue;
        int spare = 0;
        for (int three : kThrees) spare += (three & two) == two ? count_[three] : 0;
        const int margin = spare - (want.twos - count_[two]);
        if (margin < least) neediest = two, least = margin;
      }
      if (!neediest) break;
      int richest = kAll;
      for (int three : kThrees) {
        const bool fits = (three & neediest) == neediest && count_[three] > 0;
        if (fits && (richest == kAll || count_[three] > count_[richest])) richest = three;
      }
      if (!split(richest, neediest)) return false;
    }
    return true;
  }

  // After reach(): the next column of a set, lowest first.
  int take(int set) {
    const int column = __builtin_ctzll(columns_[set]);
    columns_[set] &= columns_[set] - 1;
    return column;
  }
  // The columns of row i that are in no step yet.
  uint64_t rest(int i) const {
    uint64_t columns = 0;
    for (int set = 0; set < 16; ++set) columns |= set >> i & 1 ? columns_[set] : 0;
    return columns;
  }

 private:
  // A column of `from` becomes one of `to` and one of the other rows.
  bool split(int from, int to) {
    if (count_[from] <= 0) return false;
    // The highest one: take() begins at the other end with those that stay.
    const uint64_t column = uint64_t{1} << (63 - __builtin_clzll(columns_[from]));
    columns_[from] ^= column;
    columns_[to] |= column;
    columns_[from ^ to] |= column;
    --count_[from], ++count_[to], ++count_[from ^ to];
    return true;
  }

  uint64_t columns_[16];
  int count_[16];  // of columns_, less those promised to a kind of step
};

// Parts 16 rows into quads, order[4q .. 4q + 3]; returns what all of them reach.
Counts find_quads(const uint64_t* columns, int columns_per_row, int* order) {
  int rows[kRows16], best = kSteps - 1;  // nobody shares: always possible
  for (int i = 0; i < kRows16; ++i) rows[i] = order[i] = i;
  uint32_t random = 1;  // the same for every block: packing the same weight gives the same bytes
  for (int attempt = 0; attempt < kTries && best > kGoodEnough; ++attempt) {
    for (int q = 0; q < kQuadsPerPanel; ++q) std::sort(rows + 4 * q, rows + 4 * q + 4);
    const Quad quads[] = {
        {columns, rows}, {columns, rows + 4}, {columns, rows + 8}, {columns, rows + 12}};
    const auto all_reach = [&](const Counts& counts) {
      return counts.shared() <= columns_per_row &&
             std::all_of(quads, quads + kQuadsPerPanel,
                         [&](Quad quad) { return quad.reach(counts); });
    };
    int step = 0;
    while (step < best && !all_reach(kLadder[step])) ++step;
    if (step < best) {
      best = step;
      std::copy_n(rows, kRows16, order);
    }
    for (int i = kRows16 - 1; i > 0; --i) {
      random = random * 1664525 + 1013904223;
      std::swap(rows[i], rows[(random >> 16) % uint32_t(i + 1)]);
    }
  }
  return kLadder[best];
}

void write_list(const uint64_t* columns, const uint8_t (*slot_of)[kQuadColumns], const int* rows,
                Counts counts, int columns_per_row, QuadList& out) {
  Quad quad(columns, rows);
  quad.reach(counts);
  for (int i = 0; i < 4; ++i) out.rows = uint16_t(out.rows | rows[i] << (4 * i));
  out.all = uint8_t(counts.all), out.threes = uint8_t(counts.threes);
  out.twos = uint8_t(counts.twos), out.ones = uint8_t(columns_per_row - counts.shared());
  uint8_t* at = out.entries;
  const auto put = [&](int set, int column, int bits) {
    int entry = column << bits, place = 0;
    for (int i = 0; i < 4; ++i) {
      if (set >> i & 1) entry |= slot_of[rows[i]][column] << place++;
    }
    *at++ = uint8_t(entry);
    if (bits == 4) *at++ = uint8_t(entry >> 8);
  };
  for (int n = 0; n < counts.all; ++n) put(kAll, quad.take(kAll), 4);
  for (int n = 0; n < counts.threes; ++n) {
    for (int three : kThrees) put(three, quad.take(three), 4);
  }
  for (int n = 0; n < counts.twos; ++n) {
    for (int two : kTwos) put(two, quad.take(two), 2);
  }
  uint64_t rest[4];
  for (int i = 0; i < 4; ++i) rest[i] = quad.rest(i);
  for (int n = 0; n < out.ones; ++n) {
    for (int i = 0; i < 4; ++i) {
      put(1 << i, __builtin_ctzll(rest[i]), 2);
      rest[i] &= rest[i] - 1;
    }
  }
}

}  // namespace

void layout_nm_quads(PackedHeader& h) {
  layout_nm_rows16(h);
  const int64_t lists = ceil_div(h.n, kRows16) * ceil_div(h.k, kQuadColumns) * kQuadsPerPanel;
  h.bytes = round_up(h.order_offset + lists * int64_t(sizeof(QuadList)), kAlignment);
}

void pack_nm_quads(const sk_weight& w, const PackedHeader& h, uint8_t* base) {
  pack_nm_values(w, h, base);
  const NmRows16 r = nm_rows16(h);
  const uint64_t* words = reinterpret_cast<const uint64_t*>(base + h.indices_offset);
  QuadList* list = reinterpret_cast<QuadList*>(base + h.order_offset);
  const int64_t block_groups = kQuadColumns / 4;
  for (int64_t panel = 0; panel < r.panels; ++panel) {
    for (int64_t g = 0; g < r.groups; g += block_groups, list += kQuadsPerPanel) {
      const int64_t groups = std::min(block_groups, r.groups - g);
      const BlockColumns block(words + panel * r.words + g, groups, w.n - panel * kRows16);
      int order[kRows16];
      const Counts counts = find_quads(block.columns, int(2 * groups), order);
      for (int q = 0; q < kQuadsPerPanel; ++q) {
        write_list(block.columns, block.slot_of, order + 4 * q, counts, int(2 * groups), list[q]);
      }
    }
  }
}

void unpack_nm_quads(const PackedWeight& packed, sk_weight& out) { unpack_nm_rows16(packed, out); }

}  // namespace sk
