// x of a convolution: a token is an output pixel, and its row is gathered from an image. A kernel position is a
// tap, a column of W a channel of one:
//
//     column = (r * kernel_width + s) * tap_columns + channel
//
// A chunk of 8 columns lies in one tap, and is copied whole or comes as zeros. What a token needs for that does
// not depend on the column: where its window starts. A thread works that out for one token when a tile begins and
// leaves it in shared memory, since eight tokens a thread would take the registers that the sums have. What a
// column adds is the same for every token. Only divisions by constants of the launch are left, as multiplications.
#pragma once
#include <climits>

#include "cuda/matmul_mma.cuh"
#include "sparsekit/sparsekit.h"

namespace sk::cuda {

// n / divisor for 0 <= n < 2^31, as n * factor / 2^shift. With divisor <= 2^s, the next power of two, shift is
// 31 + s and factor at most 1 above 2^shift / divisor: times n that is less than 2^31, and adds less than
// 1 / divisor to the quotient.
struct Divider {
  uint32_t divisor, factor;
  int shift;

  explicit Divider(int64_t d) : divisor(uint32_t(d)), shift(31) {
    while ((int64_t{1} << (shift - 31)) < d) ++shift;
    factor = uint32_t((uint64_t{1} << shift) / divisor + 1);
  }
  SK_DEVICE uint32_t operator()(uint32_t n) const {
    return uint32_t(uint64_t(n) * factor >> shift);
  }
};

// Distances in x are counted in chunks of 8 elements, modulo 2^32: a window may start before its image.
struct PixelParams {
  const uint16_t* x;  // the image of token 0
  int first_pixel;    // token 0 in it
  uint32_t image_stride, line_stride, pixel_stride;
  uint32_t in_height, in_width;
  int in_channels;
  uint32_t stride_height, stride_width, dilation_height, dilation_width;
  uint32_t padding_top, padding_left;
  Divider image_pixels, line_pixels;  // of the output
  Divider tap_columns, kernel_width;

  PixelParams(const sk_conv2d_shape& s, int64_t k)
      : x(nullptr),
        first_pixel(0),
        image_stride(s.batch > 1 ? uint32_t(s.x_image_stride / 8) : 0),
        line_stride(s.in_height > 1 ? uint32_t(s.x_line_stride / 8) : 0),
        pixel_stride(s.in_width > 1 ? uint32_t(s.x_pixel_stride / 8) : 0),
        in_height(uint32_t(s.in_height)),
        in_width(uint32_t(s.in_width)),
        in_channels(int(s.in_channels)),
        stride_height(uint32_t(s.stride_height)),
        stride_width(uint32_t(s.stride_width)),
        dilation_height(uint32_t(s.dilation_height)),
        dilation_width(uint32_t(s.dilation_width)),
        padding_top(uint32_t(s.padding_top)),
        padding_left(uint32_t(s.padding_left)),
        image_pixels(s.out_height * s.out_width),
        line_pixels(s.out_width),
        tap_columns(k / (s.kernel_height * s.kernel_width)),
        kernel_width(s.kernel_width) {}
};

template <class Tile>
class PixelCopier : ChunkCopier<Tile> {
  using Base = ChunkCopier<Tile>;
  using Base::each_token;

  // Where a token's window starts, as its first tap: chunks from x, the line and the place in the image.
  static constexpr int kWindowBytes = 16;

 public:
  using Params = PixelParams;
  static constexpr int kSharedBytes = Tile::kTokens * kWindowBytes;
  using Base::chunk;

  SK_DEVICE PixelCopier(const MatmulParams& p, const PixelParams& x, uint32_t shared)
      : p_(p), x_(x), windows_(shared) {}

  // The windows are there for all after the next sync_block.
  SK_DEVICE void start_tile(int64_t token) {
#pragma unroll 1
    for (int t = ptx::thread_index(); t < Tile::kTokens; t += Tile::kThreads) {
      const uint32_t pixel = uint32_t(x_.first_pixel + token) + uint32_t(t);
      const uint32_t image = x_.image_pixels(pixel);
      const uint32_t rest = pixel - image * x_.image_pixels.divisor, p = x_.line_pixels(rest);
      const uint32_t q = rest - p * x_.line_pixels.divisor;
      const uint32_t line = p * x_.stride_height - x_.padding_top;
      const uint32_t place = q * x_.stride_width - x_.padding_left;
      // Past m a window lies outside for every tap: those add less than 2^31.
      ptx::store_shared(
          windows_ + uint32_t(t * kWindowBytes),
          uint4{image * x_.image_stride + line * x_.line_stride + place * x_.pixel_stride,
                token + t < p_.epilogue.m ? line : uint32_t{1} << 31, place, 0});
    }
  }

  // `column`: of W, where this thread's chunk starts. Outside the image, behind its last channel, past k and past
  // m zeros come.
  SK_DEVICE void copy(uint32_t slot, int column) const {
    uint4 windows[Base::kCopies];  // all on their way before the first is needed
    each_token(0, [&](int i, int token, uint32_t) {
      windows[i] = ptx::load_shared<uint4>(windows_ + uint32_t(token * kWindowBytes));
    });
    const uint32_t tap = x_.tap_columns(uint32_t(column));
    const uint32_t channel = uint32_t(column) - tap * x_.tap_columns.divisor;
    const uint32_t r = x_.kernel_width(tap), s = tap - r * x_.kernel_width.divisor;
    const uint32_t line = r * x_.dilation_height, place = s * x_.dilation_width;
    const uint32_t offset = line * x_.line_stride + place * x_.pixel_stride + channel / 8;
    int bytes = (x_.in_channels - int(channel)) * 2;
    bytes = bytes < 0 || column >= p_.k ? 0 : bytes > 16 ? 16 : bytes;
    each_token(slot, [&](int i, int, uint32_t to) {
      const uint4& window = windows[i];
      // Without branches. Of no bytes the address does not matter.
      const bool inside = (window.y + line < x_.in_height) & (window.z + place < x_.in_width);
      ptx::cp_async_16(to, x_.x + int64_t{window.x + offset} * 8, inside ? bytes : 0);
    });
  }

 private:
  const MatmulParams& p_;
  const PixelParams& x_;
  const uint32_t windows_;
};

}  // namespace sk::cuda
