// The scalar kernels: slow, obvious, and on every machine. They read the canonical formats and add
// up in double, so that they also serve as the reference of all others.
#include <algorithm>
#include <cmath>

#include "core/parallel.h"
#include "dispatch/registry.h"

namespace sk {
namespace {

double activate(double v, int activation) {
  switch (activation) {
    case SK_ACTIVATION_RELU:
      return v > 0 || v != v ? v : 0;
    case SK_ACTIVATION_GELU:
      return 0.5 * v * (1 + std::erf(v * 0.70710678118654752));
    case SK_ACTIVATION_GELU_TANH:
      return 0.5 * v * (1 + std::tanh(0.79788456080286536 * (v + 0.044715 * v * v * v)));
    case SK_ACTIVATION_SILU:
      return v / (1 + std::exp(-v));
    case SK_ACTIVATION_RELU6:
      return v > 6 ? 6 : v > 0 || v != v ? v : 0;
    default:
      return v;
  }
}

// Calls body(row of W) for all rows, a contiguous share per thread.
template <class F>
void for_rows(const MatmulCall& call, F body) {
  const int shares = int(std::min<int64_t>(call.threads, call.n));
  parallel_for(shares, shares, [&](int share) {
    for (int64_t j = call.n * share / shares; j < call.n * (share + 1) / shares; ++j) body(j);
  });
}

template <class T>
void finish(const MatmulCall& call, int64_t i, int64_t j, double sum) {
  const double residual =
      call.residual ? load_as_float(call.residual, call.dtype, i * call.residual_row_stride + j)
                    : 0;
  if (call.bias) sum += load_as_float(call.bias, call.dtype, j);
  if (call.residual_first) sum += residual;
  sum = activate(sum, call.activation);
  if (!call.residual_first) sum += residual;
  static_cast<T*>(call.y)[i * call.y_row_stride + j] = from_float<T>(float(sum));
}

// x[row][column]: of the matrix, or gathered from the images.
template <class T>
class X {
 public:
  explicit X(const MatmulCall& call) : call_(call), x_(static_cast<const T*>(call.x)) {}

  double operator()(int64_t row, int64_t column) const {
    if (!call_.conv) return to_float(x_[row * call_.x_row_stride + column]);
    const sk_conv2d_shape& s = *call_.conv;
    const int64_t tap_columns = call_.k / (s.kernel_height * s.kernel_width);
    const int64_t tap = column / tap_columns, channel = column % tap_columns;
    const int64_t image = row / (s.out_height * s.out_width),
                  pixel = row % (s.out_height * s.out_width);
    const int64_t line = pixel / s.out_width * s.stride_height - s.padding_top +
                         tap / s.kernel_width * s.dilation_height;
    const int64_t place = pixel % s.out_width * s.stride_width - s.padding_left +
                          tap % s.kernel_width * s.dilation_width;
    const bool inside = line >= 0 && line < s.in_height && place >= 0 && place < s.in_width;
    if (!inside || channel >= s.in_channels) return 0;
    return to_float(
        x_[image * s.x_image_stride + line * s.x_line_stride + place * s.x_pixel_stride + channel]);
  }

 private:
  const MatmulCall& call_;
  const T* x_;
};

template <class T>
void run_nm(const MatmulCall& call) {
  const PackedHeader& h = *call.weight.header;
  const Geometry g = geometry(h.pattern, h.dtype, h.n, h.k);
  const X<T> x(call);
  for_rows(call, [&](int64_t j) {
    const T* values = call.weight.values<T>() + j * g.slots;
    const uint8_t* indices =
        call.weight.indices<uint8_t>() + j / h.pattern.vector * g.index_row_bytes;
    for (int64_t i = 0; i < call.m; ++i) {
      double sum = 0;
      for (int64_t slot = 0; slot < g.slots; ++slot) {
        const int64_t col =
            slot / h.pattern.kept * h.pattern.group + read_index(indices, slot, g.index_bits);
        if (col < call.k) sum += double(to_float(values[slot])) * x(i, col);
      }
      finish<T>(call, i, j, sum);
    }
  });
}

template <class T>
void run_bsr(const MatmulCall& call) {
  const PackedHeader& h = *call.weight.header;
  const int64_t rows = h.pattern.block_rows, cols = h.pattern.block_cols;
  const int32_t* columns = call.weight.indices<int32_t>();
  const X<T> x(call);
  for_rows(call, [&](int64_t j) {
    const int64_t br = j / rows;
    for (int64_t i = 0; i < call.m; ++i) {
      double sum = 0;
      for (int64_t b = call.weight.crow()[br]; b < call.weight.crow()[br + 1]; ++b) {
        const T* values = call.weight.values<T>() + (b * rows + j % rows) * cols;
        const int64_t col0 = columns[b] * cols, width = std::min(cols, call.k - col0);
        for (int64_t c = 0; c < width; ++c) sum += double(to_float(values[c])) * x(i, col0 + c);
      }
      finish<T>(call, i, j, sum);
    }
  });
}

std::string anything(const Problem&) { return ""; }

// About one multiply-add in two nanoseconds.
double cost_us(const Problem& p) {
  return 2e-3 * double(p.m) * double(p.n) * double(p.k) * p.kept_share() / p.threads;
}

constexpr const char* kAbout = "reference, for any CPU";

}  // namespace

#define SK_SCALAR(op, dtype, T)                                                         \
  extern const KernelFunctions op##_nm_##dtype##_scalar, op##_bsr_##dtype##_scalar;     \
  const KernelFunctions op##_nm_##dtype##_scalar{anything, cost_us, run_nm<T>, kAbout}; \
  const KernelFunctions op##_bsr_##dtype##_scalar{anything, cost_us, run_bsr<T>, kAbout};
SK_SCALAR(matmul, f32, float)
SK_SCALAR(matmul, bf16, bf16)
SK_SCALAR(matmul, f16, f16)
SK_SCALAR(conv2d, f32, float)
SK_SCALAR(conv2d, bf16, bf16)
SK_SCALAR(conv2d, f16, f16)

}  // namespace sk
