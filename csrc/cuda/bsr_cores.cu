// Block-sparse matmul and convolution on CUDA cores, from the canonical form.
//
// From here to the multiplication: cores.cuh (the tiles of many tokens), cores_bsr.cuh (W; few tokens), cores_x.cuh
// (x).
#include "cuda/cores_launch.cuh"

namespace sk {

#define SK_BSR_CORES(dtype, T)                                                                  \
  SK_CORES_KERNEL(matmul_bsr_##dtype##_sm80_cores,                                              \
                  CoresKernel<T, cuda::BsrCores, cuda::MatrixX>::functions(                     \
                      "every block shape on CUDA cores: the multiply-adds of the kept blocks")) \
  SK_CORES_KERNEL(conv2d_bsr_##dtype##_sm80_cores,                                              \
                  CoresKernel<T, cuda::BsrCores, cuda::PixelX>::functions(                      \
                      "every block shape on CUDA cores: the multiply-adds of the kept blocks")) \
  SK_CORES_KERNEL(                                                                              \
      matmul_bsr_##dtype##_sm80_decode,                                                         \
      BsrDecodeKernel<T>::functions("every block shape, few tokens: W is read once for 8"))

SK_BSR_CORES(f32, cuda::F32)
SK_BSR_CORES(f16, ptx::F16)
SK_BSR_CORES(bf16, ptx::BF16)

}  // namespace sk
