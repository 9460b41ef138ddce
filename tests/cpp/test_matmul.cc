// Every kernel that this machine can run, on every pattern: exact on small integers, within the
// bound of the arithmetic on reals, nothing written outside y, nothing read outside x.
#include <map>
#include <set>

#include "support.h"

using namespace test;

namespace {

constexpr int64_t kRows[] = {0, 1, 2, 5, 8, 9, 15, 16, 17, 33, 97, 200};
constexpr int kThreads[] = {1, 2, 1, 5, 1};

struct Shape {
  int64_t n, k;
  bool all_rows;  // or three of kRows in turn
};
// Odd sizes around every tile, and the last two for the blocks of rows and columns that caches hold.
constexpr Shape kShapes[] = {{1, 1, true},     {17, 1, false},   {1, 37, false},   {15, 33, false},
                             {33, 70, true},   {65, 131, false}, {97, 203, false}, {16, 64, false},
                             {601, 40, false}, {5, 700, false}};

// The weight in each format that holds it, the C interface's inverses checked on the way.
std::map<std::string, Buffer> pack_all(const Weight& w) {
  const Canonical canonical = compress(w.dense, w.mask, w.pattern, w.dtype);
  CHECK_OK(sk_validate(&canonical.weight));
  Matrix back(w.dtype, w.n, w.k, 3);
  CHECK_OK(sk_decompress(&canonical.weight, back.data(), back.stride()));
  for (int64_t i = 0; i < w.n * w.k; ++i)
    CHECK(back.get(i / w.k, i % w.k) == w.dense.get(i / w.k, i % w.k));

  std::map<std::string, Buffer> packed;
  for (const char* format : kFormats) {
    if (!holds(format, w.pattern, w.dtype)) continue;
    Buffer buffer = pack(canonical, format);
    CHECK(unpack(buffer) == canonical);
    packed.emplace(format, std::move(buffer));
  }
  return packed;
}

void describe(const sk_kernel_info& kernel, const Weight& w, int64_t m, const Epilogue& e,
              int threads) {
  context = std::string(kernel.name) + " " + name(w.pattern) + " m=" + std::to_string(m) +
            " n=" + std::to_string(w.n) + " k=" + std::to_string(w.k) +
            " bias=" + std::to_string(e.bias) + " residual=" + std::to_string(e.residual) +
            " activation=" + std::to_string(e.activation) + " threads=" + std::to_string(threads);
}

// Whole numbers: every partial sum is exact, so the result is the reference rounded once.
void test_exact(const std::vector<sk_kernel_info>& kernels, std::set<std::string>& seen) {
  const Epilogue epilogues[] = {{},
                                {true, false, SK_ACTIVATION_NONE},
                                {true, true, SK_ACTIVATION_RELU},
                                {true, true, SK_ACTIVATION_RELU6, SK_RESIDUAL_FIRST},
                                {false, true, SK_ACTIVATION_NONE},
                                {false, false, SK_ACTIVATION_RELU}};
  Random random(1);
  size_t turn = 0;
  for (const sk_pattern& pattern : all_patterns()) {
    for (int32_t dtype : kDtypes) {
      for (const Shape& shape : kShapes) {
        const Weight w(pattern, dtype, shape.n, shape.k, Fill::kIntegers, random);
        const std::map<std::string, Buffer> packed = pack_all(w);
        for (size_t i = 0; i < std::size(kRows); ++i) {
          if (!shape.all_rows && i % 4 != turn % 4) continue;
          const int64_t m = kRows[i];
          const Epilogue& e = epilogues[++turn % std::size(epilogues)];
          const Inputs in(w, m, Fill::kIntegers, random, int64_t(turn % 3) * 5);
          const Sums sums(w, in.x);
          Canvas expected(dtype, m, w.n), canvas(dtype, m, w.n);
          for (int64_t row = 0; row < m; ++row) {
            for (int64_t col = 0; col < w.n; ++col) {
              expected.set(row, col, finish(e, in, row, col, sums.value[size_t(row * w.n + col)]));
            }
          }
          const Canvas untouched(dtype, m, w.n);
          for (const sk_kernel_info& kernel : kernels) {
            if (!reads(kernel, w)) continue;
            const int threads = kThreads[++turn % std::size(kThreads)];
            describe(kernel, w, m, e, threads);
            canvas.clear();
            // A format that extends the kernel's own must do as well.
            const bool extended = !std::strcmp(kernel.format, "nm_rows16") &&
                                  packed.count("nm_quads") && turn % 2 &&
                                  accepts(kernel, w, m, 1, "nm_quads");
            const char* format = extended ? "nm_quads" : kernel.format;
            const sk_matmul_args args =
                arguments(w, packed.at(format), in, e, canvas.y(), canvas.stride(), threads);
            if (m == 0 || accepts(kernel, w, m)) {
              CHECK_OK(sk_matmul(&args, kernel.name));
              CHECK(canvas == expected);
              seen.insert(kernel.name);
            } else {
              CHECK_FAILS(sk_matmul(&args, kernel.name), SK_UNSUPPORTED, kernel.name);
              CHECK(canvas == untouched);
            }
          }
        }
      }
    }
  }
}

// Reals: the bound of a sum of k products in f32, whatever its order, through the epilogue. u =
// 2^-24.
//   sum         |error| <= (k + 2) u (sum |x w| + |bias|)
//   activation  Lipschitz constant < 1.13 (gelu; the others have less), and 16 u of its argument
//   y           one rounding to the dtype
void test_close(const std::vector<sk_kernel_info>& kernels) {
  const double u = 0x1p-24;
  Random random(2);
  size_t turn = 0;
  for (const sk_pattern& pattern : all_patterns()) {
    for (int32_t dtype : kDtypes) {
      const Weight w(pattern, dtype, 33, 203, Fill::kReals, random);
      const std::map<std::string, Buffer> packed = pack_all(w);
      for (int64_t m : {3, 37}) {
        const Inputs in(w, m, Fill::kReals, random, 1);
        const Sums sums(w, in.x);
        for (int32_t activation = SK_ACTIVATION_NONE; activation <= SK_ACTIVATION_RELU6;
             ++activation) {
          const Epilogue e{turn % 2 == 0, turn % 3 == 0, activation};
          ++turn;
          for (const sk_kernel_info& kernel : kernels) {
            if (!reads(kernel, w) || !accepts(kernel, w, m)) continue;
            describe(kernel, w, m, e, 2);
            Canvas canvas(dtype, m, w.n);
            const sk_matmul_args args =
                arguments(w, packed.at(kernel.format), in, e, canvas.y(), canvas.stride(), 2);
            CHECK_OK(sk_matmul(&args, kernel.name));
            canvas.check_frame();
            for (int64_t row = 0; row < m; ++row) {
              for (int64_t col = 0; col < w.n; ++col) {
                const double bias = e.bias ? in.bias.get(0, col) : 0;
                const double residual = e.residual ? in.residual.get(row, col) : 0;
                const double sum = sums.value[size_t(row * w.n + col)] + bias;
                const double y = activate(sum, activation) + residual;
                const double size = sums.size[size_t(row * w.n + col)] + std::fabs(bias);
                const double allowed = 1.13 * double(w.k + 2) * u * size + 16 * u * std::fabs(sum) +
                                       std::ldexp(std::fabs(y), -digits(dtype)) * 1.01 + 0x1p-25;
                if (!(std::fabs(canvas.get(row, col) - y) <= allowed)) {
                  fail(__FILE__, __LINE__,
                       "y is " + std::to_string(canvas.get(row, col)) + ", expected " +
                           std::to_string(y) + " within " + std::to_string(allowed));
                }
              }
            }
          }
        }
      }
    }
  }
}

// A NaN goes through, an infinity too, and neither reaches another row.
void test_not_finite(const std::vector<sk_kernel_info>& kernels) {
  Random random(3);
  for (int32_t dtype : kDtypes) {
    for (const sk_pattern& pattern : {nm(2, 4), nm(2, 4, 4), bsr(16, 16), bsr(4, 1)}) {
      const Weight w(pattern, dtype, 33, 64, Fill::kIntegers, random);
      const std::map<std::string, Buffer> packed = pack_all(w);
      for (int64_t m : {4, 20}) {
        Inputs in(w, m, Fill::kIntegers, random);
        const Sums sums(w, in.x);
        for (int64_t c = 0; c < w.k; ++c) in.x.set(1, c, std::numeric_limits<double>::quiet_NaN());
        for (const sk_kernel_info& kernel : kernels) {
          if (!reads(kernel, w) || !accepts(kernel, w, m)) continue;
          describe(kernel, w, m, {}, 1);
          Canvas canvas(dtype, m, w.n);
          const sk_matmul_args args =
              arguments(w, packed.at(kernel.format), in, {}, canvas.y(), canvas.stride(), 1);
          CHECK_OK(sk_matmul(&args, kernel.name));
          canvas.check_frame();
          for (int64_t row = 0; row < m; ++row) {
            for (int64_t col = 0; col < w.n; ++col) {
              const double y = canvas.get(row, col), sum = sums.value[size_t(row * w.n + col)];
              bool any_weight = false;
              for (int64_t c = 0; c < w.k; ++c) any_weight |= w.dense.get(col, c) != 0;
              if (row != 1) {
                CHECK(y == round_to(dtype, sum));
              } else if (any_weight) {
                CHECK(y != y);
              }
            }
          }
        }
      }
    }
  }
}

// The ends of f16: sums that round to even between its numbers, subnormal ones, and those past
// 65504, which become infinite (a NaN for decode()).
void test_f16_range(const std::vector<sk_kernel_info>& kernels) {
  Random random(4);
  const double scales[] = {0x1p-24, 3 * 0x1p-24, 0x1p-14, 1 + 0x1p-10, 2049, 32768, 65504};
  for (const sk_pattern& pattern : {nm(2, 4), nm(2, 4, 4), nm(4, 8), bsr(16, 16), bsr(4, 1)}) {
    Weight w(pattern, SK_F16, 33, 16, Fill::kIntegers, random);
    const std::map<std::string, Buffer> packed = pack_all(w);
    for (int64_t m : {7, 21}) {
      Inputs in(w, m, Fill::kIntegers, random);
      for (int64_t row = 0; row < m; ++row) {  // one number a row, so that every sum is exact
        for (int64_t c = 0; c < w.k; ++c) in.x.set(row, c, 0);
        in.x.set(row, row % w.k, scales[size_t(row) % std::size(scales)]);
      }
      const Sums sums(w, in.x);
      for (const sk_kernel_info& kernel : kernels) {
        if (!reads(kernel, w) || !accepts(kernel, w, m)) continue;
        describe(kernel, w, m, {}, 1);
        Canvas canvas(SK_F16, m, w.n);
        const sk_matmul_args args =
            arguments(w, packed.at(kernel.format), in, {}, canvas.y(), canvas.stride(), 1);
        CHECK_OK(sk_matmul(&args, kernel.name));
        canvas.check_frame();
        for (int64_t row = 0; row < m; ++row) {
          for (int64_t col = 0; col < w.n; ++col) {
            const double y = canvas.get(row, col), sum = sums.value[size_t(row * w.n + col)];
            if (std::fabs(sum) >= 65520) {
              CHECK(y != y);
            } else {
              CHECK(y == round_to(SK_F16, sum));
            }
          }
        }
      }
    }
  }
}

}  // namespace

int main() {
  const std::vector<sk_kernel_info> kernels = available_kernels();
  std::set<std::string> seen;
  test_exact(kernels, seen);
  test_f16_range(kernels);
  test_close(kernels);
  test_not_finite(kernels);
  for (const sk_kernel_info& kernel : kernels) {
    context = kernel.name;
    CHECK(seen.count(kernel.name));  // no kernel is registered that nothing here can reach
  }
  std::printf("%zu kernels\n", kernels.size());
}
