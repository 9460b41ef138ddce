#if SK_HAVE_CUDA
#include "core/cuda_check.h"

#include "core/error.h"

namespace sk {

void fail_cuda(cudaError_t error, const std::string& doing) {
  throw Error(SK_RUNTIME_ERROR, concat("CUDA failed while ", doing, ": ", cudaGetErrorName(error),
                                       ", ", cudaGetErrorString(error)));
}

CurrentDevice::CurrentDevice(int index) {
  check_cuda(cudaGetDevice(&before_), "asking for the current device");
  if (before_ == index) return;
  check_cuda(cudaSetDevice(index), "choosing a device");
  changed_ = true;
}

CurrentDevice::~CurrentDevice() {
  if (changed_) cudaSetDevice(before_);
}

void check_memory(const char* op, const char* name, const void* address, int device) {
  if (!address) return;
  cudaPointerAttributes found;
  check_cuda(cudaPointerGetAttributes(&found, address), "looking up whose an address is");
  const bool on_a_gpu = found.type == cudaMemoryTypeDevice;
  if (on_a_gpu && found.device == device) return;
  // What every GPU can read: managed memory, and host memory that is pinned and mapped, as a Jetson shares
  // it with its GPU.
  const bool mapped = found.type == cudaMemoryTypeHost && found.devicePointer == address;
  if (mapped || found.type == cudaMemoryTypeManaged) return;
  throw Error(SK_INVALID_ARGUMENT,
              concat(op, ": expected ", name, " in the memory of device ", device, ", got ",
                     on_a_gpu ? concat("that of device ", found.device) : "host memory",
                     "; copy it there"));
}

}  // namespace sk
#endif
