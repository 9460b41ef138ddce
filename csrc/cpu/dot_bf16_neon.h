// What the kernels with `bfdot` share: it adds the products of two neighbouring bf16 pairs to a
// float, so the panel of activations holds 32-bit words of two columns.
//
// Unless a program asks for FEAT_EBF16, `bfdot` rounds twice, the sum of the two (exact) products
// and its addition to the float, both times to odd: an error of up to one unit in the last place
// where round to nearest has half of one. Half as many roundings as with multiply-adds make up for
// that. Subnormal numbers count as zero.
#pragma once
#include "cpu/simd_neon.h"
#include "cpu/tiles.h"

namespace sk {
namespace {

// One lane of four words of weights, as Neon::Lane.
struct WordLane {
  bfloat16x8_t four;
  int lane;
};

template <int kRows>
WordLane word_lane(const bf16* pairs, int row) {
  return {vreinterpretq_bf16_u32(Neon::load_pairs<kRows>(pairs + row / 4 * 8)), row % 4};
}

inline float32x4_t dot_bf16(WordLane w, bfloat16x8_t x, float32x4_t sum) {
  switch (w.lane) {  // decided when compiling
    case 0:
      return vbfdotq_laneq_f32(sum, x, w.four, 0);
    case 1:
      return vbfdotq_laneq_f32(sum, x, w.four, 1);
    case 2:
      return vbfdotq_laneq_f32(sum, x, w.four, 2);
    default:
      return vbfdotq_laneq_f32(sum, x, w.four, 3);
  }
}

inline bfloat16x8_t load_pairs_of_tokens(const float* x) {
  return vreinterpretq_bf16_f32(vld1q_f32(x));
}

// For each 4 tokens and each 8 columns (the last of them zero where they are past k): emit(first
// pair of columns, counted from column0, vector of tokens, the 4 tokens' words of each of the four
// pairs). A tap of a convolution has a multiple of 8 columns.
template <class Emit>
void for_token_words(const MatmulCall& call, int64_t token0, int vectors, int64_t column0,
                     int64_t column1, Emit emit) {
  constexpr int L = Neon::kLanes;
  for_segments(call, column0, column1, [&](const Segment& segment) {
    for (int i = 0; i < vectors; ++i) {
      const bf16* rows[L];
      row_addresses(call, token0 + int64_t(i) * L, segment, L, rows);
      for (int64_t c = 0; c < segment.end - segment.begin; c += 2 * L) {
        const int64_t loaded = std::clamp<int64_t>(segment.filled - segment.begin - c, 0, 2 * L);
        float32x4_t v[L];
        for (int t = 0; t < L; ++t) {
          if (!rows[t] || loaded < 2 * L) {
            bf16 padded[2 * L] = {};
            if (rows[t]) std::copy_n(rows[t] + c, loaded, padded);
            v[t] = vreinterpretq_f32_u32(Neon::load_words(padded));
          } else {
            v[t] = vreinterpretq_f32_u32(Neon::load_words(rows[t] + c));
          }
        }
        Neon::transpose(v);
        emit((segment.begin - column0 + c) / 2, i, v);
      }
    }
  });
}

}  // namespace
}  // namespace sk
