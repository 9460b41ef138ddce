#include "dispatch/matmul_cuda.h"

#include <cstring>

#include "core/dtype.h"
#if SK_HAVE_CUDA
#include "core/cuda_check.h"
#endif

namespace sk {
namespace {

constexpr int64_t kRowAlignment = 16;      // of x: kernels copy 16 bytes at a time
constexpr int64_t kWeightAlignment = 128;  // of the weight and the workspace

bool is_aligned(const void* address, int64_t alignment) {
  return reinterpret_cast<uintptr_t>(address) % uintptr_t(alignment) == 0;
}

// Rows of a matrix in memory, in bytes.
struct Rows {
  const char* name;
  uintptr_t begin, end;
  int64_t rows, stride, width;
};

Rows make_rows(const char* name, const void* address, int64_t rows, int64_t stride, int64_t width,
               int64_t element_size) {
  SK_REQUIRE(is_aligned(address, element_size), "matmul: expected ", name, " aligned to ",
             element_size, " bytes, as its elements");
  if (rows == 1) stride = width;
  SK_REQUIRE(stride < (int64_t{1} << 60) / (rows * element_size), "matmul: ", name,
             " has a row stride of ", stride, ", too large for ", rows, " rows");
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
  return {name,
          begin,
          begin + uintptr_t(((rows - 1) * stride + width) * element_size),
          rows,
          stride * element_size,
          width * element_size};
}

// Different columns of one matrix share no element, though their addresses interleave.
bool overlap(const Rows& a, const Rows& b) {
  if (a.end <= b.begin || b.end <= a.begin) return false;
  if (a.stride != b.stride || a.rows == 1 || b.rows == 1) return true;
  const int64_t difference = int64_t(b.begin - a.begin) % a.stride;
  const int64_t shift = difference < 0 ? difference + a.stride : difference;
  return shift < a.width || shift + b.width > a.stride;
}

#if SK_HAVE_CUDA
// Makes a GPU the calling thread's, and gives the thread its own back.
class CurrentDevice {
 public:
  explicit CurrentDevice(int index) {
    check_cuda(cudaGetDevice(&before_), "asking for the current device");
    if (before_ == index) return;
    check_cuda(cudaSetDevice(index), "choosing a device");
    changed_ = true;
  }
  ~CurrentDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

void check_memory(const char* name, const void* address, int device) {
  if (!address) return;
  cudaPointerAttributes found;
  check_cuda(cudaPointerGetAttributes(&found, address), "looking up whose an address is");
  const bool on_a_gpu = found.type == cudaMemoryTypeDevice;
  if ((on_a_gpu && found.device == device) || found.type == cudaMemoryTypeManaged) return;
  throw Error(SK_INVALID_ARGUMENT,
              concat("matmul: expected ", name, " in the memory of device ", device, ", got ",
                     on_a_gpu ? concat("that of device ", found.device) : "host memory",
                     "; copy it there"));
}
#endif

}  // namespace

PackedWeight open_on_gpu(const sk_matmul_args& a, PackedHeader& copy) {
  SK_REQUIRE(a.weight_header, "matmul: weight_header is NULL; pass a host copy of the first ",
             SK_HEADER_BYTES, " bytes of the packed weight");
  std::memcpy(&copy, a.weight_header, sizeof copy);
  check_header(copy, a.weight_bytes);
  return {&copy, static_cast<const uint8_t*>(a.weight)};
}

void check_addresses(const sk_matmul_args& a) {
  SK_REQUIRE(a.weight && is_aligned(a.weight, kWeightAlignment),
             "matmul: expected a packed weight aligned to ", kWeightAlignment, " bytes");
  const int64_t size = dtype_size(a.dtype);
  const Rows y = make_rows("y", a.y, a.m, a.y_row_stride, a.n, size);
  const Rows x = make_rows("x", a.x, a.m, a.x_row_stride, a.k, size);
  const Rows read[] = {x, make_rows("residual", a.residual, a.m, a.residual_row_stride, a.n, size),
                       make_rows("bias", a.bias, 1, a.n, a.n, size)};
  for (const Rows& r : read) {
    SK_REQUIRE(!r.begin || !overlap(y, r), "matmul: y overlaps ", r.name, "; pass a y of its own");
  }
  SK_REQUIRE(x.begin % kRowAlignment == 0 && (a.m == 1 || x.stride % kRowAlignment == 0),
             "matmul: expected the rows of x on multiples of ", kRowAlignment,
             " bytes, the first is ", x.begin % kRowAlignment, " past one and they are ", x.stride,
             " apart; copy x to an aligned buffer");
}

void check_workspace(const sk_matmul_args& a, const CudaDevice& gpu) {
  const int64_t expected = cuda_workspace_bytes(gpu.sm_count);
  SK_REQUIRE(a.workspace && a.workspace_bytes >= expected, "matmul: expected a workspace of ",
             expected, " bytes for device ", gpu.index, " (", gpu.name, "), got ",
             a.workspace ? a.workspace_bytes : 0);
  SK_REQUIRE(is_aligned(a.workspace, kWeightAlignment), "matmul: expected a workspace aligned to ",
             kWeightAlignment, " bytes");
}

#if SK_HAVE_CUDA
void run_on_gpu(const Kernel& kernel, const MatmulCall& call) {
  const int device = call.gpu->index;
  const CurrentDevice current(device);
  check_memory("x", call.x, device);
  check_memory("y", call.y, device);
  check_memory("the packed weight", call.weight.base, device);
  check_memory("bias", call.bias, device);
  check_memory("residual", call.residual, device);
  check_memory("the workspace", call.workspace, device);
  kernel.functions->run(call);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess)
    fail_cuda(error, concat("starting ", kernel.name, " on device ", device));
}
#else
void run_on_gpu(const Kernel&, const MatmulCall&) {
  throw Error(SK_UNSUPPORTED, cuda_unavailable_reason());
}
#endif

}  // namespace sk
