#include "fake_cudart.h"

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <tuple>
#include <utility>

#include "emulated_kernels.h"
#include "simt/error.h"
#include "simt/global_memory.h"

namespace {

struct Piece {
  std::unique_ptr<simt::Allocation> bytes;
  int device;
};

// One lock for everything: the emulator knows one launch at a time.
struct Machine {
  std::mutex mutex;
  std::map<const uint8_t*, Piece> memory;
  std::map<const void*, std::string> kernels;
  std::vector<fake::Launch> launches;
  std::multiset<std::string> failures;
  bool driver = true, capturing = false, emulate = true;
  int64_t count = 0;
};

Machine& machine() {
  static Machine& instance = *new Machine;  // libraries register kernels before main and free after
  return instance;
}

thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;
thread_local std::vector<std::tuple<dim3, dim3, size_t, cudaStream_t>> configurations;

[[noreturn]] void stop(const std::string& why) {
  std::fprintf(stderr, "fake cudart: %s\n", why.c_str());
  std::abort();
}

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// Runs f under the lock, unless the function is to fail.
template <class F>
cudaError_t call(const char* function, F f) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  if (!m.driver) return result(cudaErrorInsufficientDriver);
  if (const auto at = m.failures.find(function); at != m.failures.end()) {
    m.failures.erase(at);
    return result(std::string(function) == "cudaMalloc" ? cudaErrorMemoryAllocation
                                                        : cudaErrorUnknown);
  }
  return result(f(m));
}

// The piece of memory that holds these bytes, or null where they are the host's.
const Piece* find(Machine& m, const void* address, size_t bytes) {
  const auto* at = static_cast<const uint8_t*>(address);
  auto next = m.memory.upper_bound(at);
  if (next == m.memory.begin()) return nullptr;
  const Piece& memory = std::prev(next)->second;
  const uint8_t* end = memory.bytes->data() + memory.bytes->bytes();
  if (at >= end && !(bytes == 0 && at == end)) return nullptr;
  if (bytes > size_t(end - at)) stop("a copy reaches past " + memory.bytes->name());
  return &memory;
}

cudaError_t copy(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                 size_t height, cudaMemcpyKind kind) {
  return call(height == 1 ? "cudaMemcpyAsync" : "cudaMemcpy2DAsync", [&](Machine& m) {
    if (!width || !height) return cudaSuccess;
    const bool to_gpu = find(m, to, (height - 1) * to_pitch + width);
    const bool from_gpu = find(m, from, (height - 1) * from_pitch + width);
    const bool right = kind == cudaMemcpyHostToDevice   ? to_gpu && !from_gpu
                       : kind == cudaMemcpyDeviceToHost ? !to_gpu && from_gpu
                                                        : to_gpu && from_gpu;
    if (!right) stop("a copy of another kind than its addresses");
    for (size_t row = 0; row < height; ++row) {
      std::memcpy(static_cast<char*>(to) + row * to_pitch,
                  static_cast<const char*>(from) + row * from_pitch, width);
    }
    return cudaSuccess;
  });
}

cudaError_t fill(const char* function, void* to, size_t pitch, int value, size_t width,
                 size_t height) {
  return call(function, [&](Machine& m) {
    if (!width || !height) return cudaSuccess;
    if (!find(m, to, (height - 1) * pitch + width)) stop("host memory set as if it were a GPU's");
    for (size_t row = 0; row < height; ++row)
      std::memset(static_cast<char*>(to) + row * pitch, value, width);
    return cudaSuccess;
  });
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                   cudaStream_t stream) {
  return call("cudaLaunchKernel", [&](Machine& m) {
    const auto name = m.kernels.find(function);
    if (name == m.kernels.end()) stop("a kernel that nobody registered");
    bool emulated = false;
    try {
      emulated = m.emulate &&
                 run_emulated(name->second, int(grid.x), int(block.x), int(shared), arguments);
    } catch (const simt::Error& error) {
      stop(error.what());
    }
    m.launches.push_back({name->second, int(grid.x), int(block.x), int64_t(shared), stream,
                          current_device, emulated});
    return cudaSuccess;
  });
}

}  // namespace

namespace fake {

std::vector<Launch> take_launches() {
  const std::lock_guard<std::mutex> lock(machine().mutex);
  return std::exchange(machine().launches, {});
}
void emulate(bool on) {
  const std::lock_guard<std::mutex> lock(machine().mutex);
  machine().emulate = on;
}
std::vector<Memory> memory() {
  const std::lock_guard<std::mutex> lock(machine().mutex);
  std::vector<Memory> all;
  for (const auto& [address, piece] : machine().memory)
    all.push_back({piece.device, {address, address + piece.bytes->bytes()}});
  return all;
}
void set_driver(bool installed) {
  const std::lock_guard<std::mutex> lock(machine().mutex);
  machine().driver = installed;
}
void set_capturing(bool capturing) {
  const std::lock_guard<std::mutex> lock(machine().mutex);
  machine().capturing = capturing;
}
void fail_next(const std::string& function) {
  const std::lock_guard<std::mutex> lock(machine().mutex);
  machine().failures.insert(function);
}

}  // namespace fake

extern "C" {

#define CUDA FAKE_API

// ---- what compiled kernels call --------------------------------------------------------------------

CUDA void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
CUDA void __cudaRegisterFatBinaryEnd(void**) {}
CUDA void __cudaUnregisterFatBinary(void**) {}
CUDA void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*,
                                 uint3*, dim3*, dim3*, int*) {
  const std::lock_guard<std::mutex> lock(machine().mutex);
  machine().kernels[function] = name;
}
CUDA unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared,
                                          cudaStream_t stream) {
  configurations.emplace_back(grid, block, shared, stream);
  return 0;
}
CUDA cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  std::tie(*grid, *block, *shared, *static_cast<cudaStream_t*>(stream)) = configurations.back();
  configurations.pop_back();
  return cudaSuccess;
}
CUDA cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
CUDA cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                                    size_t shared, cudaStream_t stream) {
  return launch(kernel, grid, block, arguments, shared, stream);
}
CUDA cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                                  size_t shared, cudaStream_t stream) {
  return launch(function, grid, block, arguments, shared, stream);
}
CUDA cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
  return call("cudaFuncSetAttribute", [](Machine&) { return cudaSuccess; });
}

// ---- the machine: two Orins, of which the second is a little larger, and an older GPU ------------------

CUDA cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
CUDA cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
CUDA cudaError_t cudaGetDeviceCount(int* count) {
  return call("cudaGetDeviceCount", [&](Machine&) {
    *count = fake::kDevices;
    return cudaSuccess;
  });
}
CUDA cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  return call("cudaGetDeviceProperties", [&](Machine&) {
    std::memset(p, 0, sizeof *p);
    std::strcpy(p->name, "Stand-in GPU");
    p->major = fake::kCapability[device] / 10, p->minor = fake::kCapability[device] % 10;
    p->multiProcessorCount = fake::kSms[device];
    p->sharedMemPerBlockOptin = 163 << 10;
    p->sharedMemPerMultiprocessor = 164 << 10;
    p->l2CacheSize = 4 << 20;
    p->totalGlobalMem = size_t{32} << 30;
    return cudaSuccess;
  });
}
CUDA cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMemoryClockRate ? 3'200'000 : 256;
  return cudaSuccess;
}
CUDA cudaError_t cudaGetDevice(int* device) {
  return call("cudaGetDevice", [&](Machine&) {
    *device = current_device;
    return cudaSuccess;
  });
}
CUDA cudaError_t cudaSetDevice(int device) {
  return call("cudaSetDevice", [&](Machine&) {
    current_device = device;
    return cudaSuccess;
  });
}
CUDA cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
CUDA const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorMemoryAllocation     ? "cudaErrorMemoryAllocation"
         : error == cudaErrorInsufficientDriver ? "cudaErrorInsufficientDriver"
                                                : "cudaErrorUnknown";
}
CUDA const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : "an error of the stand-in";
}

// ---- memory and streams --------------------------------------------------------------------------------

CUDA cudaError_t cudaMalloc(void** address, size_t bytes) {
  return call("cudaMalloc", [&](Machine& m) {
    auto memory =
        std::make_unique<simt::Allocation>("allocation " + std::to_string(m.count++), bytes, false);
    memory->set_written();  // it starts as NaN all the same
    const uint8_t* at = memory->data();
    *address = memory->data();
    m.memory.emplace(at, Piece{std::move(memory), current_device});
    return cudaSuccess;
  });
}
CUDA cudaError_t cudaFree(void* address) {
  return call("cudaFree", [&](Machine& m) {
    if (address && !m.memory.erase(static_cast<uint8_t*>(address))) stop("freed twice");
    return cudaSuccess;
  });
}
CUDA cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  return call("cudaPointerGetAttributes", [&](Machine& m) {
    *attributes = {};
    const Piece* memory = find(m, address, 0);
    attributes->type = memory ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
    attributes->device = memory ? memory->device : -2;
    return cudaSuccess;
  });
}
CUDA cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                                 cudaStream_t) {
  return copy(to, bytes, from, bytes, bytes, 1, kind);
}
CUDA cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return copy(to, bytes, from, bytes, bytes, 1, kind);
}
CUDA cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                                   size_t width, size_t height, cudaMemcpyKind kind, cudaStream_t) {
  return copy(to, to_pitch, from, from_pitch, width, height, kind);
}
CUDA cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return fill("cudaMemsetAsync", to, bytes, value, bytes, 1);
}
CUDA cudaError_t cudaMemset2DAsync(void* to, size_t pitch, int value, size_t width, size_t height,
                                   cudaStream_t) {
  return fill("cudaMemset2DAsync", to, pitch, value, width, height);
}
CUDA cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return call("cudaStreamSynchronize", [](Machine&) { return cudaSuccess; });
}
CUDA cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = reinterpret_cast<cudaStream_t>(new char);
  return cudaSuccess;
}
CUDA cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete reinterpret_cast<char*>(stream);
  return cudaSuccess;
}
CUDA cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return call("cudaStreamIsCapturing", [&](Machine& m) {
    *status = m.capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
  });
}
CUDA cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  thread_local cudaStreamCaptureMode current = cudaStreamCaptureModeGlobal;
  std::swap(*mode, current);
  return cudaSuccess;
}

}  // extern "C"
