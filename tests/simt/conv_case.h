// A convolution as a test sees it: its geometry, its images, and the matrix that they stand for.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

#include "sparsekit/sparsekit.h"

namespace {

struct Geometry {
  int64_t batch, in_height, in_width, channels, tap;
  int64_t kernel_height, kernel_width;
  int64_t stride_height = 1, stride_width = 1, dilation_height = 1, dilation_width = 1;
  int64_t top = 0, left = 0, bottom = 0, right = 0;
  int64_t pixel_pad = 0, line_pad = 0, image_pad = 0;  // what no tap sees, in elements
  bool tight = false;  // pixels next to each other, not on multiples of 8 channels

  sk_conv2d_shape shape() const {
    sk_conv2d_shape s{};
    s.batch = batch, s.in_height = in_height, s.in_width = in_width, s.in_channels = channels;
    s.x_pixel_stride = (tight ? channels : (channels + 7) / 8 * 8) + pixel_pad;
    s.x_line_stride = in_width * s.x_pixel_stride + line_pad;
    s.x_image_stride = in_height * s.x_line_stride + image_pad;
    s.kernel_height = kernel_height, s.kernel_width = kernel_width;
    s.stride_height = stride_height, s.stride_width = stride_width;
    s.dilation_height = dilation_height, s.dilation_width = dilation_width;
    s.padding_top = top, s.padding_left = left;
    const auto out = [](int64_t in, int64_t kernel, int64_t stride, int64_t dilation) {
      return (in - dilation * (kernel - 1) - 1) / stride + 1;
    };
    s.out_height = out(in_height + top + bottom, kernel_height, stride_height, dilation_height);
    s.out_width = out(in_width + left + right, kernel_width, stride_width, dilation_width);
    return s;
  }
};

// Numbers that tests turn into elements. What no window sees is NaN.
struct Images {
  std::vector<float> memory;
  std::vector<float> dense;  // [m, k]
};

template <class Number>
Images make_numbers(const sk_conv2d_shape& s, int64_t m, int64_t k, Number number) {
  Images x;
  const auto at = [&s](int64_t image, int64_t line, int64_t place, int64_t channel) {
    return size_t(image * s.x_image_stride + line * s.x_line_stride + place * s.x_pixel_stride +
                  channel);
  };
  x.memory.assign(at(s.batch - 1, s.in_height - 1, s.in_width - 1, s.in_channels), NAN);
  std::vector<float> numbers(x.memory.size());
  for (int64_t image = 0; image < s.batch; ++image) {
    for (int64_t line = 0; line < s.in_height; ++line) {
      for (int64_t place = 0; place < s.in_width; ++place) {
        for (int64_t channel = 0; channel < s.in_channels; ++channel)
          numbers[at(image, line, place, channel)] = number();
      }
    }
  }
  const int64_t tap = k / (s.kernel_height * s.kernel_width);
  x.dense.assign(size_t(m * k), 0);
  size_t row = 0;
  for (int64_t image = 0; image < s.batch; ++image) {
    for (int64_t p = 0; p < s.out_height; ++p) {
      for (int64_t q = 0; q < s.out_width; ++q, row += size_t(k)) {
        for (int64_t r = 0; r < s.kernel_height; ++r) {
          for (int64_t t = 0; t < s.kernel_width; ++t) {
            const int64_t line = p * s.stride_height - s.padding_top + r * s.dilation_height;
            const int64_t place = q * s.stride_width - s.padding_left + t * s.dilation_width;
            if (line < 0 || line >= s.in_height || place < 0 || place >= s.in_width) continue;
            for (int64_t channel = 0; channel < s.in_channels; ++channel) {
              const size_t i = at(image, line, place, channel);
              x.memory[i] = numbers[i];
              x.dense[row + size_t((r * s.kernel_width + t) * tap + channel)] = numbers[i];
            }
          }
        }
      }
    }
  }
  return x;
}

}  // namespace
