// Every convolution kernel that this machine can run: the same results as a matmul with the im2col
// matrix written out, exact on small integers; nothing written outside y, nothing read outside the
// images; and what sk_conv2d refuses.
#include <map>
#include <numeric>
#include <set>

#include "support.h"

using namespace test;

namespace {

struct Geometry {
  int64_t batch, height, width, channels;
  int64_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, top, left, out_h, out_w;
};

// Odd sizes, windows that leave the image on every side, several images, whole taps outside; the 1x1
// ones are matmuls unless a convolution's kernel is asked for.
constexpr Geometry kGeometries[] = {
    {1, 5, 7, 16, 3, 3, 1, 1, 1, 1, 1, 1, 5, 7}, {2, 9, 6, 20, 3, 2, 2, 1, 1, 2, 1, 2, 5, 8},
    {1, 4, 4, 3, 7, 7, 2, 2, 1, 1, 3, 3, 2, 2},  {3, 1, 11, 24, 1, 5, 1, 2, 1, 2, 0, 1, 1, 3},
    {2, 6, 5, 13, 1, 1, 2, 2, 1, 1, 0, 0, 3, 3}, {2, 3, 5, 33, 1, 1, 1, 1, 1, 1, 0, 0, 3, 5},
    {1, 3, 4, 2, 1, 1, 2, 1, 1, 1, 0, 0, 2, 4},  {1, 8, 8, 64, 3, 3, 1, 1, 3, 3, 3, 3, 8, 8},
    {1, 1, 1, 7, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1},  {1, 12, 13, 40, 2, 2, 1, 1, 1, 1, 0, 0, 12, 13}};

constexpr int64_t kOutputs[] = {1, 17, 33, 70};

// Columns of a tap: what a pattern's groups or blocks, and eight channels, divide.
int64_t tap_columns(const Geometry& g, const sk_pattern& p) {
  if (g.kernel_h * g.kernel_w == 1) return g.channels;
  const int64_t unit = std::lcm<int64_t>(8, p.family == SK_FAMILY_NM ? p.group : p.block_cols);
  return (g.channels + unit - 1) / unit * unit;
}

// Images with NaN between the pixels, the lines and the images.
class Images {
 public:
  Images(int32_t dtype, const Geometry& g, int64_t gap, Fill how, Random& random)
      : g_(g),
        pixel_(g.channels + gap),
        lines_(g.height + (gap ? 1 : 0)),
        memory_(dtype, (g.batch - 1) * lines_ + g.height, (g.width - 1) * pixel_ + g.channels,
                2 * gap) {
    for (int64_t b = 0; b < g.batch; ++b) {
      for (int64_t h = 0; h < g.height; ++h) {
        for (int64_t w = 0; w < g.width; ++w) {
          for (int64_t c = 0; c < g.channels; ++c) {
            set(b, h, w, c, how == Fill::kIntegers ? double(random.integer(-3, 3)) : random.real());
          }
        }
      }
    }
  }

  void set(int64_t b, int64_t h, int64_t w, int64_t c, double value) {
    memory_.set(b * lines_ + h, w * pixel_ + c, value);
  }
  double get(int64_t b, int64_t h, int64_t w, int64_t c) const {
    if (h < 0 || h >= g_.height || w < 0 || w >= g_.width || c >= g_.channels) return 0;
    return memory_.get(b * lines_ + h, w * pixel_ + c);
  }
  const void* data() const { return memory_.data(); }

  sk_conv2d_shape shape() const {
    return {g_.batch,         g_.height,     g_.width,      g_.channels, lines_ * memory_.stride(),
            memory_.stride(), pixel_,        g_.kernel_h,   g_.kernel_w, g_.stride_h,
            g_.stride_w,      g_.dilation_h, g_.dilation_w, g_.top,      g_.left,
            g_.out_h,         g_.out_w};
  }

  // The im2col matrix, into x.
  void gather(int64_t tap, Matrix& x) const {
    for (int64_t row = 0; row < x.rows(); ++row) {
      const int64_t q = row % g_.out_w, p = row / g_.out_w % g_.out_h,
                    b = row / g_.out_w / g_.out_h;
      for (int64_t col = 0; col < x.cols(); ++col) {
        const int64_t r = col / tap / g_.kernel_w, s = col / tap % g_.kernel_w;
        x.set(row, col,
              get(b, p * g_.stride_h - g_.top + r * g_.dilation_h,
                  q * g_.stride_w - g_.left + s * g_.dilation_w, col % tap));
      }
    }
  }

 private:
  Geometry g_;
  int64_t pixel_, lines_;
  Matrix memory_;
};

std::vector<sk_pattern> patterns() {
  return {nm(2, 4),    nm(2, 4, 4), nm(4, 8, 8), nm(1, 4),   nm(5, 16, 4), bsr(1, 1),  bsr(4, 1),
          bsr(16, 16), bsr(32, 32), bsr(8, 8),   bsr(16, 3), bsr(1, 4),    bsr(64, 16)};
}

struct Problem {
  Weight w;
  Images images;
  Inputs in;  // x: the im2col matrix
  int64_t tap;

  Problem(const sk_pattern& pattern, int32_t dtype, int64_t n, const Geometry& g, Random& random)
      : w(pattern, dtype, n, g.kernel_h * g.kernel_w * tap_columns(g, pattern), Fill::kIntegers,
          random),
        images(dtype, g, random.integer(0, 1) * 5, Fill::kIntegers, random),
        in(w, g.batch * g.out_h * g.out_w, Fill::kIntegers, random, random.integer(0, 1) * 3),
        tap(tap_columns(g, pattern)) {
    images.gather(tap, in.x);
  }
};

// Whole numbers: the result is the reference rounded once.
void test_exact(const std::vector<sk_kernel_info>& kernels, std::set<std::string>& seen) {
  const Epilogue epilogues[] = {{},
                                {true, false, SK_ACTIVATION_RELU},
                                {true, true, SK_ACTIVATION_RELU, SK_RESIDUAL_FIRST},
                                {true, true, SK_ACTIVATION_RELU6},
                                {false, true, SK_ACTIVATION_NONE}};
  Random random(1);
  size_t turn = 0;
  for (const sk_pattern& pattern : patterns()) {
    for (int32_t dtype : kDtypes) {
      for (const Geometry& g : kGeometries) {
        const Problem p(pattern, dtype, kOutputs[++turn % std::size(kOutputs)], g, random);
        const Epilogue& e = epilogues[turn % std::size(epilogues)];
        const Canonical canonical = compress(p.w.dense, p.w.mask, pattern, dtype);
        const Sums sums(p.w, p.in.x);
        const int64_t m = p.in.x.rows();
        Canvas expected(dtype, m, p.w.n), canvas(dtype, m, p.w.n);
        for (int64_t row = 0; row < m; ++row) {
          for (int64_t col = 0; col < p.w.n; ++col) {
            expected.set(row, col,
                         finish(e, p.in, row, col, sums.value[size_t(row * p.w.n + col)]));
          }
        }
        const sk_conv2d_shape shape = p.images.shape();
        const auto run = [&](const char* format, const char* kernel, int threads) {
          context = std::string(kernel ? kernel : "the chosen kernel") + " " + name(pattern) + " " +
                    dtype_name(dtype) + " geometry " + std::to_string(&g - kGeometries) +
                    " n=" + std::to_string(p.w.n) + " threads=" + std::to_string(threads);
          const Buffer packed = pack(canonical, format);
          sk_matmul_args args =
              arguments(p.w, packed, p.in, e, canvas.y(), canvas.stride(), threads);
          args.x = p.images.data();
          canvas.clear();
          CHECK_OK(sk_conv2d(&args, &shape, kernel));
          CHECK(canvas == expected);
        };
        for (const sk_kernel_info& kernel : kernels) {
          if (!reads(kernel, p.w) || !accepts(kernel, p.w, m)) continue;
          run(kernel.format, kernel.name, 1 + int(turn % 3));
          seen.insert(kernel.name);
        }
        char format[32];
        CHECK_OK(sk_default_format(&pattern, dtype, "cpu", format));
        run(format, nullptr, 2);
      }
    }
  }
}

// A pixel that is not finite reaches the outputs whose window holds it, and no other.
void test_not_finite(const std::vector<sk_kernel_info>& kernels) {
  Random random(3);
  const Geometry& g = kGeometries[1];
  for (int32_t dtype : kDtypes) {
    for (const sk_pattern& pattern : {nm(2, 4), nm(2, 4, 4), bsr(16, 16), bsr(1, 1)}) {
      Problem p(pattern, dtype, 33, g, random);
      const Sums sums(p.w, p.in.x);
      for (int64_t c = 0; c < g.channels; ++c)
        p.images.set(1, 4, 3, c, std::numeric_limits<double>::quiet_NaN());
      p.images.gather(p.tap, p.in.x);
      const Canonical canonical = compress(p.w.dense, p.w.mask, pattern, dtype);
      const sk_conv2d_shape shape = p.images.shape();
      for (const sk_kernel_info& kernel : kernels) {
        const int64_t m = p.in.x.rows();
        if (!reads(kernel, p.w) || !accepts(kernel, p.w, m)) continue;
        context = std::string(kernel.name) + " with NaN";
        const Buffer packed = pack(canonical, kernel.format);
        Canvas canvas(dtype, m, p.w.n);
        sk_matmul_args args = arguments(p.w, packed, p.in, {}, canvas.y(), canvas.stride(), 1);
        args.x = p.images.data();
        CHECK_OK(sk_conv2d(&args, &shape, kernel.name));
        canvas.check_frame();
        for (int64_t row = 0; row < m; ++row) {
          bool reached = false;
          for (int64_t col = 0; col < p.w.k; ++col) {
            const double x = p.in.x.get(row, col);
            reached |= x != x;
          }
          for (int64_t col = 0; col < p.w.n; ++col) {
            const double y = canvas.get(row, col);
            if (!reached) CHECK(y == round_to(dtype, sums.value[size_t(row * p.w.n + col)]));
            bool kept = false;
            for (int64_t c = 0; c < p.w.k; ++c) {
              const double x = p.in.x.get(row, c);
              kept |= x != x && p.w.dense.get(col, c) != 0;
            }
            if (kept) CHECK(y != y);
          }
        }
      }
    }
  }
}

template <class Change>
void refuses(const char* message, Change change) {
  context = message;
  Random random(5);
  const Geometry& g = kGeometries[0];
  const Problem p(nm(2, 4), SK_F32, 17, g, random);
  const Buffer packed = pack(compress(p.w.dense, p.w.mask, p.w.pattern, SK_F32), "nm");
  Canvas canvas(SK_F32, p.in.x.rows(), p.w.n);
  const Canvas untouched(SK_F32, p.in.x.rows(), p.w.n);
  sk_matmul_args args = arguments(p.w, packed, p.in, {}, canvas.y(), canvas.stride(), 1);
  args.x = p.images.data();
  sk_conv2d_shape shape = p.images.shape();
  CHECK_OK(sk_conv2d(&args, &shape, nullptr));
  canvas.clear();
  change(args, shape);
  CHECK_FAILS(sk_conv2d(&args, &shape, nullptr), SK_INVALID_ARGUMENT, message);
  CHECK(canvas == untouched);
}

void test_refusals() {
  refuses("expected batch from 0 to 2^31 - 1, got -1", [](auto&, auto& s) { s.batch = -1; });
  refuses("expected in_height from 1", [](auto&, auto& s) { s.in_height = 0; });
  refuses("expected in_width from 1", [](auto&, auto& s) { s.in_width = int64_t{1} << 31; });
  refuses("expected in_channels from 1", [](auto&, auto& s) { s.in_channels = 0; });
  refuses("expected kernel_height from 1", [](auto&, auto& s) { s.kernel_height = 0; });
  refuses("expected kernel_width from 1", [](auto&, auto& s) { s.kernel_width = -3; });
  refuses("expected stride_height from 1", [](auto&, auto& s) { s.stride_height = 0; });
  refuses("expected stride_width from 1", [](auto&, auto& s) { s.stride_width = 0; });
  refuses("expected dilation_height from 1", [](auto&, auto& s) { s.dilation_height = 0; });
  refuses("expected dilation_width from 1", [](auto&, auto& s) { s.dilation_width = 0; });
  refuses("expected padding_top from 0 to 2^31 - 1, got -1",
          [](auto&, auto& s) { s.padding_top = -1; });
  refuses("expected padding_left from 0", [](auto&, auto& s) { s.padding_left = -1; });
  refuses("expected out_height from 1", [](auto&, auto& s) { s.out_height = 0; });
  refuses("expected out_width from 1", [](auto&, auto& s) { s.out_width = 0; });
  refuses("y has m=34 rows, expected 1 images of 5x7 pixels", [](auto& a, auto&) { a.m = 34; });
  refuses("expected 1 images of 2147483647x2147483647 pixels",
          [](auto&, auto& s) { s.out_height = s.out_width = (int64_t{1} << 31) - 1; });
  refuses("has k=144, which is not 3x3 taps of 17 channels or more",
          [](auto&, auto& s) { s.in_channels = 17; });
  refuses("which is not 5x3 taps", [](auto&, auto& s) { s.kernel_height = 5; });
  refuses("x_pixel_stride is 15, less than the 16 elements",
          [](auto&, auto& s) { s.x_pixel_stride = 15; });
  refuses("x_line_stride is 3, less than the", [](auto&, auto& s) { s.x_line_stride = 3; });
  refuses("x is larger than the address space",
          [](auto&, auto& s) { s.x_pixel_stride = int64_t{1} << 58; });
  refuses("x is larger than the address space",
          [](auto&, auto& s) { s.x_line_stride = int64_t{1} << 58; });
  refuses("y has n=16, the packed weight has n=17", [](auto& a, auto&) { a.n = 16; });
  refuses("x has k=143, the packed weight has k=144", [](auto& a, auto&) { a.k = 143; });
  refuses("x is bf16, the packed weight is f32", [](auto& a, auto&) { a.dtype = SK_BF16; });
  refuses("unknown activation 6", [](auto& a, auto&) { a.activation = 6; });
  refuses("unknown residual_order 2", [](auto& a, auto&) { a.residual_order = 2; });
  refuses("x or y is NULL", [](auto& a, auto&) { a.x = nullptr; });
  refuses("y has a row stride of 16, less than its width 17",
          [](auto& a, auto&) { a.y_row_stride = 16; });
  refuses("expected device_type cpu (0) or cuda (1), got 2",
          [](auto& a, auto&) { a.device_type = 2; });

  context = "images that do not follow each other";
  refuses("x_image_stride is 8, less than the", [](auto& a, auto& s) {
    s.batch = 5, s.out_height = 1;
    s.x_image_stride = 8;
    a.m = 35;
  });
  const sk_conv2d_shape shape{};
  CHECK_FAILS(sk_conv2d(nullptr, &shape, nullptr), SK_INVALID_ARGUMENT, "args is NULL");
  const sk_matmul_args args{};
  CHECK_FAILS(sk_conv2d(&args, nullptr, nullptr), SK_INVALID_ARGUMENT, "shape is NULL");
}

}  // namespace

int main() {
  const std::vector<sk_kernel_info> kernels = available_kernels("conv2d");
  std::set<std::string> seen;
  test_exact(kernels, seen);
  test_not_finite(kernels);
  test_refusals();
  for (const sk_kernel_info& kernel : kernels) {
    context = kernel.name;
    CHECK(seen.count(kernel.name));
  }
  std::printf("%zu kernels\n", kernels.size());
}
