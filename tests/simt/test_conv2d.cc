// Every tile of the tensor-core convolutions: exact sums of small integers over kernels, strides, dilations and
// paddings, tiles across lines and images, and images whose memory ends with their last channel.
#include "conv_case.h"
#include "cuda/pixels.cuh"
#include "tile_case.h"

namespace {

template <class T>
X<cuda::PixelParams> make_images(const Case& c, const sk_conv2d_shape& s, std::mt19937& random) {
  const Images images = make_numbers(s, c.m, c.k, [&] { return c.number(random); });
  X<cuda::PixelParams> x;
  x.dense = images.dense;
  x.memory.resize(images.memory.size());
  std::transform(images.memory.begin(), images.memory.end(), x.memory.begin(), to_bits<T>);
  x.params = [s, k = c.k](int64_t token) {
    cuda::PixelParams params(s, k, 8);
    const cuda::PixelRange range = cuda::pixels_from(s, token, 8);
    params.first_pixel = range.first_pixel;
    return std::make_pair(params, range.offset);
  };
  return x;
}

template <class Tile, template <class> class WeightsOf>
void test_tile(const sk_pattern& pattern, int format_id) {
  using T = typename Tile::T;
  const int64_t rows = Tile::kRows, tokens = Tile::kTokens;
  // m and k of a case are those of the geometry.
  const auto check = [&](const Geometry& g, Case c, simt::Statistics* statistics = nullptr) {
    const sk_conv2d_shape s = g.shape();
    c.m = s.batch * s.out_height * s.out_width;
    c.k = s.kernel_height * s.kernel_width * g.tap;
    const auto make_x = [&](std::mt19937& random) { return make_images<T>(c, s, random); };
    return run<Tile, WeightsOf, cuda::PixelCopier>(pattern, format_id, c, make_x, statistics);
  };
  const auto blocks = [&](int64_t n, int count, bool share = true) {
    return Case{0, n, 0, count, share};
  };
  Case full = blocks(rows, 1, false);
  full.density = 1;
  simt::Statistics statistics;
  check({1, 1, tokens + 7, 64, 64, 1, 8}, full, &statistics);
  check_accesses<Tile, WeightsOf>(statistics);

  Geometry same{2, 5, 7, 16, 16, 3, 3};
  same.top = same.left = same.bottom = same.right = 1;
  check(same, blocks(rows, 1, false));
  // One tap, every second pixel; its last chunk is not full.
  Geometry strided{3, 5, 6, 13, 13, 1, 1, 2, 2};
  check(strided, blocks(rows - 1, 2, false));
  // Kernel and padding with different sides; channels that do not fill their tap.
  Geometry uneven{1, 7, 5, 11, 16, 5, 2};
  uneven.top = 2, uneven.bottom = 1, uneven.right = 1;
  check(uneven, blocks(3, 1));
  // The first layer of many networks.
  Geometry stem{1, 16, 14, 3, 8, 7, 7, 2, 2};
  stem.top = stem.left = stem.bottom = stem.right = 3;
  check(stem, blocks(rows + 1, 3));
  // Dilated, out of a larger tensor; a stage holds parts of two taps.
  Geometry dilated{2, 9, 8, 20, 24, 3, 3, 1, 2, 2, 3, 2, 3, 2, 3, 16, 8, 40};
  check(dilated, blocks(rows, 4));
  // Lines and columns of one pixel, whose strides do not count.
  check({2, 1, 19, 8, 8, 1, 3, 1, 2, 1, 1, 0, 2, 0, 1}, blocks(9, 1));
  check({1, 19, 1, 8, 8, 3, 1, 1, 1, 1, 1, 1, 0, 1, 0}, blocks(9, 1));
  // Windows without a pixel of the image.
  check({2, 3, 2, 8, 8, 2, 2, 1, 1, 1, 1, 4, 3, 2, 4}, blocks(9, 1));
  // Lines that no window reaches, though columns past k would.
  Geometry unseen{1, 3, 9, 8, 8, 1, 3};
  unseen.bottom = -2;
  check(unseen, blocks(9, 1));
  // Images of one output pixel, a tile of many of them; more than a tile of them.
  check({tokens + 3, 3, 3, 8, 8, 3, 3}, blocks(rows, 2));
  // Stages inside a tap; tiles in parts, with the same bits whoever comes last.
  Geometry deep{1, 1, tokens + 4, 72, 72, 1, 5};
  check(deep, blocks(rows + 8, 5));
  Case parts = blocks(rows, 4);
  parts.fractions = true;
  const auto bits = check(deep, parts);
  parts.order = 2;
  CHECK(check(deep, parts) == bits);
  // A launch that starts in the middle of the second image.
  Case rest = blocks(rows, 2);
  rest.cut = 35 + 9;
  check(same, rest);
  // Epilogues.
  for (const bool first : {false, true}) {
    Case c = blocks(rows - 3, 2);
    c.activation = first ? cuda::kRelu6 : cuda::kSilu;
    c.bias = c.residual = true, c.residual_first = first, c.y_pad = first ? 3 : 5;
    check(strided, c);
  }
}

// Quotients around every multiple, and at the end of the range.
void test_divider() {
  std::mt19937 random(1);
  std::vector<int64_t> divisors = {1, 2, 3, 5, 7, 8, 9, 49, 64, 576, 641, 65535, 65536, 65537};
  for (int i = 0; i < 31; ++i)
    divisors.push_back(int64_t{1} << i), divisors.push_back((int64_t{1} << i) + 1);
  divisors.push_back((int64_t{1} << 31) - 1);
  for (int i = 0; i < 2000; ++i) divisors.push_back(1 + random() % ((uint32_t{1} << 31) - 1));
  for (const int64_t d : divisors) {
    const cuda::Divider divide(d);
    for (int i = 0; i < 200; ++i) {
      const int64_t most = ((int64_t{1} << 31) - 1) / d;
      const int64_t multiple = (i < 2 ? i * most : int64_t(random()) % (most + 1)) * d;
      for (int64_t n = multiple - 1; n <= multiple + 1; ++n) {
        if (n >= 0 && n < int64_t{1} << 31) CHECK(divide(uint32_t(n)) == uint32_t(n / d));
      }
    }
    CHECK(divide(0x7fffffffu) == uint32_t(0x7fffffff / d));
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string only = argc > 1 ? argv[1] : "";
  const auto wanted = [&](const std::string& name) {
    return only.empty() || name.find(only) != std::string::npos;
  };
  test_divider();
#define SK_CONV_NM_TILE(...) SK_TEST_NM(test_tile, __VA_ARGS__)
#define SK_CONV_BSR_TILE(...) SK_TEST_BSR(test_tile, __VA_ARGS__)
#include "cuda/tiles.inc"
  return 0;
}
