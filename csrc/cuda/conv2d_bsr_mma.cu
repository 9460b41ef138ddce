// Block-sparse convolution on tensor cores. The tiles are in tiles.inc.
//
// From here to the instruction: matmul_mma.cuh (the main loop), pixels.cuh (x of a stage), weights_bsr.cuh (a stage),
// ptx/ptx.cuh (mma).
#include "cuda/launch.cuh"
#include "cuda/pixels.cuh"
#include "cuda/weights_bsr.cuh"

namespace sk {

#define SK_CONV_BSR_TILE(...) \
  SK_TILE_KERNELS(conv2d_bsr_mma, BsrWeights, BsrFamily, PixelCopier, __VA_ARGS__)
#include "cuda/tiles.inc"

}  // namespace sk
