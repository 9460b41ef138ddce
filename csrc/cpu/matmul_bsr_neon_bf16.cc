// Block-sparse bf16 with `bfdot`: a step is a pair of neighbouring columns.
#include "cpu/cost_neon.h"
#include "cpu/dot_bf16_neon.h"
#include "cpu/matmul_bsr.h"

namespace sk {
namespace {

struct DotBf16 {
  using Isa = Neon;
  using Element = bf16;
  static constexpr int kColumns = 2;
  static constexpr int kVectorsOfX = 1;  // two columns in a word
  template <int kRows>
  static WordLane weight(const bf16* values, int64_t step, int64_t panel_rows, int row, int) {
    return word_lane<kRows>(values + step * panel_rows * 2, row);
  }
  static float32x4_t mac(WordLane w, const float* x, float32x4_t sum) {
    return dot_bf16(w, load_pairs_of_tokens(x), sum);
  }
  static void pack(const MatmulCall& call, int64_t token0, int vectors, int64_t column0,
                   int64_t column1, float* panel) {
    const int64_t width = int64_t(vectors) * Neon::kLanes;
    for_token_words(call, token0, vectors, column0, column1,
                    [&](int64_t pair, int i, const float32x4_t(&words)[4]) {
                      const int64_t count = std::min<int64_t>(4, (column1 - column0) / 2 - pair);
                      for (int64_t p = 0; p < count; ++p)
                        vst1q_f32(panel + (pair + p) * width + int64_t(i) * 4, words[p]);
                    });
  }
};

std::string even_columns(const Problem& p) {
  return p.pattern.block_cols % 2 == 0
             ? ""
             : concat("needs an even number of block columns, there are ", p.pattern.block_cols);
}

double cost_us(const Problem& p) {
  const int rows = bsr_rows_at_once<Neon>(bsr_panel_rows(p.pattern.block_rows));
  return neon_tile_cost_us(p, {2, 1.0 / rows, 0, 4.0 / rows, bsr_max_vectors<Neon>(rows)});
}

}  // namespace

SK_MATMUL_AND_CONV2D(bsr_rows_bf16_neon_bf16, even_columns, cost_us, run_bsr<DotBf16>,
                     "tokens in lanes, dot products of pairs")

}  // namespace sk
