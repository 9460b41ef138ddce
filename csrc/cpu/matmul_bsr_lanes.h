// Block-sparse W with 16 of its rows in the lanes, for convolutions and for matmuls alike (pixels.h): a
// load of W for each column of a block, a broadcast from memory for each pixel.
#pragma once
#include <array>
#include <utility>

#include "cpu/matmul_bsr.h"
#include "cpu/pixels.h"

namespace sk {
namespace {

// How a column of a block multiplies, or a pair of them where they are stored as one word.
template <class S>
struct FmaColumns {
  using Isa = S;
  using Element = float;
  using Weight = typename S::V;
  static constexpr int kColumns = 1;
  static constexpr int kTerms = 64;  // of a sum; a total takes what comes after
  static Weight weight(const float* values, int part) { return S::load(values + part * S::kLanes); }
  static typename S::V mac(Weight w, const float* x, typename S::V sum) {
    return S::fma(w, S::set1(*x), sum);
  }
};

// Steps at a time, and pixels: the sums and the weights fill the registers without spilling.
template <class S>
constexpr int bsr_lanes_steps() {
  return S::kRegisters == 32 ? 4 : 1;
}
template <class S>
constexpr int bsr_lanes_pixels() {
  return S::kRegisters == 32 ? 25 : 6;
}

// sums[pixel][16 rows] += W[16 rows][`count` blocks] x.
template <class Op, int kPixels>
void bsr_lanes_micro(const uint32_t* starts, int64_t count, const typename Op::Element* values,
                     int64_t cols, const Pixels<typename Op::Element>& pixels, float* sums,
                     bool first) {
  using S = typename Op::Isa;
  constexpr int kParts = kRows16 / S::kLanes, kSteps = bsr_lanes_steps<S>(),
                kStride = kRows16 * Op::kColumns;
  typename S::V sum[kPixels][kParts];
#pragma GCC unroll 32
  for (int t = 0; t < kPixels; ++t) {
#pragma GCC unroll 2
    for (auto& v : sum[t]) v = S::zero();
  }
  const auto step = [&](auto steps, const auto* const* rows, int64_t channel) {
    constexpr int kNow = decltype(steps)::value;
    typename Op::Weight w[kNow][kParts];
#pragma GCC unroll 4
    for (int s = 0; s < kNow; ++s, values += kStride) {
#pragma GCC unroll 2
      for (int part = 0; part < kParts; ++part) w[s][part] = Op::weight(values, part);
    }
#pragma GCC unroll 32
    for (int t = 0; t < kPixels; ++t) {
      const auto* x = rows[t] + channel;
#pragma GCC unroll 4
      for (int s = 0; s < kNow; ++s) {
#pragma GCC unroll 2
        for (int part = 0; part < kParts; ++part)
          sum[t][part] = Op::mac(w[s][part], x + s * Op::kColumns, sum[t][part]);
      }
    }
  };
  for (int64_t b = 0; b < count; ++b) {
    const uint32_t tap = starts[b] / uint32_t(pixels.tap_columns());
    int64_t channel = starts[b] - tap * pixels.tap_columns();
    const auto* const* rows = pixels.tap(tap, channel);
    const int64_t end = channel + cols;
    for (; channel + kSteps * Op::kColumns <= end; channel += kSteps * Op::kColumns)
      step(std::integral_constant<int, kSteps>{}, rows, channel);
    for (; channel < end; channel += Op::kColumns)
      step(std::integral_constant<int, 1>{}, rows, channel);
  }
#pragma GCC unroll 32
  for (int t = 0; t < kPixels; ++t) {
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) {
      float* to = sums + t * kRows16 + part * S::kLanes;
      S::store(to, first ? sum[t][part] : S::add(S::load(to), sum[t][part]));
    }
  }
}

// Rows of x at this distance of which a line each fits the first-level cache: 8 ways that repeat every 4
// KiB. One way is left to W.
inline int pixels_without_conflict(int64_t stride_bytes) {
  int places = 64;  // lines of a way that the rows fall on
  for (int64_t stride = 64; stride < 4096 && stride_bytes % (2 * stride) == 0; stride *= 2)
    places /= 2;
  return 7 * places;
}

template <class Op>
class BsrLanes {
 public:
  using S = typename Op::Isa;
  using T = typename Op::Element;

  explicit BsrLanes(const MatmulCall& call)
      : call_(call),
        h_(*call.weight.header),
        crow_(call.weight.crow()),
        starts_(call.weight.indices<uint32_t>()),
        values_(call.weight.values<T>()) {}

  // y of the tile for the rows of W of a block row.
  void operator()(const Pixels<T>& pixels, int64_t first, int count, int64_t block_row) const {
    const auto micro = table(std::make_integer_sequence<int, kPixels>{})[size_t(count - 1)];
    const int64_t rows = h_.pattern.block_rows, cols = h_.pattern.block_cols;
    const int64_t begin = crow_[block_row], blocks = crow_[block_row + 1] - begin;
    const int64_t at_once = std::max<int64_t>(1, Op::kTerms / cols);
    const T* values = values_ + begin * rows * cols;
    for (int64_t panel = 0; panel < rows; panel += kRows16) {
      const int64_t row = block_row * rows + panel;
      if (row >= call_.n) break;
      alignas(kAlignment) float sums[kPixels * kRows16];
      if (blocks == 0) std::fill(sums, sums + count * kRows16, 0.0f);
      for (int64_t b = 0; b < blocks; b += at_once) {
        const int64_t now = std::min(at_once, blocks - b);
        micro(starts_ + begin + b, now, values, cols, pixels, sums, b == 0);
        values += now * cols * kRows16;
      }
      store_pixels<S, T>(call_, first, count, row, sums);
    }
  }

  static void run(const MatmulCall& call) {
    const PackedHeader& h = *call.weight.header;
    const int64_t cols = h.pattern.block_cols, units = ceil_div(h.n, h.pattern.block_rows);
    const int64_t stride = call.conv ? call.conv->x_pixel_stride : call.x_row_stride;
    const int most = std::min(kPixels, pixels_without_conflict(stride * int64_t(sizeof(T))));
    run_pixels<T>(call, round_up(call.k, cols), cols, most, units, h.bytes / units, BsrLanes(call));
  }

 private:
  static constexpr int kPixels = bsr_lanes_pixels<S>();
  using Micro = void(const uint32_t*, int64_t, const T*, int64_t, const Pixels<T>&, float*, bool);

  template <int... kIndex>
  static std::array<Micro*, kPixels> table(std::integer_sequence<int, kIndex...>) {
    return {&bsr_lanes_micro<Op, kIndex + 1>...};
  }

  const MatmulCall& call_;
  const PackedHeader& h_;
  const int32_t* crow_;
  const uint32_t* starts_;
  const T* values_;
};

inline std::string panels_of_16(const Problem& p) {
  return p.pattern.block_rows % kRows16 == 0
             ? ""
             : concat("needs block rows that are a multiple of 16, the blocks are ",
                      p.pattern.block_rows, "x", p.pattern.block_cols);
}

// Multiply-adds of whole vectors, fewer for few tokens and where rows of x compete for the sets of the
// cache.
template <class S>
double bsr_lanes_cost_us(const Problem& p) {
  const double tokens = double(p.m) + 4 * double(p.m) / std::min(double(p.m), 25.0);
  const double multiplies = tokens * double(p.n) * double(p.k) * p.kept_share() / S::kLanes;
  const bool conv = p.op == "conv2d", conflict = !conv && p.k * dtype_size(p.dtype) % 2048 == 0;
  const double rate = (S::kLanes == 16 ? conv ? 7.2e3 : 6.5e3 : 6e3) * (conflict ? 0.85 : 1);
  return std::max(weight_bytes(p) / 20e3, multiplies / rate) / p.threads + 2;
}

}  // namespace
}  // namespace sk
