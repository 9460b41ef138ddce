// Errors of the CUDA runtime as exceptions. For files that are part of a CUDA build only.
#pragma once
#include <cuda_runtime_api.h>

#include <string>

namespace sk {

// Throws (SK_RUNTIME_ERROR) with CUDA's own text and what was being done.
[[noreturn]] void fail_cuda(cudaError_t error, const std::string& doing);

inline void check_cuda(cudaError_t error, const char* doing) {
  if (error != cudaSuccess) fail_cuda(error, doing);
}

}  // namespace sk
