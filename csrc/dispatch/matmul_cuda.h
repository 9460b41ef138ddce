// What a matmul or a convolution on a GPU checks and does beside running its kernel. The checks need no
// GPU; `op` begins their messages.
#pragma once
#include "dispatch/registry.h"

namespace sk {

// Alignment, and that y shares no element with what the kernel reads. m >= 1.
void check_addresses(const char* op, const sk_matmul_args& args, const sk_conv2d_shape* conv);
void check_workspace(const char* op, const sk_matmul_args& args, const CudaDevice& gpu);

// Starts the kernel on the call's GPU and stream; the calling thread's current device stays.
void run_on_gpu(const Kernel& kernel, const MatmulCall& call);

}  // namespace sk
