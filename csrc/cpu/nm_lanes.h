// 2:4 with 16 rows of W in the lanes: a group's four activations of a token are broadcast to all lanes, and
// a shuffle with the stored positions as control hands each row those it kept.
#pragma once
#include <algorithm>
#include <array>
#include <utility>

#include "cpu/tiles.h"
#include "layout/nm_rows16.h"

namespace sk {
namespace {

// Both slots of a pair, for the rows of one half of a panel (AVX2) or all of it (AVX-512).
template <class S>
void load_pair(const float* values, int half, typename S::V& even, typename S::V& odd) {
  even = S::load(values + half * S::kLanes);
  odd = S::load(values + kRows16 + half * S::kLanes);
}
template <class S>
void load_pair(const bf16* values, int half, typename S::V& even, typename S::V& odd) {
  const auto words = S::load_words(values + half * S::kLanes * 2);
  even = S::low_bf16(words);
  odd = S::high_bf16(words);
}

template <class S>
void load_pair(const f16* values, int half, typename S::V& even, typename S::V& odd) {
  const auto words = S::load_words(values + half * S::kLanes * 2);
  even = S::low_f16(words);
  odd = S::high_f16(words);
}

// How a group of a panel multiplies: in f32, whatever the element type T. An Op names
//   Packed        element of the packed x
//   Group         what a group of a panel holds, for the rows of one register
//   kBlockGroups  groups of a block, for which each sum starts anew: 64 terms in f32
template <class S, class T>
struct FmaLanes {
  using Isa = S;
  using Element = T;
  using Packed = float;
  static constexpr int kBlockGroups = 32;
  struct Group {
    typename S::V even, odd;
    typename S::I first, second;
    Group(const uint64_t* words, const T* values, int part) {
      load_pair<S>(values, part, even, odd);
      first = S::row_nibbles(words, part);
      second = S::shift_right_2(first);
    }
  };
  // Two sums, so that one multiply-add need not wait for the other.
  static void mac(const Group& w, const float* four, typename S::V& even, typename S::V& odd) {
    even = S::fma(w.even, S::pick4(four, w.first), even);
    odd = S::fma(w.odd, S::pick4(four, w.second), odd);
  }
  static float convert(T x) { return to_float(x); }
};

// total[token][row] += W[16 rows][..] x for a block of groups; x is [group][token][4].
template <class Op, int kTokens>
void lanes_micro(const uint64_t* words, const typename Op::Element* values, int groups,
                 const typename Op::Packed* x, float* total, bool first) {
  using S = typename Op::Isa;
  constexpr int kSums = kTokens < 4 ? 2 : 1;
  for (int part = 0; part < kRows16 / S::kLanes; ++part) {
    typename S::V sum[kTokens][kSums];
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 2
      for (auto& v : sum[t]) v = S::zero();
    }
    const auto* from = x;
    for (int g = 0; g < groups; ++g, from += 4 * kTokens) {
      const typename Op::Group w(words + g, values + g * 2 * kRows16, part);
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) Op::mac(w, from + 4 * t, sum[t][0], sum[t][kSums - 1]);
    }
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
      float* to = total + t * kRows16 + part * S::kLanes;
      const auto v = kSums == 1 ? sum[t][0] : S::add(sum[t][0], sum[t][kSums - 1]);
      S::store(to, first ? v : S::add(S::load(to), v));
    }
  }
}

// The tokens that would fill only a little of a tile's last vector, in the lanes' stead: a kernel whose
// tokens lie in the lanes takes these with rows in the lanes, while it has their weights at hand.
template <class Op>
class NmExtra {
 public:
  using T = typename Op::Element;
  using Packed = typename Op::Packed;
  static constexpr int kMost = Op::Isa::kLanes / 4;

  NmExtra(const PackedWeight& weight, const NmRows16& r)
      : r_(r), words_(weight.indices<uint64_t>()), values_(weight.values<T>()) {}

  // Columns [column0, column1) of `tokens` tokens from token0 on, as [group][token][4].
  void pack(const MatmulCall& call, int64_t token0, int tokens, int64_t column0, int64_t column1,
            float* panel) const {
    Packed* const to = reinterpret_cast<Packed*>(panel);
    const T* rows[kMost];
    for_segments(call, column0, column1, [&](const Segment& segment) {
      row_addresses(call, token0, segment, tokens, rows);
      for (int64_t c = segment.begin; c < segment.end; ++c) {
        Packed* const at = to + (c - column0) / 4 * 4 * tokens + (c - column0) % 4;
        for (int t = 0; t < tokens; ++t) {
          const bool there = rows[t] && c < segment.filled;
          at[4 * t] = Op::convert(there ? rows[t][c - segment.begin] : T{});
        }
      }
    });
  }

  // acc[panel][token][16 rows] += W x for such columns.
  void compute(int64_t panel0, int64_t panel1, int64_t column0, int64_t column1, const float* panel,
               int tokens, float* acc) const {
    const auto micro = table(std::make_integer_sequence<int, kMost>{})[size_t(tokens - 1)];
    const int64_t group0 = column0 / 4, groups = (column1 - column0) / 4;
    const Packed* const x = reinterpret_cast<const Packed*>(panel);
    for (int64_t p = panel0; p < panel1; ++p, acc += tokens * kRows16) {
      micro(words_ + p * r_.words + group0, values_ + (p * r_.pairs + group0) * 2 * kRows16,
            int(groups), x, acc, group0 == 0);
    }
  }

 private:
  using Micro = void(const uint64_t*, const T*, int, const Packed*, float*, bool);
  template <int... kIndex>
  static std::array<Micro*, kMost> table(std::integer_sequence<int, kIndex...>) {
    return {&lanes_micro<Op, kIndex + 1>...};
  }

  const NmRows16 r_;
  const uint64_t* words_;
  const T* values_;
};

}  // namespace
}  // namespace sk
