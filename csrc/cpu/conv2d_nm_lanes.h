// 2:4 with 16 rows of W in the lanes, for convolutions (pixels.h): a group's four channels of a pixel are
// broadcast to all lanes, and a shuffle with the stored positions as control hands each row those it
// kept. matmul_nm_lanes.h does the same for rows of a matrix.
#pragma once
#include "cpu/matmul_nm_lanes.h"
#include "cpu/pixels.h"

namespace sk {
namespace {

// Consecutive groups of one tap.
template <class T>
struct Piece {
  const T* const* rows;  // of the pixels
  int64_t channel;
  int groups;
};

// sums[pixel][16 rows] += W[16 rows][the pieces' groups] x.
template <class Op, int kPixels>
void nm_pixels_micro(const uint64_t* words, const typename Op::Element* values,
                     const Piece<typename Op::Element>* pieces, int count, float* sums,
                     bool first) {
  using S = typename Op::Isa;
  constexpr int kChains = kPixels < 4 ? 2 : 1;
  for (int part = 0; part < kRows16 / S::kLanes; ++part) {
    typename S::V sum[kPixels][kChains];
#pragma GCC unroll 24
    for (int t = 0; t < kPixels; ++t) {
#pragma GCC unroll 2
      for (auto& v : sum[t]) v = S::zero();
    }
    int64_t at = 0;
    for (int i = 0; i < count; ++i) {
      const auto* const* rows = pieces[i].rows;
      int64_t channel = pieces[i].channel;
      for (int64_t end = at + pieces[i].groups; at < end; ++at, channel += 4) {
        const typename Op::Group w(words + at, values + at * 2 * kRows16, part);
#pragma GCC unroll 24
        for (int t = 0; t < kPixels; ++t)
          Op::mac(w, rows[t] + channel, sum[t][0], sum[t][kChains - 1]);
      }
    }
#pragma GCC unroll 24
    for (int t = 0; t < kPixels; ++t) {
      float* to = sums + t * kRows16 + part * S::kLanes;
      const auto v = kChains == 1 ? sum[t][0] : S::add(sum[t][0], sum[t][kChains - 1]);
      S::store(to, first ? v : S::add(S::load(to), v));
    }
  }
}

template <class Op>
class NmPixels {
 public:
  using S = typename Op::Isa;
  using T = typename Op::Element;

  explicit NmPixels(const MatmulCall& call)
      : call_(call),
        r_(nm_rows16(*call.weight.header)),
        words_(call.weight.indices<uint64_t>()),
        values_(call.weight.values<T>()) {}

  // y of the tile for a panel of 16 rows of W.
  void operator()(const Pixels<T>& pixels, int64_t first, int count, int64_t panel) const {
    const auto micro = table(std::make_integer_sequence<int, kPixels>{})[size_t(count - 1)];
    const uint64_t* words = words_ + panel * r_.words;
    const T* values = values_ + panel * r_.pairs * 2 * kRows16;
    alignas(kAlignment) float sums[kPixels * kRows16];
    Piece<T> pieces[kMaxPieces];
    for (int64_t begin = 0, end = 0; begin < r_.groups; begin = end) {
      int used = 0;
      while (end < r_.groups && used < kMaxPieces && end - begin < Op::kBlockGroups) {
        pieces[used] = piece(pixels, end, Op::kBlockGroups - int(end - begin));
        end += pieces[used++].groups;
      }
      micro(words + begin, values + begin * 2 * kRows16, pieces, used, sums, begin == 0);
    }
    store_pixels<S, T>(call_, first, count, panel * kRows16, sums);
  }

  static void run(const MatmulCall& call) {
    const NmRows16 r = nm_rows16(*call.weight.header);
    const PackedHeader& h = *call.weight.header;
    run_pixels<T>(call, r.groups * 4, 4, kPixels, r.panels, (h.bytes - h.indices_offset) / r.panels,
                  NmPixels(call));
  }

 private:
  static constexpr int kPixels = 20;  // sums beside the weights and what the shuffles need
  static constexpr int kMaxPieces = 16;
  using Micro = void(const uint64_t*, const T*, const Piece<T>*, int, float*, bool);

  // At most `most` groups from `group` on: up to the end of the tap, or to its last channels, which are
  // copies.
  Piece<T> piece(const Pixels<T>& pixels, int64_t group, int most) const {
    const int64_t tap_groups = pixels.tap_columns() / 4, whole = pixels.whole() / 4;
    const int64_t tap = group / tap_groups, in_tap = group % tap_groups;
    const int64_t left = (in_tap < whole ? whole : tap_groups) - in_tap;
    return {pixels.tap(tap, in_tap * 4), in_tap * 4, int(std::min<int64_t>(most, left))};
  }

  template <int... kIndex>
  static std::array<Micro*, kPixels> table(std::integer_sequence<int, kIndex...>) {
    return {&nm_pixels_micro<Op, kIndex + 1>...};
  }

  const MatmulCall& call_;
  const NmRows16 r_;
  const uint64_t* words_;
  const T* values_;
};

}  // namespace
}  // namespace sk
