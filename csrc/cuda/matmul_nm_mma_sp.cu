// 2:4 matmul on tensor cores: its tiles. A kernel's name ends in rows of W x tokens.
//
// From here to the instruction: matmul_mma.cuh (the main loop), weights_nm.cuh (a stage), ptx/ptx.cuh (mma.sp).
#include "cuda/launch.cuh"
#include "cuda/weights_nm.cuh"

namespace sk {
namespace {

struct Nm {
  static constexpr int kMacsPerClock = 2048;

  static std::string refusal(const Problem&, int) { return ""; }
  static cuda::Stages stages(int64_t n, int64_t k, double, int tile_rows) {
    const int64_t row_tiles = ceil_div(n, int64_t{tile_rows});
    return {row_tiles, row_tiles * ceil_div(k, int64_t{cuda::kStageColumns}), true};
  }
  static int64_t bytes(double kept) { return int64_t(kept * 2.25); }  // half a byte of metadata for two values
};

}  // namespace

// Warps along rows and tokens, stages in flight, blocks of an SM.
#define SK_TILE_OF(dtype, T, rows, tokens, warps_rows, warps_tokens, stages, blocks, about) \
  extern const KernelFunctions matmul_nm_mma_sp_##dtype##_sm80_##rows##x##tokens;          \
  const KernelFunctions matmul_nm_mma_sp_##dtype##_sm80_##rows##x##tokens =                \
      cuda::tile_kernel<cuda::Tile<T, rows, tokens, warps_rows, warps_tokens, stages, blocks>, cuda::NmWeights, Nm>(about);
#define SK_TILE(...) SK_TILE_OF(f16, ptx::F16, __VA_ARGS__) SK_TILE_OF(bf16, ptx::BF16, __VA_ARGS__)

SK_TILE(256, 128, 4, 2, 4, 1, "large products: the least traffic for a multiplication")
SK_TILE(128, 128, 2, 2, 3, 2, "large products where a block has 99 KiB of shared memory, or fewer tiles")
SK_TILE(128, 64, 4, 1, 4, 2, "up to 64 tokens")
SK_TILE(64, 32, 4, 1, 6, 4, "up to 32 tokens: bound by memory, W is read once")
SK_TILE(64, 16, 4, 1, 8, 4, "up to 16 tokens: the same")
SK_TILE(64, 8, 4, 1, 8, 4, "up to 8 tokens: the same")

}  // namespace sk
