// Block-sparse matmul for CPUs, written once for every instruction set (S) and way to multiply
// (Op).
//
// Many tokens (tiles.h): the rows of a panel share their columns, so each load of x serves up to
// eight rows. Narrow panels, of one or two rows, load x for nearly every multiply-add. Few tokens
// (decode, m <= 8, panels of 16 rows): rows in the lanes, one broadcast of x a step.
#pragma once
#include <array>
#include <cstring>
#include <utility>

#include "cpu/matmul_nm.h"
#include "layout/bsr_rows.h"

namespace sk {
namespace {

// How one step of a block multiplies. A step is one column, or a pair of them where they are stored
// as one word; it meets kVectorsOfX vectors of the panel for each vector of tokens: one, or two where
// each column of a pair has its own. `values` is the panel's block, [step][panel_rows], from the
// first of the kRows rows on that are summed at a time; `row` is one of these.
template <class S, class T, bool kPaired>
struct Fma {  // in f32, whatever the element type
  using Isa = S;
  using Element = T;
  using Weight = typename Weights<S>::One;
  static constexpr int kColumns = kPaired ? 2 : 1;
  static constexpr int kVectorsOfX = kColumns;
  template <int kRows>
  static Weight weight(const T* values, int64_t step, int64_t panel_rows, int row, int column) {
    const T* at = values + step * panel_rows * kColumns;
    if constexpr (kPaired) return Weights<S>::template row_of_pairs<kRows>(at, row, column == 1);
    return Weights<S>::template row<kRows>(at, row);
  }
  static typename S::V mac(Weight w, const float* x, typename S::V sum) {
    return S::fma(w, S::load(x), sum);
  }
  static void pack(const MatmulCall& call, int64_t token0, int vectors, int64_t column0,
                   int64_t column1, float* panel) {
    pack_tokens<S, T>(call, token0, vectors, column0, column1, panel);
  }
};

// Hides where a pointer comes from: what was loaded through it for one column is loaded again for the
// next, rather than kept in registers that the sums need.
template <class T>
const T* reload(const T* p) {
  __asm__("" : "+r"(p));
  return p;
}

// acc[r][token] += W[rows of the panel from `row` on][..] x for the blocks that start at columns below
// `column1`; returns where it stopped. `fetch` are the values that come next, asked for step by step:
// all at once would fill the queue of misses.
template <class Op, int kRows, int kVectors>
const uint32_t* bsr_micro(const uint32_t* start, const uint32_t* row_end, uint32_t column1,
                          const typename Op::Element* values, int64_t block_steps,
                          int64_t panel_rows, int row, const float* x, int64_t column0, float* acc,
                          const typename Op::Element* fetch) {
  using S = typename Op::Isa;
  using V = typename S::V;
  constexpr int L = S::kLanes, kWidth = kVectors * L;
  V sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) sum[r][i] = S::zero();
  }
  values += row * Op::kColumns;
  for (; start != row_end && *start < column1; ++start) {
    const float* from = x + (int64_t(*start) - column0) / Op::kColumns * Op::kVectorsOfX * kWidth;
    for (int64_t step = 0; step < block_steps; ++step) {
#pragma GCC unroll 2
      for (int column = 0; column < Op::kVectorsOfX; ++column, from += kWidth) {
        values = reload(values);
        __builtin_prefetch(fetch), fetch += Op::kColumns * panel_rows;
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const auto w = Op::template weight<kRows>(values, step, panel_rows, r, column);
#pragma GCC unroll 16
          for (int i = 0; i < kVectors; ++i) sum[r][i] = Op::mac(w, from + i * L, sum[r][i]);
        }
      }
    }
    values += block_steps * Op::kColumns * panel_rows;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) add_block<S, kVectors>(acc + r * kWidth, sum[r], column0 == 0);
  return start;
}

// Columns of a block of the tile. Where rows of W share every load of x, its panel may lie in L2 and
// the block is as long as sums may be: about 32 terms in f32 and 64 where the result is rounded to 16
// bits, which is more columns the sparser W is.
inline int64_t bsr_block_columns(const PackedHeader& h) {
  const int64_t cols = h.pattern.block_cols;
  const double kept = double(h.nnzb) * h.pattern.block_rows * double(cols);
  const int terms = h.dtype == SK_F32 ? 32 : 64;
  const double columns = terms * double(h.n) * double(h.k) / std::max(kept, 1.0);
  return ceil_div(int64_t(std::min(std::max(columns, 128.0), 2048.0)), 2 * cols) * 2 * cols;
}

// Rows at a time and the widest tile for them: what fills the registers without spilling.
template <class S>
constexpr int bsr_rows_at_once(int panel_rows) {
  return std::min(panel_rows, S::kRegisters == 32 ? 8 : 4);
}
template <class S>
constexpr int bsr_max_vectors(int rows) {
  return S::kRegisters == 32 ? (rows == 8 ? 3 : rows == 4 ? 6 : 8) : (rows == 4 ? 3 : 6);
}

template <class Op>
class BsrTileKernel {
 public:
  using S = typename Op::Isa;
  using T = typename Op::Element;

  explicit BsrTileKernel(const PackedWeight& weight)
      : h_(*weight.header),
        crow_(weight.crow()),
        starts_(weight.indices<uint32_t>()),
        values_(weight.values<T>()) {}

  TileShape shape() const {
    const int64_t cols = h_.pattern.block_cols;
    return {bsr_max_vectors<S>(rows()),
            ceil_div(h_.n, h_.pattern.block_rows),
            h_.pattern.block_rows,
            round_up(round_up(h_.k, cols), 2),
            2 * Op::kVectorsOfX / Op::kColumns,
            bsr_block_columns(h_)};
  }

  void pack(const MatmulCall& call, int64_t token0, int vectors, int64_t column0, int64_t column1,
            float* panel) const {
    Op::pack(call, token0, vectors, column0, column1, panel);
  }

  void compute(int64_t unit0, int64_t unit1, int64_t column0, int64_t column1, const float* x,
               int vectors, float* acc) const {
    Micro* const micro = table()[size_t(vectors - 1)];
    const int64_t block_rows = h_.pattern.block_rows, cols = h_.pattern.block_cols,
                  panel_rows = h_.panel_rows;
    // Where each block row goes on: the blocks of columns come in order, and a search in the
    // indices costs more than the few blocks it would find.
    thread_local Scratch memory;
    int32_t* next = reinterpret_cast<int32_t*>(memory.get(unit1 - unit0));
    if (column0 == 0) std::copy(crow_ + unit0, crow_ + unit1, next);
    for (int64_t u = unit0; u < unit1; ++u, ++next) {
      const T* fetch = values_;
      if (const int64_t ahead = std::max<int64_t>(1, kRowsAhead / block_rows); u + ahead < unit1) {
        const int64_t first = crow_[u + ahead], at = next[ahead];
        fetch += first * block_rows * cols + (at - first) * cols * panel_rows;
        prefetch(starts_ + at, 0, 128);
      }
      const uint32_t *begin = starts_ + *next, *row_end = starts_ + crow_[u + 1], *end = begin;
      const T* values =
          values_ + crow_[u] * block_rows * cols + (*next - crow_[u]) * cols * panel_rows;
      for (int64_t panel = 0; panel < block_rows; panel += panel_rows) {
        for (int row = 0; row < panel_rows; row += rows()) {
          end = micro(begin, row_end, uint32_t(column1), values, cols / Op::kColumns, panel_rows,
                      row, x, column0, acc, fetch);
          acc += int64_t(rows()) * vectors * S::kLanes;
        }
        values += (crow_[u + 1] - crow_[u]) * cols * panel_rows;
      }
      *next = int32_t(end - starts_);
    }
  }

 private:
  // Rows of W from those at work to those whose next blocks are fetched: further than the last cache
  // is away. Blocks of many rows fetch as they go, the same steps of the next block row.
  static constexpr int kRowsAhead = 8;

  using Micro = const uint32_t*(const uint32_t*, const uint32_t*, uint32_t, const T*, int64_t,
                                int64_t, int, const float*, int64_t, float*, const T*);
  using Table = std::array<Micro*, 8>;

  int rows() const { return bsr_rows_at_once<S>(h_.panel_rows); }

  template <int kRows, int... kIndex>
  static Table make(std::integer_sequence<int, kIndex...>) {
    return {&bsr_micro<Op, kRows, kIndex + 1>...};
  }
  template <int kRows>
  static Table pick() {
    return make<kRows>(std::make_integer_sequence<int, bsr_max_vectors<S>(kRows)>{});
  }
  Table table() const { return rows() == 8 ? pick<bsr_rows_at_once<S>(8)>() : pick<4>(); }

  const PackedHeader& h_;
  const int32_t* crow_;
  const uint32_t* starts_;
  const T* values_;
};

// ---- narrow panels ----

// acc[r][token] += W[row r of the panel][..] x for `count` blocks of a segment, `x_per_block` floats of
// x from each other.
template <class Op, int kRows, int kVectors>
void bsr_narrow_micro(const uint8_t* blocks, int64_t count, const typename Op::Element* values,
                      int64_t block_steps, const float* x, int64_t x_per_block, float* acc,
                      bool first) {
  using S = typename Op::Isa;
  constexpr int L = S::kLanes, kWidth = kVectors * L;
  typename S::V sum[kRows][kVectors];
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) sum[r][i] = S::zero();
  }
  const auto multiply = [&](const float* from) {
#pragma GCC unroll 2
    for (int column = 0; column < Op::kVectorsOfX; ++column) {
      values = reload(values);
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) {
        const auto w = Op::template weight<kRows>(values, 0, kRows, r, column);
#pragma GCC unroll 16
        for (int i = 0; i < kVectors; ++i)
          sum[r][i] = Op::mac(w, from + (column * kVectors + i) * L, sum[r][i]);
      }
    }
    values += Op::kColumns * kRows;
  };
  if (block_steps == 1) {
    for (const uint8_t* end = blocks + count; blocks != end; ++blocks)
      multiply(x + *blocks * x_per_block);
  } else {
    for (const uint8_t* end = blocks + count; blocks != end; ++blocks) {
      const float* from = x + *blocks * x_per_block;
      for (int64_t step = 0; step < block_steps; ++step, from += Op::kVectorsOfX * kWidth)
        multiply(from);
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) add_block<S, kVectors>(acc + r * kWidth, sum[r], first);
}

template <class Op>
class BsrNarrowKernel {
 public:
  using S = typename Op::Isa;
  using T = typename Op::Element;

  explicit BsrNarrowKernel(const PackedWeight& weight)
      : h_(*weight.header),
        segment_blocks_(bsr_segment_blocks(h_)),
        block_rows_(ceil_div(h_.n, h_.pattern.block_rows)),
        order_(weight.section<int32_t>(h_.order_offset)),
        blocks_(weight.indices<uint8_t>()),
        values_(weight.values<T>()) {}

  TileShape shape() const {
    const int64_t cols = h_.pattern.block_cols;
    return {kMaxVectors,
            block_rows_,
            h_.pattern.block_rows,
            round_up(round_up(h_.k, cols), 2),
            2 * Op::kVectorsOfX / Op::kColumns,
            segment_blocks_ * cols};
  }

  void pack(const MatmulCall& call, int64_t token0, int vectors, int64_t column0, int64_t column1,
            float* panel) const {
    Op::pack(call, token0, vectors, column0, column1, panel);
  }

  void compute(int64_t unit0, int64_t unit1, int64_t column0, int64_t, const float* x, int vectors,
               float* acc) const {
    const std::make_integer_sequence<int, kMaxVectors> widths{};
    Micro* const micro =
        (h_.panel_rows == 2 ? table<2>(widths) : table<1>(widths))[size_t(vectors - 1)];
    const int64_t rows = h_.pattern.block_rows, cols = h_.pattern.block_cols,
                  panels = rows / h_.panel_rows, steps = cols / Op::kColumns,
                  x_per_block = steps * Op::kVectorsOfX * vectors * S::kLanes;
    const int32_t* order = order_ + column0 / (segment_blocks_ * cols) * block_rows_;
    for (int64_t u = unit0; u < unit1; ++u) {
      const int64_t first = order[u], count = order[u + 1] - first;
      const T* values = values_ + first * rows * cols;
      prefetch(blocks_ + first + kBytesAhead / 4, 0, 64);
      prefetch(values, kBytesAhead, kBytesAhead + count * rows * cols * int64_t(sizeof(T)));
      for (int64_t panel = 0; panel < panels; ++panel) {
        micro(blocks_ + first, count, values, steps, x, x_per_block, acc, column0 == 0);
        values += count * cols * h_.panel_rows;
        acc += int64_t(h_.panel_rows) * vectors * S::kLanes;
      }
    }
  }

 private:
  static constexpr int kMaxVectors = bsr_max_vectors<S>(2);
  static constexpr int64_t kBytesAhead = 1024;

  using Micro = void(const uint8_t*, int64_t, const T*, int64_t, const float*, int64_t, float*,
                     bool);
  template <int kRows, int... kIndex>
  static std::array<Micro*, kMaxVectors> table(std::integer_sequence<int, kIndex...>) {
    return {&bsr_narrow_micro<Op, kRows, kIndex + 1>...};
  }

  const PackedHeader& h_;
  int64_t segment_blocks_, block_rows_;
  const int32_t* order_;
  const uint8_t* blocks_;
  const T* values_;
};

template <class Op>
void run_bsr(const MatmulCall& call) {
  using S = typename Op::Isa;
  using T = typename Op::Element;
  if (bsr_narrow(call.weight.header->panel_rows)) {
    run_tiles<S, T>(call, BsrNarrowKernel<Op>(call.weight));
  } else {
    run_tiles<S, T>(call, BsrTileKernel<Op>(call.weight));
  }
}

template <class S, class T>
void run_bsr_fma(const MatmulCall& call) {
  if constexpr (sizeof(T) == 2) {
    if (bsr_paired(*call.weight.header)) return run_bsr<Fma<S, T, true>>(call);
  }
  run_bsr<Fma<S, T, false>>(call);
}

// ---- few tokens: panels of 16 rows in the lanes ----

template <class S, class T, int kTokens>
void bsr_decode_rows(const MatmulCall& call, const float* x, int64_t x_stride, int64_t unit0,
                     int64_t unit1) {
  using V = typename S::V;
  constexpr int L = S::kLanes;
  constexpr int kChains = kTokens < 4 ? 2 : 1;
  const PackedHeader& h = *call.weight.header;
  const Epilogue<S, T> epilogue(call);
  const int64_t rows = h.pattern.block_rows, cols = h.pattern.block_cols;
  const int32_t* crow = call.weight.crow();
  const uint32_t* starts = call.weight.indices<uint32_t>();
  for (int64_t u = unit0; u < unit1; ++u) {
    const T* values = call.weight.values<T>() + crow[u] * rows * cols;
    const int64_t blocks = crow[u + 1] - crow[u];
    for (int64_t panel = 0; panel < rows; panel += kRows16, values += blocks * cols * kRows16) {
      for (int half = 0; half < kRows16 / L; ++half) {
        const int64_t row0 = u * rows + panel + half * L;
        const int count = int(std::min<int64_t>(L, call.n - row0));
        if (count <= 0) break;
        V sum[kTokens][kChains], total[kTokens];
        for (int t = 0; t < kTokens; ++t) {
          total[t] = S::zero();
          for (V& v : sum[t]) v = S::zero();
        }
        const T* at = values;
        for (int64_t b = 0; b < blocks; ++b) {
          const float* from = x + starts[crow[u] + b];
          for (int64_t c = 0; c + 1 < cols; c += 2, at += 2 * kRows16) {
            V even, odd;
            load_pair<S>(at, half, even, odd);
            for (int t = 0; t < kTokens; ++t) {
              sum[t][0] = S::fma(even, S::set1(from[t * x_stride + c]), sum[t][0]);
              sum[t][kChains - 1] =
                  S::fma(odd, S::set1(from[t * x_stride + c + 1]), sum[t][kChains - 1]);
            }
          }
          // Every 64 columns or so: a total of too many parts rounds as badly as one long sum.
          if ((b + 1) * cols / 64 != b * cols / 64) flush<S>(sum, total);
        }
        flush<S>(sum, total);
        const V bias = epilogue.bias(row0, count);
        for (int t = 0; t < kTokens; ++t) epilogue.store(total[t], bias, t, row0, count);
      }
    }
  }
}

template <class S, class T>
void run_bsr_decode(const MatmulCall& call) {
  thread_local Scratch memory;
  const sk_pattern& p = call.weight.header->pattern;
  const int64_t stride = round_up(round_up(call.k, p.block_cols), 16);
  const float* x = copy_tokens<S, T>(call, stride, memory);
  run_decode(
      call, ceil_div(call.n, p.block_rows),
      [&](auto tokens, int64_t unit0, int64_t unit1) {
        bsr_decode_rows<S, T, decltype(tokens)::value>(call, x, stride, unit0, unit1);
      },
      std::make_integer_sequence<int, kMaxDecodeTokens>{});
}

inline std::string any_bsr(const Problem&) { return ""; }
inline std::string few_tokens_panels(const Problem& p) {
  if (p.pattern.block_rows % kRows16) {
    return concat("needs block rows that are a multiple of 16, the blocks are ",
                  p.pattern.block_rows, "x", p.pattern.block_cols);
  }
  if (p.pattern.block_cols % 2)
    return concat("needs an even number of block columns, there are ", p.pattern.block_cols);
  return few_tokens(p);
}

// decode_cost_us() without its permutations.
template <class S>
double bsr_decode_cost_us(const Problem& p) {
  const double steps = double(p.m) * double(p.n) * double(p.k) * p.kept_share() / S::kLanes;
  return std::max(weight_bytes(p) / (S::kLanes == 16 ? 22e3 : 20e3), steps / 2.4e3) / p.threads + 2;
}

// Rows that share their columns decide how many multiply-adds a cycle the loads allow.
template <class S>
double bsr_cost_us(const Problem& p) {
  const int rows = bsr_rows_at_once<S>(bsr_panel_rows(p.pattern.block_rows));
  return tile_cost_us<S>(p, rows >= 4 ? 1.8 : rows == 2 ? 1.5 : 1.1, 0.5);
}

}  // namespace
}  // namespace sk
