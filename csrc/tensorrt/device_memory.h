// Memory of a GPU that a plugin owns. Neither getting nor freeing it disturbs another thread that
// captures a graph.
#pragma once
#include <cstdint>
#include <utility>

#include "tensorrt/error.h"

namespace sk::tensorrt {

// What a GPU wants packed weights, workspaces and counters aligned to.
constexpr int64_t kAlignment = 128;

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
inline bool is_aligned(const void* address, int64_t alignment) {
  return reinterpret_cast<uintptr_t>(address) % uintptr_t(alignment) == 0;
}

// cudaMalloc and cudaFree fail in, and break, every capture of the process that is in global mode, unless
// the calling thread says that it knows.
class AmidCaptures {
 public:
  AmidCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~AmidCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  AmidCaptures(const AmidCaptures&) = delete;
  AmidCaptures& operator=(const AmidCaptures&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

class DeviceMemory {
 public:
  DeviceMemory() = default;
  DeviceMemory(int64_t bytes, const char* what) {
    const AmidCaptures amid;
    check_cuda(cudaMalloc(&address_, size_t(bytes)),
               concat("getting ", bytes, " bytes for ", what).c_str());
  }
  ~DeviceMemory() {
    if (!address_) return;
    const AmidCaptures amid;
    cudaFree(address_);
    cudaGetLastError();  // a process that ends may have no driver any more
  }
  DeviceMemory(DeviceMemory&& other) noexcept : address_(std::exchange(other.address_, nullptr)) {}
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    std::swap(address_, other.address_);
    return *this;
  }

  uint8_t* address() const { return static_cast<uint8_t*>(address_); }

 private:
  void* address_ = nullptr;
};

}  // namespace sk::tensorrt
