// Packing and unpacking 2:4 on a GPU: checked here, launched by cuda/pack_nm_mma_sp.cu.
#pragma once
#include "layout/format.h"

namespace sk {

void pack_on_gpu(const sk_pack_cuda_args& args);
void unpack_on_gpu(const sk_unpack_cuda_args& args);

#if SK_HAVE_CUDA
// The arguments are checked, their GPU is the calling thread's. Throws where the mask does not fit.
void launch_pack_nm_mma_sp(const sk_pack_cuda_args& args, const PackedHeader& header);
void launch_unpack_nm_mma_sp(const sk_unpack_cuda_args& args, const PackedHeader& header);
#endif

}  // namespace sk
