#include "core/cuda_info.h"

#include <algorithm>
#include <cstdlib>
#include <sstream>

#include "core/error.h"
#if SK_HAVE_CUDA
#include "core/cuda_check.h"
#endif

namespace sk {
namespace {

struct Found {
  std::vector<CudaDevice> devices;
  std::string reason;
};

#if SK_HAVE_CUDA
int64_t attribute(int device, cudaDeviceAttr which) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, device), "reading an attribute of a GPU");
  return value;
}

CudaDevice describe(int index) {
  cudaDeviceProp properties;
  check_cuda(cudaGetDeviceProperties(&properties, index), "reading the properties of a GPU");
  CudaDevice d;
  d.index = index;
  d.name = properties.name;
  d.compute_capability = 10 * properties.major + properties.minor;
  d.has_code = runs_code(SPARSEKIT_CUDA_CODE, d.compute_capability);
  d.sm_count = properties.multiProcessorCount;
  d.shared_per_block = int64_t(properties.sharedMemPerBlockOptin);
  d.shared_per_sm = int64_t(properties.sharedMemPerMultiprocessor);
  d.l2_bytes = properties.l2CacheSize;
  d.memory_bytes = int64_t(properties.totalGlobalMem);
  // kHz and bits; two transfers a cycle.
  d.bandwidth = attribute(index, cudaDevAttrMemoryClockRate) * 1000 * 2 *
                attribute(index, cudaDevAttrGlobalMemoryBusWidth) / 8;
  return d;
}

Found find() {
  Found found;
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    cudaGetLastError();  // the error has been told; it is not to be found again by a later check
    found.reason = explain_no_device(error, cudaGetErrorString(error), cuda_driver_version(),
                                     cuda_runtime_version());
    return found;
  }
  try {
    for (int i = 0; i < count; ++i) found.devices.push_back(describe(i));
  } catch (const Error& broken) {  // the CPU's kernels do not depend on it
    return {{}, broken.what()};
  }
  return found;
}
#else
Found find() {
  return {{}, "this build has no CUDA kernels; rebuild with nvcc and SPARSEKIT_CUDA=ON"};
}
#endif

const Found& found() {
  static const Found instance = find();
  return instance;
}

}  // namespace

#if SK_HAVE_CUDA
uint64_t cuda_capture_id(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  check_cuda(cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &id),
             "asking whether a stream is being captured");
  return status == cudaStreamCaptureStatusActive ? id : 0;
}

int cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}
int cuda_runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}
#else
uint64_t cuda_capture_id(void*) { return 0; }
int cuda_driver_version() { return 0; }
int cuda_runtime_version() { return 0; }
#endif

const std::vector<CudaDevice>& cuda_devices() { return found().devices; }
const std::string& cuda_unavailable_reason() { return found().reason; }

const CudaDevice& cuda_device(int index) {
  const int count = int(cuda_devices().size());
  SK_CHECK(count > 0, SK_UNSUPPORTED, "CUDA: ", cuda_unavailable_reason());
  SK_REQUIRE(index >= 0 && index < count, "CUDA: expected a device from 0 to ", count - 1, ", got ",
             index);
  return cuda_devices()[size_t(index)];
}

const CudaDevice& nominal_cuda_device() {
  static const CudaDevice device = [] {
    CudaDevice d;
    d.name = "nominal A100";
    d.sm_count = 108;
    d.shared_per_block = 163 << 10;
    d.shared_per_sm = 164 << 10;
    d.l2_bytes = 40 << 20;
    d.memory_bytes = int64_t{40} << 30;
    d.bandwidth = 1'555'000'000'000;
    return d;
  }();
  return device;
}

std::string capability_name(int compute_capability) {
  return concat(compute_capability / 10, ".", compute_capability % 10);
}

std::string cuda_version_name(int version) {
  return concat(version / 1000, ".", version % 1000 / 10);
}

bool runs_code(const std::string& built, int compute_capability) {
  std::istringstream parts(built);
  for (std::string part; parts >> part;) {
    const bool ptx = part.compare(0, 3, "ptx") == 0, exact = part.back() == 'a';
    const int code = std::atoi(part.c_str() + (ptx ? 3 : 0));
    if (code > compute_capability) continue;
    if (exact ? code == compute_capability : ptx || code / 10 == compute_capability / 10)
      return true;
  }
  return false;
}

std::string explain_no_device(int error, const char* error_text, int driver, int runtime) {
  if (driver == 0) return "no CUDA driver is installed";
  // Any driver of the same major version serves.
  const int needed = runtime / 1000 * 1000;
  if (driver < needed) {
    return concat("the CUDA driver is for CUDA ", cuda_version_name(driver),
                  ", this build needs one for CUDA ", cuda_version_name(needed),
                  " or later; update the driver, or rebuild with an older nvcc");
  }
  // 100 is cudaErrorNoDevice, which a runtime may also report as 0 devices.
  if (error == 0 || error == 100)
    return "the CUDA driver finds no GPU; is CUDA_VISIBLE_DEVICES set?";
  return concat("the CUDA driver reports no GPU: ", error_text);
}

}  // namespace sk
