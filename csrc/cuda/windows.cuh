// Where the row of an output pixel lies in the images that a convolution sees: a column of W is a channel under a
// kernel position (a tap),
//
//     column = (r * kernel_width + s) * tap_columns + channel
//
// and its address is the sum of a part of the pixel (its window) and a part of the column. Only divisions by
// constants of the launch are left, as multiplications.
#pragma once
#include "cuda/ptx/ptx.cuh"
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

// Distances in x are counted in chunks of 16 bytes, modulo 2^32: a window may start before its image.
struct PixelParams {
  const uint4* x;   // the image of token 0
  int first_pixel;  // token 0 in it
  uint32_t image_stride, line_stride, pixel_stride;
  uint32_t in_height, in_width;
  int in_channels;
  uint32_t stride_height, stride_width, dilation_height, dilation_width;
  uint32_t padding_top, padding_left;
  Divider image_pixels, line_pixels;  // of the output
  Divider tap_columns, kernel_width;

  // `elements`: of 16 bytes.
  PixelParams(const sk_conv2d_shape& s, int64_t k, int elements)
      : x(nullptr),
        first_pixel(0),
        image_stride(s.batch > 1 ? uint32_t(s.x_image_stride / elements) : 0),
        line_stride(s.in_height > 1 ? uint32_t(s.x_line_stride / elements) : 0),
        pixel_stride(s.in_width > 1 ? uint32_t(s.x_pixel_stride / elements) : 0),
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

// Where a token's window starts, as its first tap: chunks from x, the line and the place in the image.
struct Window {
  uint32_t offset, line, place;
};

// Past m a window lies outside for every tap: those add less than 2^31.
SK_DEVICE Window window_of(const PixelParams& x, int64_t token, int t, int64_t m) {
  const uint32_t pixel = uint32_t(x.first_pixel + token) + uint32_t(t);
  const uint32_t image = x.image_pixels(pixel);
  const uint32_t rest = pixel - image * x.image_pixels.divisor, p = x.line_pixels(rest);
  const uint32_t q = rest - p * x.line_pixels.divisor;
  const uint32_t line = p * x.stride_height - x.padding_top;
  const uint32_t place = q * x.stride_width - x.padding_left;
  return {image * x.image_stride + line * x.line_stride + place * x.pixel_stride,
          token + t < m ? line : uint32_t{1} << 31, place};
}

// What a column of W adds to every window.
struct Tap {
  uint32_t offset, line, place;  // the channel is in `offset`, whole chunks of it
  int channel;

  SK_DEVICE bool inside(const PixelParams& x, const Window& w) const {
    return (w.line + line < x.in_height) & (w.place + place < x.in_width);
  }
};

template <int kElements>  // of 16 bytes
SK_DEVICE Tap tap_of(const PixelParams& x, int column) {
  const uint32_t tap = x.tap_columns(uint32_t(column));
  const uint32_t channel = uint32_t(column) - tap * x.tap_columns.divisor;
  const uint32_t r = x.kernel_width(tap), s = tap - r * x.kernel_width.divisor;
  const uint32_t line = r * x.dilation_height, place = s * x.dilation_width;
  return {line * x.line_stride + place * x.pixel_stride + channel / kElements, line, place,
          int(channel)};
}

}  // namespace sk::cuda
