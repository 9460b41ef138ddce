// Block-sparse bf16 with `vdpbf16ps`: a step is a pair of neighbouring columns.
#include "cpu/dot_bf16.h"
#include "cpu/matmul_bsr_lanes.h"

namespace sk {
namespace {

struct DotBf16 {
  using Isa = Avx512;
  using Element = bf16;
  static constexpr int kColumns = 2;
  static constexpr int kVectorsOfX = 1;  // two columns in a word
  template <int kRows>
  static __m512i weight(const bf16* values, int64_t step, int64_t panel_rows, int row, int) {
    return broadcast_word(values + (step * panel_rows + row) * 2);
  }
  static __m512 mac(__m512i w, const float* x, __m512 sum) { return dot_bf16(w, x, sum); }
  static void pack(const MatmulCall& call, int64_t token0, int vectors, int64_t column0,
                   int64_t column1, float* panel) {
    const int64_t width = 16 * int64_t(vectors);
    for_token_words(call, token0, vectors, column0, column1,
                    [&](int64_t pair, int i, __m512i a, __m512i b) {
                      float* to = panel + pair * width + int64_t(i) * 16;
                      _mm512_storeu_si512(to, a);
                      if (2 * pair + 2 < column1 - column0) _mm512_storeu_si512(to + width, b);
                    });
  }
};

// The same with rows in the lanes: the word of a pair of columns is broadcast from x itself.
struct DotColumns {
  using Isa = Avx512;
  using Element = bf16;
  using Weight = __m512i;
  static constexpr int kColumns = 2;
  static constexpr int kTerms = 256;  // the result is rounded to bf16: longer sums will do
  static __m512i weight(const bf16* values, int) { return _mm512_loadu_si512(values); }
  static __m512 mac(__m512i w, const bf16* x, __m512 sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)broadcast_word(x));
  }
};

std::string even_columns(const Problem& p) {
  return p.pattern.block_cols % 2 == 0
             ? ""
             : concat("needs an even number of block columns, there are ", p.pattern.block_cols);
}

std::string panels_of_16_pairs(const Problem& p) {
  const std::string refusal = panels_of_16(p);
  return refusal.empty() ? even_columns(p) : refusal;
}

double lanes_us(const Problem& p) { return bsr_lanes_cost_us<Avx512>(p) * 0.55; }
double cost_us(const Problem& p) { return bsr_cost_us<Avx512>(p) * 0.55; }

}  // namespace

SK_MATMUL_AND_CONV2D(bsr_rows_bf16_avx512bf16, even_columns, cost_us, run_bsr<DotBf16>,
                     "tokens in lanes, dot products of pairs")

SK_MATMUL_AND_CONV2D(bsr_rows_bf16_avx512bf16_lanes, panels_of_16_pairs, lanes_us,
                     BsrLanes<DotColumns>::run, "rows in lanes, dot products of pairs")

}  // namespace sk
