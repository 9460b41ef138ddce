// What the C++ tests share: checks, element types, random problems, owners of buffers, references.
// Everything goes through the C interface; conversions and references are written here once more,
// so that a mistake of the library cannot hide in its own helpers.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "sparsekit/sparsekit.h"

namespace test {

// ---- checks: the first failure ends the program
// ----------------------------------------------------

inline thread_local std::string context;  // what is being tested, for the message

[[noreturn]] inline void fail(const char* file, int line, const std::string& message) {
  std::fprintf(stderr, "%s:%d: %s\n  in: %s\n", file, line, message.c_str(), context.c_str());
  std::fflush(stderr);
  std::_Exit(1);
}

#define CHECK(condition)                                                       \
  do {                                                                         \
    if (!(condition)) ::test::fail(__FILE__, __LINE__, "not so: " #condition); \
  } while (false)

#define CHECK_OK(call)                                                                    \
  do {                                                                                    \
    if ((call) != SK_OK)                                                                  \
      ::test::fail(__FILE__, __LINE__, std::string(#call " failed: ") + sk_last_error()); \
  } while (false)

// The call returns `status` and its message contains `text`.
#define CHECK_FAILS(call, status, text) \
  ::test::check_failure((call), (status), (text), #call, __FILE__, __LINE__)

inline void check_failure(sk_status got, sk_status expected, const std::string& text,
                          const char* call, const char* file, int line) {
  if (got != expected) {
    fail(file, line,
         std::string(call) + " returned " + std::to_string(got) + ", expected " +
             std::to_string(expected));
  }
  const std::string message = sk_last_error();
  if (message.find(text) == std::string::npos) {
    fail(file, line, std::string(call) + " says '" + message + "', expected '" + text + "'");
  }
}

// ---- random numbers: the engine's output is fixed by the standard, its distributions are not
// -------

class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}
  int64_t integer(int64_t low, int64_t high) {  // both included
    return low + int64_t(bits() % uint64_t(high - low + 1));
  }
  double real() { return double(bits() >> 11) * 0x1p-53 * 2 - 1; }  // [-1, 1)
  bool chance(double p) { return real() < 2 * p - 1; }
  uint64_t bits() { return uint64_t(engine_()) << 32 | engine_(); }

 private:
  std::mt19937 engine_;
};

// ---- element types
// ---------------------------------------------------------------------------------

constexpr int32_t kDtypes[] = {SK_F32, SK_BF16, SK_F16};

inline int64_t dtype_bytes(int32_t dtype) { return dtype == SK_F32 ? 4 : 2; }
inline const char* dtype_name(int32_t dtype) {
  return dtype == SK_F32 ? "f32" : dtype == SK_BF16 ? "bf16" : "f16";
}
inline int digits(int32_t dtype) { return dtype == SK_F32 ? 24 : dtype == SK_BF16 ? 8 : 11; }

// The nearest number of the dtype (ties to even), for numbers that are not too large for it.
inline double round_to(int32_t dtype, double value) {
  if (value == 0) return value;
  const int exponent = std::max(std::ilogb(value), dtype == SK_F16 ? -14 : -126);
  return std::ldexp(std::nearbyint(std::ldexp(value, digits(dtype) - 1 - exponent)),
                    exponent - digits(dtype) + 1);
}

inline uint32_t encode(int32_t dtype, double value) {  // value: a number of the dtype, or NaN
  if (dtype == SK_F16) {
    if (value != value) return 0x7e00;
    const uint32_t sign = std::signbit(value) ? 0x8000 : 0;
    const double size = std::fabs(value);
    if (size < 0x1p-14) return sign | uint32_t(size * 0x1p24);
    const int exponent =
        std::ilogb(size);  // the significand's leading bit adds one to the exponent
    return sign + (uint32_t(exponent + 14) << 10) + uint32_t(std::ldexp(size, 10 - exponent));
  }
  const float narrow = float(value);
  uint32_t bits;
  std::memcpy(&bits, &narrow, 4);
  return dtype == SK_F32 ? bits : bits >> 16;
}

inline double decode(int32_t dtype, uint32_t bits) {
  if (dtype == SK_F16) {
    const int exponent = int(bits >> 10 & 31), mantissa = int(bits & 1023);
    if (exponent == 31) return std::numeric_limits<double>::quiet_NaN();
    const double size =
        std::ldexp(exponent ? 1024 + mantissa : mantissa, std::max(exponent, 1) - 25);
    return bits & 0x8000 ? -size : size;
  }
  if (dtype == SK_BF16) bits <<= 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// A matrix in memory that ends with its last element, so that a sanitizer sees a read past it. What
// lies between the rows starts as NaN: it poisons every result that depends on it.
class Matrix {
 public:
  Matrix(int32_t dtype, int64_t rows, int64_t cols, int64_t gap = 0)
      : dtype_(dtype),
        rows_(rows),
        cols_(cols),
        stride_(cols + gap),
        bytes_(rows ? ((rows - 1) * stride_ + cols) * dtype_bytes(dtype) : 0),
        data_(new uint8_t[size_t(bytes_)]) {
    for (int64_t at = 0; at < bytes_ / dtype_bytes(dtype); ++at) {
      put(at, std::numeric_limits<double>::quiet_NaN());
    }
  }

  int32_t dtype() const { return dtype_; }
  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  int64_t stride() const { return stride_; }
  void* data() { return data_.get(); }
  const void* data() const { return data_.get(); }
  double get(int64_t row, int64_t col) const {
    uint32_t bits = 0;
    std::memcpy(&bits, data_.get() + (row * stride_ + col) * dtype_bytes(dtype_),
                size_t(dtype_bytes(dtype_)));
    return decode(dtype_, bits);
  }
  void set(int64_t row, int64_t col, double value) {
    put(row * stride_ + col, round_to(dtype_, value));
  }
  bool same_bytes(const Matrix& other) const {
    return bytes_ == other.bytes_ &&
           (!bytes_ || !std::memcmp(data(), other.data(), size_t(bytes_)));
  }

 private:
  void put(int64_t at, double value) {
    const uint32_t bits = encode(dtype_, value);
    std::memcpy(data_.get() + at * dtype_bytes(dtype_), &bits, size_t(dtype_bytes(dtype_)));
  }

  int32_t dtype_;
  int64_t rows_, cols_, stride_, bytes_;
  std::unique_ptr<uint8_t[]> data_;
};

enum class Fill { kIntegers, kReals };

inline void fill(Matrix& matrix, Fill how, Random& random) {
  for (int64_t row = 0; row < matrix.rows(); ++row) {
    for (int64_t col = 0; col < matrix.cols(); ++col) {
      matrix.set(row, col, how == Fill::kIntegers ? double(random.integer(-3, 3)) : random.real());
    }
  }
}

// ---- patterns and weights
// --------------------------------------------------------------------------

inline sk_pattern nm(int kept, int group, int vector = 1) {
  return {SK_FAMILY_NM, kept, group, vector, 0, 0};
}
inline sk_pattern bsr(int rows, int cols) { return {SK_FAMILY_BSR, 0, 0, 0, rows, cols}; }

inline std::vector<sk_pattern> all_patterns() {
  std::vector<sk_pattern> patterns;
  for (int vector : {1, 4, 8, 16}) {
    for (auto [kept, group] : {std::pair{1, 4}, {2, 4}, {4, 8}, {3, 4}})
      patterns.push_back(nm(kept, group, vector));
  }
  patterns.push_back(nm(1, 2));
  patterns.push_back(nm(5, 16, 4));
  for (auto [rows, cols] : {std::pair{1, 1},
                            {1, 4},
                            {4, 1},
                            {16, 1},
                            {8, 8},
                            {16, 16},
                            {32, 32},
                            {64, 64},
                            {128, 16},
                            {16, 128},
                            {6, 3}}) {
    patterns.push_back(bsr(rows, cols));
  }
  return patterns;
}

inline std::string name(const sk_pattern& p) {
  const auto text = [](int number) { return std::to_string(number); };
  if (p.family == SK_FAMILY_BSR) return "bsr" + text(p.block_rows) + "x" + text(p.block_cols);
  return text(p.kept) + ":" + text(p.group) + "v" + text(p.vector);
}

// A mask that fits the pattern. Some groups keep fewer values than they may, some nothing at all;
// some block rows are empty, some blocks kept in part.
inline std::vector<uint8_t> random_mask(const sk_pattern& p, int64_t n, int64_t k, Random& random) {
  std::vector<uint8_t> mask(size_t(n * k), 0);
  const bool is_nm = p.family == SK_FAMILY_NM;
  const int64_t tile_rows = is_nm ? p.vector : p.block_rows,
                tile_cols = is_nm ? p.group : p.block_cols;
  for (int64_t row0 = 0; row0 < n; row0 += tile_rows) {
    const bool empty = random.chance(0.1);
    for (int64_t col0 = 0; col0 < k; col0 += tile_cols) {
      std::vector<int64_t> columns;
      for (int64_t col = col0; col < std::min(k, col0 + tile_cols); ++col) columns.push_back(col);
      if (is_nm) {  // a random choice of as many as are allowed, now and then of one less
        const int64_t keep = p.kept - (random.chance(0.1) ? 1 : 0);
        while (int64_t(columns.size()) > keep) {
          columns.erase(columns.begin() + random.integer(0, int64_t(columns.size()) - 1));
        }
      } else if (empty || random.chance(0.5)) {
        continue;
      }
      for (int64_t row = row0; row < std::min(n, row0 + tile_rows); ++row) {
        for (int64_t col : columns) mask[size_t(row * k + col)] = random.chance(0.05) ? 0 : 1;
      }
    }
  }
  return mask;
}

// Canonical arrays of their exact sizes.
struct Canonical {
  sk_weight weight{};
  std::unique_ptr<uint8_t[]> values, indices, crow;

  Canonical(const sk_pattern& pattern, int32_t dtype, int64_t n, int64_t k, int64_t nnzb) {
    weight.pattern = pattern;
    weight.dtype = dtype;
    weight.n = n;
    weight.k = k;
    CHECK_OK(sk_weight_sizes(&pattern, dtype, n, k, nnzb, &weight.values_bytes,
                             &weight.indices_bytes, &weight.crow_indices_bytes));
    const auto make = [](std::unique_ptr<uint8_t[]>& array, int64_t bytes) -> void* {
      array.reset(bytes ? new uint8_t[size_t(bytes)] : nullptr);
      return array.get();
    };
    weight.values = make(values, weight.values_bytes);
    weight.indices = make(indices, weight.indices_bytes);
    weight.crow_indices = make(crow, weight.crow_indices_bytes);
  }

  bool operator==(const Canonical& other) const {
    const auto same = [](const void* a, const void* b, int64_t bytes) {
      return bytes == 0 || std::memcmp(a, b, size_t(bytes)) == 0;
    };
    const sk_weight &a = weight, &b = other.weight;
    return a.values_bytes == b.values_bytes && a.indices_bytes == b.indices_bytes &&
           a.crow_indices_bytes == b.crow_indices_bytes &&
           same(a.values, b.values, a.values_bytes) &&
           same(a.indices, b.indices, a.indices_bytes) &&
           same(a.crow_indices, b.crow_indices, a.crow_indices_bytes);
  }
};

inline Canonical compress(const Matrix& dense, const std::vector<uint8_t>& mask,
                          const sk_pattern& pattern, int32_t dtype) {
  int64_t nnzb = 0;
  if (pattern.family == SK_FAMILY_BSR) {
    CHECK_OK(sk_count_blocks(&pattern, mask.data(), dense.rows(), dense.cols(), &nnzb));
  }
  Canonical canonical(pattern, dtype, dense.rows(), dense.cols(), nnzb);
  CHECK_OK(sk_compress(dense.data(), dense.stride(), mask.data(), &canonical.weight));
  return canonical;
}

// Memory as sk_pack wants it, of its exact size.
class Buffer {
 public:
  explicit Buffer(int64_t bytes)
      : bytes_(bytes),
        data_(static_cast<uint8_t*>(std::aligned_alloc(64, size_t(bytes + 63) / 64 * 64))) {
    CHECK(data_ != nullptr);
  }
  uint8_t* data() { return data_.get(); }
  const uint8_t* data() const { return data_.get(); }
  int64_t bytes() const { return bytes_; }

 private:
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };
  int64_t bytes_;
  std::unique_ptr<uint8_t, Free> data_;
};

inline Buffer pack(const Canonical& canonical, const char* format) {
  int64_t bytes = 0;
  CHECK_OK(sk_packed_bytes(&canonical.weight, format, &bytes));
  Buffer packed(bytes);
  CHECK_OK(sk_pack(&canonical.weight, format, packed.data(), bytes));
  return packed;
}

inline Canonical unpack(const Buffer& packed) {
  sk_packed_info info;
  CHECK_OK(sk_read_packed_info(packed.data(), packed.bytes(), &info));
  Canonical out(info.pattern, info.dtype, info.n, info.k, info.nnzb);
  CHECK_OK(sk_unpack(packed.data(), packed.bytes(), &out.weight));
  return out;
}

// ---- problems
// --------------------------------------------------------------------------------------

// A pruned weight in all its forms.
struct Weight {
  sk_pattern pattern;
  int32_t dtype;
  int64_t n, k;
  std::vector<uint8_t> mask;
  Matrix dense;  // zero where the mask is

  Weight(const sk_pattern& pattern_, int32_t dtype_, int64_t n_, int64_t k_, Fill how,
         Random& random)
      : pattern(pattern_),
        dtype(dtype_),
        n(n_),
        k(k_),
        mask(random_mask(pattern_, n_, k_, random)),
        dense(dtype_, n_, k_) {
    fill(dense, how, random);
    for (int64_t i = 0; i < n * k; ++i) {
      if (!mask[size_t(i)]) dense.set(i / k, i % k, 0);
    }
  }
};

// x, bias and residual of one call; their rows lie `gap` elements apart.
struct Inputs {
  Matrix x, bias, residual;

  Inputs(const Weight& w, int64_t m, Fill how, Random& random, int64_t gap = 0)
      : x(w.dtype, m, w.k, gap), bias(w.dtype, 1, w.n), residual(w.dtype, m, w.n, 2 * gap) {
    fill(x, how, random);
    fill(bias, how, random);
    fill(residual, how, random);
  }
};

struct Epilogue {
  bool bias = false, residual = false;
  int32_t activation = SK_ACTIVATION_NONE;
  int32_t order = SK_RESIDUAL_LAST;
};

inline sk_matmul_args arguments(const Weight& w, const Buffer& packed, const Inputs& in,
                                const Epilogue& epilogue, void* y, int64_t y_stride, int threads) {
  sk_matmul_args a{};
  a.m = in.x.rows();
  a.n = w.n;
  a.k = w.k;
  a.dtype = w.dtype;
  a.x = in.x.data();
  a.x_row_stride = in.x.stride();
  a.weight = packed.data();
  a.weight_bytes = packed.bytes();
  a.y = y;
  a.y_row_stride = y_stride;
  a.bias = epilogue.bias ? in.bias.data() : nullptr;
  a.residual = epilogue.residual ? in.residual.data() : nullptr;
  a.residual_row_stride = in.residual.stride();
  a.residual_order = epilogue.order;
  a.activation = epilogue.activation;
  a.num_threads = threads;
  return a;
}

// y in the middle of a larger matrix whose other elements must keep their value.
class Canvas {
 public:
  Canvas(int32_t dtype, int64_t m, int64_t n) : m_(m), n_(n), whole_(dtype, m + 4, n + 23) {
    clear();
  }

  void clear() {
    for (int64_t i = 0; i < whole_.rows(); ++i) {
      for (int64_t j = 0; j < whole_.cols(); ++j) whole_.set(i, j, kPoison);
    }
  }
  void* y() {
    return static_cast<uint8_t*>(whole_.data()) + (2 * whole_.stride() + 11) * element_bytes();
  }
  int64_t stride() const { return whole_.stride(); }
  double get(int64_t i, int64_t j) const { return whole_.get(i + 2, j + 11); }
  void set(int64_t i, int64_t j, double value) { whole_.set(i + 2, j + 11, value); }
  bool operator==(const Canvas& other) const { return whole_.same_bytes(other.whole_); }

  // Checks everything around y.
  void check_frame() const {
    for (int64_t i = 0; i < whole_.rows(); ++i) {
      for (int64_t j = 0; j < whole_.cols(); ++j) {
        const bool inside = i >= 2 && i < m_ + 2 && j >= 11 && j < n_ + 11;
        if (!inside) CHECK(whole_.get(i, j) == kPoison);
      }
    }
  }

 private:
  static constexpr double kPoison = -12352;  // a number of every dtype
  int64_t element_bytes() const { return dtype_bytes(dtype_); }

  int64_t m_, n_;
  Matrix whole_;
  int32_t dtype_ = whole_.dtype();
};

inline double activate(double v, int32_t activation) {
  switch (activation) {
    case SK_ACTIVATION_RELU:
      return v > 0 ? v : 0;
    case SK_ACTIVATION_GELU:
      return 0.5 * v * std::erfc(-v / std::sqrt(2.0));
    case SK_ACTIVATION_GELU_TANH:
      return 0.5 * v * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (v + 0.044715 * v * v * v)));
    case SK_ACTIVATION_SILU:
      return v / (1 + std::exp(-v));
    case SK_ACTIVATION_RELU6:
      return std::min(std::max(v, 0.0), 6.0);
    default:
      return v;
  }
}

// What the epilogue makes of a sum.
inline double finish(const Epilogue& e, const Inputs& in, int64_t row, int64_t col, double sum) {
  if (e.bias) sum += in.bias.get(0, col);
  const double residual = e.residual ? in.residual.get(row, col) : 0;
  return e.order == SK_RESIDUAL_FIRST ? activate(sum + residual, e.activation)
                                      : activate(sum, e.activation) + residual;
}

// x W^T in float64, and the sum of the products' sizes, [m][n] each.
struct Sums {
  std::vector<double> value, size;

  Sums(const Weight& w, const Matrix& x) : value(size_t(x.rows() * w.n)), size(value.size()) {
    std::vector<double> row(size_t(w.k)), weight(size_t(w.n * w.k));
    for (int64_t i = 0; i < w.n * w.k; ++i) weight[size_t(i)] = w.dense.get(i / w.k, i % w.k);
    for (int64_t i = 0; i < x.rows(); ++i) {
      for (int64_t c = 0; c < w.k; ++c) row[size_t(c)] = x.get(i, c);
      for (int64_t j = 0; j < w.n; ++j) {
        double sum = 0, total = 0;
        for (int64_t c = 0; c < w.k; ++c) {
          const double product = row[size_t(c)] * weight[size_t(j * w.k + c)];
          sum += product;
          total += std::fabs(product);
        }
        value[size_t(i * w.n + j)] = sum;
        size[size_t(i * w.n + j)] = total;
      }
    }
  }
};

// ---- the registry
// ----------------------------------------------------------------------------------

inline std::vector<sk_kernel_info> kernels() {
  std::vector<sk_kernel_info> all(static_cast<size_t>(sk_kernel_count()));
  for (size_t i = 0; i < all.size(); ++i) {
    CHECK_OK(sk_get_kernel(int32_t(i), &all[i]));
    all[i].reason = nullptr;  // valid until the next call only
  }
  return all;
}

// Those of an operation that this CPU can run.
inline std::vector<sk_kernel_info> available_kernels(const char* op = "matmul") {
  std::vector<sk_kernel_info> all = kernels();
  const auto other = [op](const sk_kernel_info& k) {
    return !k.available || k.device_type != SK_CPU || std::strcmp(k.op, op) != 0;
  };
  all.erase(std::remove_if(all.begin(), all.end(), other), all.end());
  return all;
}

// Does the kernel take the weight's problem with m rows, packed as its own format or another?
inline bool accepts(const sk_kernel_info& kernel, const Weight& w, int64_t m, int threads = 1,
                    const char* format = nullptr) {
  std::vector<sk_candidate> answers(static_cast<size_t>(sk_kernel_count()));
  CHECK_OK(sk_explain(kernel.op, format ? format : kernel.format, &w.pattern, w.dtype, m, w.n, w.k,
                      threads, answers.data()));
  for (const sk_candidate& c : answers) {
    if (!std::strcmp(c.name, kernel.name)) return c.ok;
  }
  return false;
}

// Every format, in the order of their numbers (test_errors.cc holds it against the library's list).
constexpr const char* kFormats[] = {"nm",       "bsr",       "nm_rows16", "bsr_rows",
                                    "nm_quads", "nm_mma_sp", "bsr_mma"};

inline bool holds(const char* format, const sk_pattern& p, int32_t dtype) {
  const bool is_2_4 = p.kept == 2 && p.group == 4;
  if (!std::strcmp(format, "nm_quads")) return is_2_4 && p.vector == 1 && dtype == SK_F32;
  if (!std::strcmp(format, "nm_mma_sp")) return is_2_4 && dtype != SK_F32;
  if (!std::strcmp(format, "bsr_mma")) {
    return p.block_rows >= 16 && p.block_cols >= 16 && dtype != SK_F32;  // sides are powers of 2
  }
  return !std::strncmp(format, "nm", 2) == (p.family == SK_FAMILY_NM);
}

inline bool reads(const sk_kernel_info& kernel, const Weight& w) {
  return holds(kernel.format, w.pattern, w.dtype) &&
         !std::strcmp(kernel.dtype, dtype_name(w.dtype));
}

}  // namespace test
