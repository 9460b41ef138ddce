// The GPUs of this machine and what kernels and cost models need to know of them. Plain C++: a build
// without CUDA has the same functions, and no GPU.
//
// Nothing here runs before it is asked for: to count the GPUs is to start the driver, and a process
// that has started it can no longer fork into one that uses it.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "sparsekit/sparsekit.h"

namespace sk {

struct CudaDevice {
  int index = -1;  // of the CUDA runtime; -1: none of this machine's
  std::string name;
  int compute_capability = 80;  // 10 * major + minor
  bool has_code = true;         // this build holds machine code or PTX that it can run
  int sm_count = 1;
  int64_t shared_per_block = 0;  // bytes that one block can opt in to
  int64_t shared_per_sm = 0;
  int64_t l2_bytes = 0, memory_bytes = 0;
  int64_t bandwidth = 0;  // of the memory, bytes per second; 0: unknown
};

// The GPUs that the CUDA runtime sees; asked once.
const std::vector<CudaDevice>& cuda_devices();
// Why there is none, or "".
const std::string& cuda_unavailable_reason();
// Throws when there is none (SK_UNSUPPORTED) or none with this index (SK_INVALID_ARGUMENT).
const CudaDevice& cuda_device(int index);
// An A100 (compute capability 8.0, the least that any kernel needs), for decisions about a GPU that
// is elsewhere.
const CudaDevice& nominal_cuda_device();

// CUDA versions as 1000 * major + 10 * minor; 0: none.
int cuda_driver_version();
int cuda_runtime_version();

// Counters of 4 bytes at the start of a workspace. They are zero before and after every call.
constexpr int64_t kCudaCounterBytes = SK_CUDA_COUNTER_BYTES;

// Behind them: partial sums of the tiles that blocks share, two tiles for each block that an SM holds.
constexpr int64_t kCudaPartBytesPerSm = 256 << 10;

// What the calls on one stream need beside their tensors.
inline int64_t cuda_workspace_bytes(int sm_count) {
  return kCudaCounterBytes + sm_count * kCudaPartBytesPerSm;
}

// ---- the parts that need no GPU to be tested ----

// 103 as "10.3", and 12040 as "12.4".
std::string capability_name(int compute_capability);
std::string cuda_version_name(int version);
// Whether code for the architectures `built`, such as "80 90a ptx90", runs on a GPU: machine code on
// its own major version from its minor version on, PTX on everything later, "a" on one GPU only.
bool runs_code(const std::string& built, int compute_capability);
// What cudaGetDeviceCount means by an error (as an integer), or by no error and no GPU.
std::string explain_no_device(int error, const char* error_text, int driver, int runtime);

}  // namespace sk
