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
  if (call.bias) sum += load_as_float(call.bias, call.dtype, j);
  sum = activate(sum, call.activation);
  if (call.residual)
    sum += load_as_float(call.residual, call.dtype, i * call.residual_row_stride + j);
  static_cast<T*>(call.y)[i * call.y_row_stride + j] = from_float<T>(float(sum));
}

template <class T>
void run_nm(const MatmulCall& call) {
  const PackedHeader& h = *call.weight.header;
  const Geometry g = geometry(h.pattern, h.dtype, h.n, h.k);
  for_rows(call, [&](int64_t j) {
    const T* values = call.weight.values<T>() + j * g.slots;
    const uint8_t* indices =
        call.weight.indices<uint8_t>() + j / h.pattern.vector * g.index_row_bytes;
    for (int64_t i = 0; i < call.m; ++i) {
      const T* x = static_cast<const T*>(call.x) + i * call.x_row_stride;
      double sum = 0;
      for (int64_t slot = 0; slot < g.slots; ++slot) {
        const int64_t col =
            slot / h.pattern.kept * h.pattern.group + read_index(indices, slot, g.index_bits);
        if (col < call.k) sum += double(to_float(values[slot])) * double(to_float(x[col]));
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
  for_rows(call, [&](int64_t j) {
    const int64_t br = j / rows;
    for (int64_t i = 0; i < call.m; ++i) {
      const T* x = static_cast<const T*>(call.x) + i * call.x_row_stride;
      double sum = 0;
      for (int64_t b = call.weight.crow()[br]; b < call.weight.crow()[br + 1]; ++b) {
        const T* values = call.weight.values<T>() + (b * rows + j % rows) * cols;
        const int64_t col0 = columns[b] * cols, width = std::min(cols, call.k - col0);
        for (int64_t c = 0; c < width; ++c)
          sum += double(to_float(values[c])) * double(to_float(x[col0 + c]));
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

extern const KernelFunctions matmul_nm_f32_scalar, matmul_nm_bf16_scalar, matmul_nm_f16_scalar,
    matmul_bsr_f32_scalar, matmul_bsr_bf16_scalar, matmul_bsr_f16_scalar;
const KernelFunctions matmul_nm_f32_scalar{anything, cost_us, run_nm<float>, kAbout};
const KernelFunctions matmul_nm_bf16_scalar{anything, cost_us, run_nm<bf16>, kAbout};
const KernelFunctions matmul_nm_f16_scalar{anything, cost_us, run_nm<f16>, kAbout};
const KernelFunctions matmul_bsr_f32_scalar{anything, cost_us, run_bsr<float>, kAbout};
const KernelFunctions matmul_bsr_bf16_scalar{anything, cost_us, run_bsr<bf16>, kAbout};
const KernelFunctions matmul_bsr_f16_scalar{anything, cost_us, run_bsr<f16>, kAbout};

}  // namespace sk
