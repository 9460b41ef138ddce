// 2:4 matmul on tensor cores. The tiles are in tiles.inc.
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
  static int64_t bytes(double kept) {
    return int64_t(kept * 2.25);
  }  // half a byte of metadata for two values
};

}  // namespace

#define SK_KERNEL(dtype, T, rows, tokens, warps_rows, warps_tokens, stages, blocks, about)     \
  extern const KernelFunctions matmul_nm_mma_sp_##dtype##_sm80_##rows##x##tokens;              \
  const KernelFunctions matmul_nm_mma_sp_##dtype##_sm80_##rows##x##tokens =                    \
      cuda::tile_kernel<cuda::Tile<T, rows, tokens, warps_rows, warps_tokens, stages, blocks>, \
                        cuda::NmWeights, Nm>(about);
#define SK_NM_TILE(...) \
  SK_KERNEL(f16, ptx::F16, __VA_ARGS__) SK_KERNEL(bf16, ptx::BF16, __VA_ARGS__)
#include "cuda/tiles.inc"

}  // namespace sk
