#include "dispatch/matmul_cuda.h"

#include "core/dtype.h"
#include "dispatch/gpu_arguments.h"
#if SK_HAVE_CUDA
#include "core/cuda_check.h"
#endif

namespace sk {
namespace {

constexpr int64_t kRowAlignment = 16;  // of x: kernels copy 16 bytes at a time

}  // namespace

void check_addresses(const sk_matmul_args& a) {
  check_packed_address("matmul", a.weight);
  const int64_t size = dtype_size(a.dtype);
  const Rows y = make_rows("matmul", "y", a.y, a.m, a.y_row_stride, a.n, size);
  const Rows x = make_rows("matmul", "x", a.x, a.m, a.x_row_stride, a.k, size);
  const Rows read[] = {
      x, make_rows("matmul", "residual", a.residual, a.m, a.residual_row_stride, a.n, size),
      make_rows("matmul", "bias", a.bias, 1, a.n, a.n, size)};
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
  SK_REQUIRE(is_aligned(a.workspace, kGpuAlignment), "matmul: expected a workspace aligned to ",
             kGpuAlignment, " bytes");
}

#if SK_HAVE_CUDA
void run_on_gpu(const Kernel& kernel, const MatmulCall& call) {
  const int device = call.gpu->index;
  const CurrentDevice current(device);
  check_memory("matmul", "x", call.x, device);
  check_memory("matmul", "y", call.y, device);
  check_memory("matmul", "the packed weight", call.weight.base, device);
  check_memory("matmul", "bias", call.bias, device);
  check_memory("matmul", "residual", call.residual, device);
  check_memory("matmul", "the workspace", call.workspace, device);
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
