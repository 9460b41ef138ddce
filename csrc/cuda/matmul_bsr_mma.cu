// Block-sparse matmul on tensor cores: its tiles. A kernel's name ends in rows of a block x tokens.
//
// From here to the instruction: matmul_mma.cuh (the main loop), weights_bsr.cuh (a stage), ptx/ptx.cuh (mma).
#include "cuda/launch.cuh"
#include "cuda/weights_bsr.cuh"

namespace sk {
namespace {

struct Bsr {
  static constexpr int kMacsPerClock = 1024;

  static std::string refusal(const Problem& p, int tile_rows) {
    if (p.pattern.block_rows == tile_rows) return "";
    return concat("computes blocks of ", tile_rows, " rows, these have ", p.pattern.block_rows);
  }
  // A block row has at least one stage, and its last one may be partly empty.
  static cuda::Stages stages(int64_t n, int64_t, double kept, int tile_rows) {
    const int64_t block_rows = ceil_div(n, int64_t{tile_rows});
    return {block_rows, int64_t(kept / tile_rows / cuda::kStageColumns) + block_rows, false};
  }
  static int64_t bytes(double kept) { return int64_t(kept * 2); }
};

}  // namespace

// Warps along rows and tokens, stages in flight, blocks of an SM.
#define SK_TILE_OF(dtype, T, rows, tokens, warps_rows, warps_tokens, stages, blocks, about) \
  extern const KernelFunctions matmul_bsr_mma_##dtype##_sm80_##rows##x##tokens;            \
  const KernelFunctions matmul_bsr_mma_##dtype##_sm80_##rows##x##tokens =                  \
      cuda::tile_kernel<cuda::Tile<T, rows, tokens, warps_rows, warps_tokens, stages, blocks>, cuda::BsrWeights, Bsr>(about);
#define SK_TILE(...) SK_TILE_OF(f16, ptx::F16, __VA_ARGS__) SK_TILE_OF(bf16, ptx::BF16, __VA_ARGS__)

SK_TILE(128, 128, 2, 2, 3, 2, "blocks of 128 rows, many tokens")
SK_TILE(128, 16, 4, 1, 4, 3, "blocks of 128 rows, up to 16 tokens")
SK_TILE(64, 256, 1, 4, 4, 1, "blocks of 64 rows, many tokens: x is read least often")
SK_TILE(64, 128, 1, 4, 3, 2, "blocks of 64 rows, many tokens, where a block has 99 KiB of shared memory")
SK_TILE(64, 16, 4, 1, 4, 4, "blocks of 64 rows, up to 16 tokens")
SK_TILE(32, 128, 1, 4, 4, 2, "blocks of 32 rows, many tokens")
SK_TILE(32, 16, 2, 1, 6, 4, "blocks of 32 rows, up to 16 tokens")
SK_TILE(16, 128, 1, 4, 4, 2, "blocks of 16 rows, many tokens")
SK_TILE(16, 16, 1, 1, 8, 6, "blocks of 16 rows, up to 16 tokens")

}  // namespace sk
