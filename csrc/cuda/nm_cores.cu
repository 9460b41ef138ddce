// N:M matmul and convolution on CUDA cores, from the canonical form.
//
// From here to the multiplication: cores.cuh (the tiles of many tokens), cores_nm.cuh (W; few tokens), cores_x.cuh
// (x).
#include "cuda/cores_launch.cuh"

namespace sk {

#define SK_NM_CORES(dtype, T)                                                                 \
  SK_CORES_KERNEL(matmul_nm_##dtype##_sm80_cores,                                             \
                  CoresKernel<T, cuda::NmCores, cuda::MatrixX>::functions(                    \
                      "every N:M on CUDA cores: W expanded, dense multiply-adds in float32")) \
  SK_CORES_KERNEL(conv2d_nm_##dtype##_sm80_cores,                                             \
                  CoresKernel<T, cuda::NmCores, cuda::PixelX>::functions(                     \
                      "every N:M on CUDA cores: W expanded, dense multiply-adds in float32")) \
  SK_CORES_KERNEL(matmul_nm_##dtype##_sm80_decode,                                            \
                  NmDecodeKernel<T>::functions(                                               \
                      "every N:M, few tokens: W is read once for 8, at the speed of memory"))

SK_NM_CORES(f32, cuda::F32)
SK_NM_CORES(f16, ptx::F16)
SK_NM_CORES(bf16, ptx::BF16)

}  // namespace sk
