// Where the rows of x lie: in a matrix, or, for a convolution, gathered from images. A tile's panel is
// built from them block by block, so that the im2col matrix never exists as a whole.
#pragma once
#include <algorithm>
#include <cstdint>

#include "dispatch/registry.h"

namespace sk {
namespace {

// Columns that lie side by side in every row of x: all of them, or the channels of a tap.
struct Segment {
  int64_t begin, end;
  int64_t filled;  // columns from here on are zero: behind k, or behind the last channel
  int64_t tap;
  int64_t channel;  // of `begin`
};

// Calls f(segment) for the columns [column0, column1) of the panel, in order.
template <class F>
void for_segments(const MatmulCall& call, int64_t column0, int64_t column1, F f) {
  const int64_t taps = call.conv ? call.conv->kernel_height * call.conv->kernel_width : 1;
  const int64_t length = call.k / taps, channels = call.conv ? call.conv->in_channels : call.k;
  for (Segment s{column0, 0, 0, 0, 0}; s.begin < column1; s.begin = s.end) {
    s.tap = std::min(s.begin / length, taps - 1);
    s.channel = s.begin - s.tap * length;
    s.end = s.tap == taps - 1 ? column1 : std::min(column1, (s.tap + 1) * length);
    s.filled = std::clamp(s.tap * length + channels, s.begin, s.end);
    f(s);
  }
}

// The address of column `segment.begin` in each of `most` rows from `first` on; null where the row is
// zero: past m, or outside the image.
template <class T>
void row_addresses(const MatmulCall& call, int64_t first, const Segment& segment, int most,
                   const T** rows) {
  const T* x = static_cast<const T*>(call.x);
  const int count = int(std::clamp<int64_t>(call.m - first, 0, most));
  std::fill(rows + count, rows + most, nullptr);
  if (!call.conv) {
    for (int t = 0; t < count; ++t) rows[t] = x + (first + t) * call.x_row_stride + segment.begin;
    return;
  }
  const sk_conv2d_shape& s = *call.conv;
  const int64_t across = segment.tap % s.kernel_width * s.dilation_width - s.padding_left,
                down = segment.tap / s.kernel_width * s.dilation_height - s.padding_top;
  // m is below 2^31; 32-bit divisions take a fraction of the time.
  const uint32_t row = uint32_t(first), width = uint32_t(s.out_width);
  uint32_t q = row % width, p = row / width % uint32_t(s.out_height);
  int64_t image = row / width / uint32_t(s.out_height);
  for (int t = 0; t < count;) {
    const int64_t line = p * s.stride_height + down;
    const bool inside = line >= 0 && line < s.in_height;
    const T* from = x + image * s.x_image_stride + line * s.x_line_stride + segment.channel;
    for (; t < count && q < width; ++t, ++q) {
      const int64_t place = q * s.stride_width + across;
      const bool there = inside && place >= 0 && place < s.in_width;
      rows[t] = there ? from + place * s.x_pixel_stride : nullptr;
    }
    if (q < width) break;
    q = 0;
    if (++p == uint32_t(s.out_height)) p = 0, ++image;
  }
}

}  // namespace
}  // namespace sk
