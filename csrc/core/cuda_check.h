// Errors of the CUDA runtime as exceptions, and what every call on a GPU does around its kernels. For
// files that are part of a CUDA build only.
#pragma once
#include <cuda_runtime_api.h>

#include <string>

namespace sk {

// Throws (SK_RUNTIME_ERROR) with CUDA's own text and what was being done.
[[noreturn]] void fail_cuda(cudaError_t error, const std::string& doing);

inline void check_cuda(cudaError_t error, const char* doing) {
  if (error != cudaSuccess) fail_cuda(error, doing);
}

// Makes a GPU the calling thread's, and gives the thread its own back.
class CurrentDevice {
 public:
  explicit CurrentDevice(int index);
  ~CurrentDevice();
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Refuses an address that is not in the memory of this GPU; NULL passes.
void check_memory(const char* op, const char* name, const void* address, int device);

}  // namespace sk
