// How a convolution runs with rows of W in the lanes: output pixels come one at a time, so that x is
// read where it lies (an indirect convolution: Dukhan, arXiv 1907.02129) and y is written as it is
// summed, without transposing, and no lane is idle however many pixels there are.
//
//   for each chunk of units of W   their weights stay in L2
//     for each tile of pixels      the addresses of their taps are found once
//       for each unit              its weights stream by; a sum for each pixel and row in registers
#pragma once
#include <algorithm>
#include <cstdint>

#include "cpu/tiles.h"
#include "layout/nm_rows16.h"

namespace sk {
namespace {

// Where a tile's pixels find the channels of each tap. A kernel reads `unit` channels at a time: the
// last ones, where they are no whole unit, are copied and filled up with zeros.
template <class T>
class Pixels {
 public:
  Pixels(const MatmulCall& call, int64_t columns, int64_t unit, int most)
      : call_(call), columns_(columns), most_(most) {
    const int64_t taps = call.conv ? call.conv->kernel_height * call.conv->kernel_width : 1;
    tap_columns_ = columns / taps;  // with several taps k needs no padding
    const int64_t channels = call.conv ? call.conv->in_channels : call.k;
    whole_ = channels / unit * unit;
    tail_ = tap_columns_ - whole_;
    thread_local Scratch addresses, numbers;
    // A pointer takes two floats; zeros come first.
    heads_ = reinterpret_cast<const T**>(addresses.get(4 * taps * most));
    tails_ = heads_ + taps * most;
    zeros_ = reinterpret_cast<T*>(numbers.get(whole_ + tail_ * (taps * most + 1)));
    copies_ = zeros_ + whole_ + tail_;
    std::fill(zeros_, copies_, T{});
  }

  void start(int64_t first, int count) {
    for_segments(call_, 0, columns_, [&](const Segment& s) {
      const T** heads = heads_ + s.tap * most_;
      const T** tails = tails_ + s.tap * most_;
      row_addresses(call_, first, s, count, heads);
      for (int t = 0; t < count; ++t) {
        if (!heads[t]) heads[t] = zeros_;
        tails[t] = heads[t] == zeros_ || tail_ == 0 ? heads[t] : copy_tail(heads[t], s, t) - whole_;
      }
    });
  }

  // Addresses of the pixels' channel 0 at a tap, to read `unit` channels from `channel` on.
  const T* const* tap(int64_t tap, int64_t channel) const {
    return (channel < whole_ ? heads_ : tails_) + tap * most_;
  }
  int64_t tap_columns() const { return tap_columns_; }
  int64_t whole() const { return whole_; }

 private:
  const T* copy_tail(const T* row, const Segment& s, int t) {
    T* const copy = copies_ + (s.tap * most_ + t) * tail_;
    T* const end = std::copy(row + whole_, row + (s.filled - s.begin), copy);
    std::fill(end, copy + tail_, T{});
    return copy;
  }

  const MatmulCall& call_;
  const int64_t columns_;
  const int most_;
  int64_t tap_columns_, whole_, tail_;
  const T **heads_, **tails_;
  T *zeros_, *copies_;
};

// Calls compute(pixels, first pixel, how many, unit of W) for all of them, a share per thread: of the
// pixels, unless there are so few that shares of the units are clearly more even. Tiles have at most
// `most` pixels, units of W take about unit_bytes.
template <class T, class Compute>
void run_pixels(const MatmulCall& call, int64_t columns, int64_t channels_at_once, int most,
                int64_t units, int64_t unit_bytes, Compute compute) {
  const int64_t tiles = ceil_div(call.m, most), threads = call.threads;
  const auto first_pixel = [&](int64_t tile) { return call.m * tile / tiles; };
  // Units of blocks differ in length, and all threads find the addresses of all pixels.
  const bool split_units =
      double(ceil_div(units, threads) * tiles) * 1.1 < double(units * ceil_div(tiles, threads));
  const int64_t shares = split_units ? std::min(4 * threads, units) : std::min(threads, tiles);
  const int64_t chunk =
      std::max<int64_t>(1, cpu_info().l2_bytes / 2 / std::max<int64_t>(1, unit_bytes));
  parallel_for(int(shares), int(threads), [&](int share) {
    const int64_t unit0 = split_units ? units * share / shares : 0,
                  unit1 = split_units ? units * (share + 1) / shares : units,
                  tile0 = split_units ? 0 : tiles * share / shares,
                  tile1 = split_units ? tiles : tiles * (share + 1) / shares;
    Pixels<T> pixels(call, columns, channels_at_once, most);
    for (int64_t u0 = unit0; u0 < unit1; u0 += chunk) {
      for (int64_t tile = tile0; tile < tile1; ++tile) {
        const int64_t first = first_pixel(tile);
        const int count = int(first_pixel(tile + 1) - first);
        pixels.start(first, count);
        for (int64_t u = u0; u < std::min(unit1, u0 + chunk); ++u) compute(pixels, first, count, u);
      }
    }
  });
}

// y of `count` pixels from `first` on and 16 rows of W from `row` on.
template <class S, class T>
void store_pixels(const MatmulCall& call, int64_t first, int count, int64_t row,
                  const float* sums) {
  const Epilogue<S, T> epilogue(call);
  for (int part = 0; part < kRows16; part += S::kLanes, row += S::kLanes) {
    const int rows = int(std::min<int64_t>(S::kLanes, call.n - row));
    if (rows <= 0) break;
    const auto bias = epilogue.bias(row, rows);
    for (int t = 0; t < count; ++t)
      epilogue.store(S::load(sums + t * kRows16 + part), bias, first + t, row, rows);
  }
}

}  // namespace
}  // namespace sk
