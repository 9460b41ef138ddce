// 2:4 convolution on tensor cores. The tiles are in tiles.inc.
//
// From here to the instruction: matmul_mma.cuh (the main loop), pixels.cuh (x of a stage), weights_nm.cuh (a stage),
// ptx/ptx.cuh (mma.sp).
#include "cuda/launch.cuh"
#include "cuda/pixels.cuh"
#include "cuda/weights_nm.cuh"

namespace sk {

#define SK_CONV_NM_TILE(...) \
  SK_TILE_KERNELS(conv2d_nm_mma_sp, NmWeights, NmFamily, PixelCopier, __VA_ARGS__)
#include "cuda/tiles.inc"

}  // namespace sk
