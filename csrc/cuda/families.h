// What the host must know of each kind of weights that tiles multiply.
#pragma once
#include "cuda/plan.h"
#include "dispatch/registry.h"

namespace sk::cuda {

struct NmFamily {
  static constexpr int kMacsPerClock = 2048;

  static std::string refusal(const Problem&, int /*tile_rows*/) { return ""; }
  static Stages stages(int64_t n, int64_t k, double /*kept*/, int tile_rows) {
    const int64_t row_tiles = ceil_div(n, int64_t{tile_rows});
    return {row_tiles, row_tiles * ceil_div(k, int64_t{kStageColumns}), true};
  }
  // Half a byte of metadata for two values.
  static int64_t bytes(double kept) { return int64_t(kept * 2.25); }
};

struct BsrFamily {
  static constexpr int kMacsPerClock = 1024;

  static std::string refusal(const Problem& p, int tile_rows) {
    if (p.pattern.block_rows == tile_rows) return "";
    return concat("computes blocks of ", tile_rows, " rows, these have ", p.pattern.block_rows);
  }
  // A block row has at least one stage, and its last one may be partly empty.
  static Stages stages(int64_t n, int64_t /*k*/, double kept, int tile_rows) {
    const int64_t block_rows = ceil_div(n, int64_t{tile_rows});
    return {block_rows, int64_t(kept / tile_rows / kStageColumns) + block_rows, false};
  }
  static int64_t bytes(double kept) { return int64_t(kept * 2); }
};

}  // namespace sk::cuda
