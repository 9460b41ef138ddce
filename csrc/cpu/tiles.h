// How a matmul with many tokens runs on a CPU: tokens lie in the lanes. So does a convolution, whose
// tokens are output pixels (rows.h finds their columns).
//
// A tile of `vectors` x lanes tokens is transposed once into a panel x[column][token], so that one
// weight, broadcast, meets a whole vector of activations: no shuffles, whatever the pattern. For
// each chunk of rows of W and each block of columns that fits the cache, a kernel adds to
// acc[row][token]; after the last block the sums are transposed back and go through the epilogue.
//
//   for each tile of tokens
//     for each chunk of rows       acc stays in L2
//       for each block of columns  the panel's block stays in L1 (or L2: the kernel says)
//         pack(...)                for the first chunk; the panel is kept whole if there are others
//         compute(...)
//       write out                  transpose, epilogue, store
//
// Each sum adds its columns in an order that the packed weight fixes, whatever the tile and the
// number of threads, so the same input gives the same bits.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <type_traits>

#include "core/parallel.h"
#include "cpu/epilogue.h"
#include "cpu/rows.h"

namespace sk {
namespace {

// Per-thread memory that lives as long as the thread, so that a call neither allocates nor faults.
class Scratch {
 public:
  float* get(int64_t count) {
    if (count > capacity_) {
      void* memory = std::aligned_alloc(kAlignment, size_t(round_up(count * 4, kAlignment)));
      SK_CHECK(memory, SK_RUNTIME_ERROR, "out of memory: ", count * 4, " bytes of scratch");
      memory_.reset(static_cast<float*>(memory));
      capacity_ = count;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> memory_;
  int64_t capacity_ = 0;
};

// How the threads share the work: along tokens, each packing its own, or along rows of W, each
// packing all. Narrow tiles use a core worse, and packing a vector of tokens costs about as much as
// 0.4 units of rows; the cheapest split wins.
struct Split {
  int tokens, rows;
};
inline Split split_work(int64_t token_vectors, int64_t row_units, int threads, int max_vectors) {
  Split best{1, 1};
  double best_cost = HUGE_VAL;
  for (int t = 1; t <= std::min<int64_t>(threads, token_vectors); ++t) {
    const int r = int(std::min<int64_t>(threads / t, row_units));
    const double vectors = double(ceil_div(token_vectors, t));
    const double width = std::min<double>(vectors, max_vectors);
    const double cost = vectors * (double(ceil_div(row_units, r)) * (1 + 1.5 / width) + 0.4);
    if (cost < best_cost) best = {t, r}, best_cost = cost;
  }
  return best;
}

// Columns [column0, column1) of x to the panel [column][token] in f32; tokens past m and columns past
// k are zero.
template <class S, class T>
void pack_tokens(const MatmulCall& call, int64_t token0, int vectors, int64_t column0,
                 int64_t column1, float* panel) {
  using V = typename S::V;
  constexpr int L = S::kLanes;
  const int64_t width = int64_t(vectors) * L;
  for_segments(call, column0, column1, [&](const Segment& segment) {
    for (int i = 0; i < vectors; ++i) {
      const T* rows[L];
      row_addresses(call, token0 + int64_t(i) * L, segment, L, rows);
      float* to = panel + (segment.begin - column0) * width + int64_t(i) * L;
      int64_t c = 0;
      if constexpr (S::kLoadsTransposed && std::is_same_v<T, float>) {
        const bool whole = std::find(rows, rows + L, nullptr) == rows + L;
        for (; whole && c + 4 <= segment.filled - segment.begin; c += 4) {
          V v[4];
          S::load_transposed(rows, c, v);
          for (int j = 0; j < 4; ++j) S::store(to + (c + j) * width, v[j]);
        }
      }
      for (; c < segment.end - segment.begin; c += L) {
        const int loaded = int(std::clamp<int64_t>(segment.filled - segment.begin - c, 0, L));
        V v[L];
        for (int t = 0; t < L; ++t) {
          if (!rows[t] || loaded == 0) {
            v[t] = S::zero();
          } else {
            v[t] = loaded == L ? S::load(rows[t] + c) : S::load(rows[t] + c, loaded);
          }
        }
        S::transpose(v);
        const int stored = int(std::min<int64_t>(L, segment.end - segment.begin - c));
        for (int t = 0; t < stored; ++t) S::store(to + (c + t) * width, v[t]);
      }
    }
  });
}

// acc[row][token] for `rows` rows of W from row0 on: back to [token][row], epilogue, out.
template <class S, class T>
void write_out(const MatmulCall& call, int64_t token0, int vectors, int64_t row0, int64_t rows,
               const float* acc) {
  using V = typename S::V;
  constexpr int L = S::kLanes;
  const int64_t width = int64_t(vectors) * L;
  const Epilogue<S, T> epilogue(call);
  for (int i = 0; i < vectors; ++i) {  // tokens outside: each writes a run of its row of y
    const int64_t first = token0 + int64_t(i) * L;
    const int tokens = int(std::min<int64_t>(L, call.m - first));
    for (int64_t r = 0; r < rows; r += L) {
      const int count = int(std::min<int64_t>(L, rows - r));
      const V bias = epilogue.bias(row0 + r, count);
      V v[L];
      for (int j = 0; j < L; ++j)
        v[j] = j < count ? S::load(acc + (r + j) * width + int64_t(i) * L) : S::zero();
      S::transpose(v);
      for (int t = 0; t < tokens; ++t) epilogue.store(v[t], bias, first + t, row0 + r, count);
    }
  }
}

// Whoever takes x block by block takes pixels as well as rows of a matrix: one table for two operations.
#define SK_MATMUL_AND_CONV2D(id, ...)                    \
  extern const KernelFunctions matmul_##id, conv2d_##id; \
  const KernelFunctions matmul_##id{__VA_ARGS__};        \
  const KernelFunctions conv2d_##id{__VA_ARGS__};

// What run_tiles needs of a kernel.
struct TileShape {
  int max_vectors;    // tile width in vectors of tokens
  int64_t units;      // rows of W come in units ...
  int64_t unit_rows;  // ... of so many rows
  int64_t columns;    // of the panel, k padded to the pattern
  // Panel floats for a column and token, times two: a pair of bf16 columns shares one.
  int64_t floats_per_column_x2;
  int64_t block_columns;  // columns of a block, the last one may be shorter
  // Up to so many tokens that are left over fill no vector: the kernel's extra() takes them.
  int max_extra = 0;
};

// Each block's sum starts from zero and is added to what the blocks before it gave. Many short sums
// round less than one long one; the block is the same for every tile, so that m does not change a
// bit.
template <class S, int kVectors>
void add_block(float* acc, const typename S::V (&sum)[kVectors], bool first) {
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; ++i) {
    float* to = acc + i * S::kLanes;
    S::store(to, first ? sum[i] : S::add(S::load(to), sum[i]));
  }
}

// Does the kernel have an extra()?
template <class Kernel, class = void>
constexpr bool kTakesExtra = false;
template <class Kernel>
constexpr bool kTakesExtra<Kernel, std::void_t<decltype(&Kernel::extra)>> = true;

// acc[units][token][rows of a unit] through the epilogue.
template <class S, class T>
void write_extra(const MatmulCall& call, int64_t token0, int tokens, int64_t row0, int64_t row1,
                 int64_t unit_rows, const float* acc) {
  const Epilogue<S, T> epilogue(call);
  for (int64_t row = row0; row < row1; row += S::kLanes) {
    const int count = int(std::min<int64_t>(S::kLanes, row1 - row));
    const auto bias = epilogue.bias(row, count);
    const int64_t unit = (row - row0) / unit_rows, in_unit = (row - row0) % unit_rows;
    for (int t = 0; t < tokens; ++t) {
      const auto sum = S::load(acc + (unit * tokens + t) * unit_rows + in_unit);
      epilogue.store(sum, bias, token0 + t, row, count);
    }
  }
}

// Kernel: compute(unit0, unit1, column0, column1, panel block, vectors, acc) adds into acc, which
// is [rows of the units][tokens]; pack(call, token0, vectors, column0, column1, panel block) fills a
// block of the panel.
template <class S, class T, class Kernel>
void run_tiles(const MatmulCall& call, const Kernel& kernel) {
  constexpr int L = S::kLanes;
  const TileShape shape = kernel.shape();
  const int left = int(call.m % L), extra_tokens = call.m > L && left <= shape.max_extra ? left : 0;
  const int64_t all_vectors = ceil_div(call.m - extra_tokens, L);
  const Split split = split_work(all_vectors, shape.units, call.threads, shape.max_vectors);
  parallel_for(split.tokens * split.rows, call.threads, [&](int task) {
    thread_local Scratch panel_memory, acc_memory, extra_memory;
    const int64_t part = task / split.rows, row_part = task % split.rows;
    const int64_t vector0 = all_vectors * part / split.tokens,
                  vector1 = all_vectors * (part + 1) / split.tokens;
    const int64_t unit0 = shape.units * row_part / split.rows,
                  unit1 = shape.units * (row_part + 1) / split.rows;
    const int64_t tiles = ceil_div(vector1 - vector0, shape.max_vectors);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t first = vector0 + (vector1 - vector0) * tile / tiles;
      const int vectors = int(vector0 + (vector1 - vector0) * (tile + 1) / tiles - first);
      const int extra = first + vectors == all_vectors ? extra_tokens : 0;
      const int64_t width = int64_t(vectors) * L;
      const int64_t column_floats_x2 = shape.floats_per_column_x2 * width;
      const int64_t acc_bytes = shape.unit_rows * width * 4;
      const int64_t chunk =
          std::min(unit1 - unit0, std::max<int64_t>(1, cpu_info().l2_bytes / 4 / acc_bytes));
      const bool keep = chunk < unit1 - unit0;
      const int64_t kept = keep ? shape.columns : std::min(shape.columns, shape.block_columns);
      float* panel = panel_memory.get(kept * column_floats_x2 / 2 + kAlignment);
      float* acc = acc_memory.get(chunk * shape.unit_rows * width);
      float* extra_panel = extra_memory.get(extra * (kept + chunk * shape.unit_rows));
      float* extra_acc = extra_panel + extra * kept;
      for (int64_t u0 = unit0; u0 < unit1; u0 += chunk) {
        const int64_t u1 = std::min(unit1, u0 + chunk);
        for (int64_t c0 = 0; c0 < shape.columns; c0 += shape.block_columns) {
          const int64_t c1 = std::min(shape.columns, c0 + shape.block_columns);
          float* block = panel + (keep ? c0 * column_floats_x2 / 2 : 0);
          if (u0 == unit0) kernel.pack(call, first * L, vectors, c0, c1, block);
          kernel.compute(u0, u1, c0, c1, block, vectors, acc);
          if (extra == 0) continue;
          if constexpr (kTakesExtra<Kernel>) {
            float* extra_block = extra_panel + (keep ? c0 * extra : 0);
            if (u0 == unit0) kernel.extra().pack(call, all_vectors * L, extra, c0, c1, extra_block);
            kernel.extra().compute(u0, u1, c0, c1, extra_block, extra, extra_acc);
          }
        }
        const int64_t row0 = u0 * shape.unit_rows, row1 = std::min(call.n, u1 * shape.unit_rows);
        write_out<S, T>(call, first * L, vectors, row0, row1 - row0, acc);
        if (extra != 0)
          write_extra<S, T>(call, all_vectors * L, extra, row0, row1, shape.unit_rows, extra_acc);
      }
    }
  });
}

}  // namespace
}  // namespace sk
