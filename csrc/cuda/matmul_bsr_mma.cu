// Block-sparse matmul on tensor cores. The tiles are in tiles.inc.
//
// From here to the instruction: matmul_mma.cuh (the main loop), weights_bsr.cuh (a stage), ptx/ptx.cuh (mma).
#include "cuda/launch.cuh"
#include "cuda/rows.cuh"
#include "cuda/weights_bsr.cuh"

namespace sk {

#define SK_BSR_TILE(...) \
  SK_TILE_KERNELS(matmul_bsr_mma, BsrWeights, BsrFamily, RowCopier, __VA_ARGS__)
#include "cuda/tiles.inc"

}  // namespace sk
