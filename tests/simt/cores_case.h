// A launch of a kernel on CUDA cores, or two, on a random problem of small integers: exact sums, and nothing
// written beside y. test_cores.cc says which kernel and what x is.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/cores_bsr.cuh"
#include "layout/weight.h"

using namespace sk;
namespace ptx = sk::ptx;

namespace {

template <class T>
constexpr int kDtype = std::is_same_v<T, cuda::F32>   ? SK_F32
                       : std::is_same_v<T, ptx::BF16> ? SK_BF16
                                                      : SK_F16;
template <class T>
using Bits = typename cuda::Element<T>::Bits;

template <class T>
std::vector<Bits<T>> to_elements(const std::vector<float>& numbers) {
  std::vector<Bits<T>> elements(numbers.size());
  std::transform(numbers.begin(), numbers.end(), elements.begin(), cuda::Element<T>::bits);
  return elements;
}

struct Case {
  int64_t m, n, k;
  int blocks = 3;  // of the grid; less than there is work
  int activation = cuda::kNone;
  bool bias = false, residual = false, residual_first = false;
  int y_pad = 0;           // columns beside y
  double density = 0.5;    // of blocks
  unsigned seed = 1;       // of the problem
  unsigned order = 1;      // of blocks and warps
  bool fractions = false;  // sums that depend on their order; only the bits are returned

  std::string describe() const {
    return "m=" + std::to_string(m) + " n=" + std::to_string(n) + " k=" + std::to_string(k) +
           " blocks=" + std::to_string(blocks) + " activation=" + std::to_string(activation) +
           " seed=" + std::to_string(seed);
  }
  float number(std::mt19937& random) const {
    return fractions ? float(random() % 1000) / 999 : float(int(random() % 5) - 2);
  }
};

// A canonical weight in buffers of its own, each as long as it has to be, and the same dense.
struct Weight {
  std::vector<float> dense;  // [n, k]
  simt::Buffer<uint8_t> values, indices, crow;
};

template <class T>
Weight make_weight(const sk_pattern& pattern, const Case& c, std::mt19937& random) {
  std::vector<float> dense(size_t(c.n * c.k));
  std::vector<uint8_t> mask(dense.size());
  const auto keep = [&](int64_t row, int64_t column) {
    if (row >= c.n || column >= c.k) return;
    const size_t at = size_t(row * c.k + column);
    mask[at] = 1;
    dense[at] = c.number(random);
  };
  if (pattern.family == SK_FAMILY_NM) {
    for (int64_t row = 0; row < c.n; row += pattern.vector) {
      for (int64_t group = 0; group < c.k; group += pattern.group) {
        bool chosen[16] = {};
        for (int i = 0; i < pattern.kept; ++i) chosen[random() % unsigned(pattern.group)] = true;
        for (int i = 0; i < pattern.group; ++i) {
          for (int r = 0; r < pattern.vector && chosen[i]; ++r) keep(row + r, group + i);
        }
      }
    }
  } else {
    for (int64_t row = 0; row < c.n; row += pattern.block_rows) {
      for (int64_t column = 0; column < c.k; column += pattern.block_cols) {
        if (double(random() % 1000) >= 1000 * c.density) continue;
        for (int r = 0; r < pattern.block_rows; ++r) {
          for (int j = 0; j < pattern.block_cols; ++j) keep(row + r, column + j);
        }
      }
    }
  }
  const bool bsr = pattern.family == SK_FAMILY_BSR;
  sk_weight w{};
  w.pattern = pattern;
  w.dtype = kDtype<T>;
  w.n = c.n, w.k = c.k;
  const int64_t nnzb = bsr ? count_blocks(pattern, mask.data(), c.n, c.k) : 0;
  const WeightSizes sizes = weight_sizes(pattern, w.dtype, c.n, c.k, nnzb);
  // Aligned to 8 bytes, while they are written.
  const auto array = [](int64_t bytes) { return std::vector<uint64_t>(size_t(bytes / 8 + 1)); };
  std::vector<uint64_t> values = array(sizes.values), indices = array(sizes.indices),
                        crow = array(sizes.crow_indices);
  w.values = values.data(), w.values_bytes = sizes.values;
  w.indices = indices.data(), w.indices_bytes = sizes.indices;
  if (bsr) w.crow_indices = crow.data(), w.crow_indices_bytes = sizes.crow_indices;
  const auto elements = to_elements<T>(dense);
  compress(elements.data(), c.k, mask.data(), w);
  const auto buffer = [](const char* name, const std::vector<uint64_t>& from, int64_t bytes) {
    const auto* first = reinterpret_cast<const uint8_t*>(from.data());
    return simt::Buffer<uint8_t>::input(name, std::vector<uint8_t>(first, first + bytes));
  };
  return {dense, buffer("values", values, sizes.values), buffer("indices", indices, sizes.indices),
          buffer("crow", crow, sizes.crow_indices)};
}

// The parameters of the weight: those of the pattern's family.
template <class Params, class T>
Params weight_params(const sk_pattern& p, const Weight& w, int64_t k) {
  if constexpr (std::is_same_v<Params, cuda::NmParams>) {
    return cuda::NmParams(w.values.data(), w.indices.data(), p.kept, p.group, p.vector, k,
                          int(sizeof(Bits<T>)));
  } else {
    (void)k;
    return cuda::BsrParams(w.values.data(), w.indices.data(), w.crow.data(), p.block_rows,
                           p.block_cols);
  }
}

double activate_exactly(double v, int activation) {
  switch (activation) {
    case cuda::kRelu:
      return std::max(v, 0.0);
    case cuda::kGelu:
      return 0.5 * v * (1 + std::erf(v * M_SQRT1_2));
    case cuda::kGeluTanh:
      return 0.5 * v * (1 + std::tanh(M_2_SQRTPI * M_SQRT1_2 * (v + 0.044715 * v * v * v)));
    case cuda::kSilu:
      return v / (1 + std::exp(-v));
    case cuda::kRelu6:
      return std::min(std::max(v, 0.0), 6.0);
    default:
      return v;
  }
}

// Bias, residual and y of a case, and the check of what came out. What stands beside them is NaN or not written.
template <class T>
class Outcome {
  using E = cuda::Element<T>;

 public:
  Outcome(const Case& c, std::mt19937& random)
      : c_(c),
        stride_(c.n + c.y_pad),
        bias_(size_t(c.n)),
        residual_(size_t(c.m * stride_), NAN),
        y_(simt::Buffer<Bits<T>>::output("y", size_t(c.m * stride_))),
        bias_buffer_(simt::Buffer<Bits<T>>::output("bias", 0)),
        residual_buffer_(simt::Buffer<Bits<T>>::output("residual", 0)) {
    for (float& b : bias_) b = c.number(random);
    for (int64_t i = 0; i < c.m * stride_; ++i) {
      if (i % stride_ < c.n) residual_[size_t(i)] = c.number(random);
    }
    bias_buffer_ = simt::Buffer<Bits<T>>::input("bias", to_elements<T>(bias_));
    residual_buffer_ = simt::Buffer<Bits<T>>::input("residual", to_elements<T>(residual_));
  }

  // Of the tokens from `from` to `to`.
  cuda::OutputParams params(int64_t from, int64_t to) const {
    cuda::OutputParams p{};
    p.y = y_.data() + from * stride_;
    p.bias = c_.bias ? bias_buffer_.data() : nullptr;
    p.residual = c_.residual ? residual_buffer_.data() + from * stride_ : nullptr;
    p.y_row_stride = p.residual_row_stride = stride_;
    p.m = to - from, p.n = int(c_.n);
    p.activation = c_.activation;
    p.residual_first = c_.residual_first;
    p.aligned = stride_ % 4 == 0;
    return p;
  }

  std::vector<Bits<T>> y() const { return y_.values(); }

  void check(const std::vector<float>& x, const std::vector<float>& w) const {
    const bool exact = c_.activation == cuda::kNone || c_.activation == cuda::kRelu ||
                       c_.activation == cuda::kRelu6;
    constexpr double kRounding = std::is_same_v<T, cuda::F32>  ? 1e-6
                                 : std::is_same_v<T, ptx::F16> ? 1.0 / 2048
                                                               : 1.0 / 256;
    for (int64_t i = 0; i < c_.m; ++i) {
      for (int64_t j = 0; j < stride_; ++j) {
        const size_t at = size_t(i * stride_ + j);
        if (j >= c_.n) {
          CHECK(!y_.written(at));
          continue;
        }
        CHECK(y_.written(at));
        double sum = c_.bias ? bias_[size_t(j)] : 0;
        for (int64_t l = 0; l < c_.k; ++l)
          sum += double(x[size_t(i * c_.k + l)]) * w[size_t(j * c_.k + l)];
        const double add = c_.residual ? residual_[at] : 0;
        const double expected = c_.residual_first ? activate_exactly(sum + add, c_.activation)
                                                  : activate_exactly(sum, c_.activation) + add;
        const float got = E::number(y_[at]);
        if (exact ? got != E::number(E::bits(float(expected)))
                  : !(std::abs(got - expected) <= kRounding * std::abs(expected) + 1e-6)) {
          fail(__FILE__, __LINE__,
               c_.describe() + ": y[" + std::to_string(i) + ", " + std::to_string(j) + "] is " +
                   std::to_string(got) + ", expected " + std::to_string(expected));
        }
      }
    }
  }

 private:
  const Case& c_;
  const int64_t stride_;
  std::vector<float> bias_, residual_;
  simt::Buffer<Bits<T>> y_, bias_buffer_, residual_buffer_;
};

// The rows of a matrix; what stands beside them, up to 16 bytes, is NaN.
struct Rows {
  std::vector<float> memory, dense;
  int64_t stride;
};
template <class T>
Rows make_rows(const Case& c, std::mt19937& random) {
  constexpr int64_t kAligned = 16 / int64_t(sizeof(Bits<T>));
  Rows x{{}, {}, (c.k + kAligned - 1) / kAligned * kAligned};
  // Memory ends with the last row.
  x.memory.assign(size_t(std::max<int64_t>(0, (c.m - 1) * x.stride + c.k)), NAN);
  x.dense.resize(size_t(c.m * c.k));
  for (int64_t i = 0; i < c.m; ++i) {
    for (int64_t j = 0; j < c.k; ++j)
      x.memory[size_t(i * x.stride + j)] = x.dense[size_t(i * c.k + j)] = c.number(random);
  }
  return x;
}

}  // namespace
