// Block-sparse matmul on tensor cores. The tiles are in tiles.inc.
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

#define SK_KERNEL(dtype, T, rows, tokens, warps_rows, warps_tokens, stages, blocks, about)     \
  extern const KernelFunctions matmul_bsr_mma_##dtype##_sm80_##rows##x##tokens;                \
  const KernelFunctions matmul_bsr_mma_##dtype##_sm80_##rows##x##tokens =                      \
      cuda::tile_kernel<cuda::Tile<T, rows, tokens, warps_rows, warps_tokens, stages, blocks>, \
                        cuda::BsrWeights, Bsr>(about);
#define SK_BSR_TILE(...) \
  SK_KERNEL(f16, ptx::F16, __VA_ARGS__) SK_KERNEL(bf16, ptx::BF16, __VA_ARGS__)
#include "cuda/tiles.inc"

}  // namespace sk
