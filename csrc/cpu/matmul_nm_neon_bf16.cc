// 2:4 in bf16 with `bfdot`: the dot product of the two weights a row kept and their activations,
// which group_pairs.h lays side by side.
#include "cpu/cost_neon.h"
#include "cpu/dot_bf16_neon.h"
#include "cpu/group_pairs.h"
#include "cpu/matmul_nm.h"

namespace sk {
namespace {

constexpr int kMaxVectors = 6;
// Four rows share a load of weights; 24 sums fill the registers.
constexpr int rows_at_once(int vectors) { return vectors <= 3 ? 8 : 4; }

template <int kRows, int kShare, int kVectors>
void dot_micro(const uint64_t* words, const bf16* values, int row, int64_t groups, const float* x,
               float* acc, bool first) {
  constexpr int L = Neon::kLanes, kWidth = kVectors * L;
  constexpr uint64_t kTable = pair_table();
  float32x4_t sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) sum[r][i] = Neon::zero();
  }
  values += 2 * row;
  for (int64_t g = 0; g < groups; ++g, x += kPairs * kWidth, values += 2 * kRows16) {
#pragma GCC unroll 8
    for (int q = 0; q < kRows; q += kShare) {
      const uint64_t nibble = words[g] >> nibble_shift(row + q) & 15;
      const float* from = x + (kTable >> (4 * nibble) & 15) * kWidth;
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; ++i) {
        const bfloat16x8_t pairs = load_pairs_of_tokens(from + i * L);
#pragma GCC unroll 4
        for (int r = q; r < q + kShare; ++r)
          sum[r][i] = dot_bf16(word_lane<kRows>(values, r), pairs, sum[r][i]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) add_block<Neon, kVectors>(acc + r * kWidth, sum[r], first);
}

class NmDotKernel {
 public:
  explicit NmDotKernel(const PackedWeight& weight)
      : h_(*weight.header),
        r_(nm_rows16(h_)),
        words_(weight.indices<uint64_t>()),
        values_(weight.values<bf16>()) {}

  TileShape shape() const {
    return {kMaxVectors, r_.panels, kRows16, r_.groups * 4, kPairs * 2 / 4, kNmBlockColumns};
  }

  void pack(const MatmulCall& call, int64_t token0, int vectors, int64_t column0, int64_t column1,
            float* panel) const {
    const int64_t width = int64_t(vectors) * Neon::kLanes;
    for_token_words(call, token0, vectors, column0, column1,
                    [&](int64_t pair, int i, const float32x4_t(&words)[4]) {
                      const int64_t groups =
                          std::min<int64_t>(2, (column1 - column0) / 4 - pair / 2);
                      for (int64_t g = 0; g < groups; ++g) {
                        store_pairs(words[2 * g], words[2 * g + 1], width,
                                    panel + (pair / 2 + g) * kPairs * width + int64_t(i) * 4);
                      }
                    });
  }

  void compute(int64_t panel0, int64_t panel1, int64_t column0, int64_t column1, const float* x,
               int vectors, float* acc) const {
    const int64_t group0 = column0 / 4, groups = (column1 - column0) / 4;
    const int rows = rows_at_once(vectors);
    const std::make_integer_sequence<int, kMaxVectors> widths{};
    Micro* const micro =
        (h_.pattern.vector >= 4 ? make<4>(widths) : make<1>(widths))[size_t(vectors - 1)];
    for (int64_t p = panel0; p < panel1; ++p) {
      const uint64_t* words = words_ + p * r_.words + group0;
      const bf16* values = values_ + (p * r_.pairs + group0) * 2 * kRows16;
      const int64_t next = r_.pairs * 2 * kRows16,
                    segment = groups * 2 * kRows16 * int64_t(sizeof(bf16));
      for (int row = 0; row < kRows16; row += rows) {
        prefetch(values + next, segment * row / kRows16, segment * (row + rows) / kRows16);
        if (row == 0) prefetch(words + r_.words, 0, groups * 8);
        micro(words, values, row, groups, x, acc, column0 == 0);
        acc += int64_t(rows) * vectors * Neon::kLanes;
      }
    }
  }

 private:
  using Micro = void(const uint64_t*, const bf16*, int, int64_t, const float*, float*, bool);

  template <int kShare, int... kIndex>
  static std::array<Micro*, kMaxVectors> make(std::integer_sequence<int, kIndex...>) {
    return {&dot_micro<rows_at_once(kIndex + 1), kShare, kIndex + 1>...};
  }

  // Columns (0, 1) and (2, 3) of a group for 4 tokens to its six pairs.
  static void store_pairs(float32x4_t low, float32x4_t high, int64_t width, float* to) {
    const uint16x8_t a = vreinterpretq_u16_f32(low), b = vreinterpretq_u16_f32(high);
    const uint16x8_t pairs[kPairs] = {a,
                                      vtrn1q_u16(a, b),
                                      vtrn1q_u16(vrev32q_u16(a), b),
                                      vtrn2q_u16(vrev32q_u16(a), b),
                                      vtrn2q_u16(a, b),
                                      b};
    for (int p = 0; p < kPairs; ++p) vst1q_f32(to + p * width, vreinterpretq_f32_u16(pairs[p]));
  }

  const PackedHeader& h_;
  NmRows16 r_;
  const uint64_t* words_;
  const bf16* values_;
};

void run(const MatmulCall& call) { run_tiles<Neon, bf16>(call, NmDotKernel(call.weight)); }

double cost_us(const Problem& p) {
  return neon_tile_cost_us(p, {2, p.pattern.vector >= 4 ? 0.25 : 1.0, 0, 6, kMaxVectors});
}

}  // namespace

SK_MATMUL_AND_CONV2D(nm_rows16_bf16_neon_bf16, only_2_of_4, cost_us, run,
                     "tokens in lanes, dot products of pairs")

}  // namespace sk
