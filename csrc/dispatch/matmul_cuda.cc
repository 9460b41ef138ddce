#include "dispatch/matmul_cuda.h"

#include "core/dtype.h"
#include "dispatch/gpu_arguments.h"
#if SK_HAVE_CUDA
#include "core/cuda_check.h"
#endif

namespace sk {
namespace {

constexpr int64_t kRowAlignment = 16;  // of x: kernels copy 16 bytes at a time

// The rows of x in memory: those of the matrix, or of all images as one.
Rows rows_of_x(const char* op, const sk_matmul_args& a, const sk_conv2d_shape* conv) {
  const int64_t size = dtype_size(a.dtype);
  if (!conv) return make_rows(op, "x", a.x, a.m, a.x_row_stride, a.k, size);
  const sk_conv2d_shape& s = *conv;
  const int64_t image = (s.in_height > 1 ? (s.in_height - 1) * s.x_line_stride : 0) +
                        (s.in_width > 1 ? (s.in_width - 1) * s.x_pixel_stride : 0) + s.in_channels;
  return make_rows(op, "x", a.x, s.batch, s.x_image_stride, image, size);
}

void check_alignment(const char* op, const sk_matmul_args& a, const Rows& x,
                     const sk_conv2d_shape* conv) {
  if (!conv) {
    SK_REQUIRE(x.begin % kRowAlignment == 0 && (a.m == 1 || x.stride % kRowAlignment == 0), op,
               ": expected the rows of x on multiples of ", kRowAlignment, " bytes, the first is ",
               x.begin % kRowAlignment, " past one and they are ", x.stride,
               " apart; copy x to an aligned buffer");
    return;
  }
  const sk_conv2d_shape& s = *conv;
  const int64_t size = dtype_size(a.dtype), taps = s.kernel_height * s.kernel_width;
  const bool aligned = x.begin % kRowAlignment == 0 &&
                       (s.in_width == 1 || s.x_pixel_stride * size % kRowAlignment == 0) &&
                       (s.in_height == 1 || s.x_line_stride * size % kRowAlignment == 0) &&
                       (s.batch == 1 || s.x_image_stride * size % kRowAlignment == 0);
  SK_REQUIRE(aligned, op, ": expected the pixels of x on multiples of ", kRowAlignment,
             " bytes; copy x to an aligned buffer");
  SK_REQUIRE(taps == 1 || a.k / taps * size % kRowAlignment == 0, op, ": a tap has ", a.k / taps,
             " channels, expected a multiple of ", kRowAlignment / size, "; repack");
  SK_REQUIRE(x.width < int64_t{1} << 32, op, ": an image of x takes ", x.width,
             " bytes, expected less than 2^32; cut it into parts");
  // Kernels count lines and pixels in 32 bits, from the padding on.
  const int64_t lines =
      (s.out_height - 1) * s.stride_height + (s.kernel_height - 1) * s.dilation_height;
  const int64_t pixels =
      (s.out_width - 1) * s.stride_width + (s.kernel_width - 1) * s.dilation_width;
  SK_REQUIRE(lines < int64_t{1} << 31 && pixels < int64_t{1} << 31, op,
             ": the kernel's last position is ", lines, " lines and ", pixels,
             " pixels from its first, expected less than 2^31; check the strides and dilations");
}

}  // namespace

void check_addresses(const char* op, const sk_matmul_args& a, const sk_conv2d_shape* conv) {
  check_packed_address(op, a.weight);
  const int64_t size = dtype_size(a.dtype);
  const Rows y = make_rows(op, "y", a.y, a.m, a.y_row_stride, a.n, size);
  const Rows x = rows_of_x(op, a, conv);
  const Rows read[] = {x,
                       make_rows(op, "residual", a.residual, a.m, a.residual_row_stride, a.n, size),
                       make_rows(op, "bias", a.bias, 1, a.n, a.n, size)};
  for (const Rows& r : read) {
    SK_REQUIRE(!r.begin || !overlap(y, r), op, ": y overlaps ", r.name, "; pass a y of its own");
  }
  check_alignment(op, a, x, conv);
}

void check_workspace(const char* op, const sk_matmul_args& a, const CudaDevice& gpu) {
  const int64_t expected = cuda_workspace_bytes(gpu.sm_count);
  SK_REQUIRE(a.workspace && a.workspace_bytes >= expected, op, ": expected a workspace of ",
             expected, " bytes for device ", gpu.index, " (", gpu.name, "), got ",
             a.workspace ? a.workspace_bytes : 0);
  SK_REQUIRE(is_aligned(a.workspace, kGpuAlignment), op, ": expected a workspace aligned to ",
             kGpuAlignment, " bytes");
  SK_REQUIRE(is_aligned(a.counters, kGpuAlignment), op, ": expected counters aligned to ",
             kGpuAlignment, " bytes");
}

#if SK_HAVE_CUDA
void run_on_gpu(const Kernel& kernel, const MatmulCall& call) {
  const int device = call.gpu->index;
  const CurrentDevice current(device);
  const char* op = kernel.op;
  check_memory(op, "x", call.x, device);
  check_memory(op, "y", call.y, device);
  check_memory(op, "the packed weight", call.weight.base, device);
  check_memory(op, "bias", call.bias, device);
  check_memory(op, "residual", call.residual, device);
  check_memory(op, "the workspace", call.workspace, device);
  if (call.counters != call.workspace) check_memory(op, "the counters", call.counters, device);
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
