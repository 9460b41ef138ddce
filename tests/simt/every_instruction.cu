// nvcc's half of the test that ptx.cuh compiles for GPUs.
#include "every_instruction.cuh"

template __global__ void every_instruction<sk::ptx::F16>(const __grid_constant__ int, const uint4*,
                                                         int*, uint64_t*, float*);
template __global__ void every_instruction<sk::ptx::BF16>(const __grid_constant__ int, const uint4*,
                                                          int*, uint64_t*, float*);
