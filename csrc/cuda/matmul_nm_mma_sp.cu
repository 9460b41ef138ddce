// 2:4 matmul on tensor cores. The tiles are in tiles.inc.
//
// From here to the instruction: matmul_mma.cuh (the main loop), weights_nm.cuh (a stage), ptx/ptx.cuh (mma.sp).
#include "cuda/launch.cuh"
#include "cuda/rows.cuh"
#include "cuda/weights_nm.cuh"

namespace sk {

#define SK_NM_TILE(...) \
  SK_TILE_KERNELS(matmul_nm_mma_sp, NmWeights, NmFamily, RowCopier, __VA_ARGS__)
#include "cuda/tiles.inc"

}  // namespace sk
