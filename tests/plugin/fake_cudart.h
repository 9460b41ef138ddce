// A CUDA runtime without a GPU: memory is the emulator's (tests/simt), kernels that the emulator knows run
// there, streams do everything at once. The functions of cuda_runtime_api.h that the library and its tests
// call, and here what tests set and look at.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#define FAKE_API __attribute__((visibility("default")))

namespace fake {

struct Launch {
  std::string kernel;  // mangled
  int grid, threads;
  int64_t shared_bytes;
  void* stream;
  int device;
  bool emulated;
};

// Since the last call.
FAKE_API std::vector<Launch> take_launches();
// Kernels are recorded, and not run.
FAKE_API void emulate(bool on);

// All memory that is allocated. Zones around each piece are checked by every launch.
struct Memory {
  int device;
  std::vector<uint8_t> bytes;
};
FAKE_API std::vector<Memory> memory();

// Without a driver every call answers cudaErrorInsufficientDriver.
FAKE_API void set_driver(bool installed);
FAKE_API void set_capturing(bool capturing);
// The next call of the function fails: "cudaMalloc", "cudaMemcpyAsync", "cudaMemsetAsync", ...
FAKE_API void fail_next(const std::string& function);

constexpr int kDevices = 3;
constexpr int kSms[kDevices] = {16, 20, 20};
constexpr int kCapability[kDevices] = {87, 87, 75};  // no kernel runs on the last

}  // namespace fake
