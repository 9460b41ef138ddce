// 2:4 in bf16 with `vdpbf16ps`: the dot product of the two weights a row kept and their activations,
// which group_pairs.h lays side by side.
#include "cpu/conv2d_nm_lanes.h"
#include "cpu/dot_bf16.h"
#include "cpu/group_pairs.h"

namespace sk {
namespace {

// Which of the six pairs each of the 16 rows of a panel kept in a group: its word's nibbles as bytes,
// row by row, looked up in the table.
inline void pairs_of_rows(uint64_t word, uint8_t* pairs) {
  // Bytes 0 to 3 of the shifted word hold the rows 0, 4, 8, 12, then 1, 5, ..., 2, ... and 3, ...
  const __m128i place = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  alignas(16) static constexpr auto kTable = [] {
    std::array<uint8_t, 16> table{};
    for (int nibble = 0; nibble < 16; ++nibble)
      table[size_t(nibble)] = uint8_t(pair_table() >> (4 * nibble) & 15);
    return table;
  }();
  const __m128i shifted = _mm_srlv_epi64(_mm_set1_epi64x(int64_t(word)), _mm_set_epi64x(4, 0));
  const __m128i nibbles = _mm_shuffle_epi8(_mm_and_si128(shifted, _mm_set1_epi8(15)), place);
  const __m128i table = _mm_load_si128(reinterpret_cast<const __m128i*>(kTable.data()));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(pairs), _mm_shuffle_epi8(table, nibbles));
}

// Rows with a position of their own find it among `pairs`; where four share one, taking it from its
// word costs less than bytes for all.
template <int kRows, int kShare, int kVectors>
void dot_micro(const uint64_t* words, const uint8_t* pairs, const bf16* values, int row,
               int64_t groups, const float* x, float* acc, bool first) {
  constexpr int kWidth = kVectors * 16;
  constexpr uint64_t kTable = pair_table();
  __m512 sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) sum[r][i] = _mm512_setzero_ps();
  }
  for (int64_t g = 0; g < groups; ++g, x += kPairs * kWidth, values += 2 * kRows16) {
#pragma GCC unroll 8
    for (int q = 0; q < kRows; q += kShare) {
      const uint64_t pair = kShare == 1
                                ? pairs[g * kRows16 + row + q]
                                : kTable >> (4 * (words[g] >> nibble_shift(row + q) & 15)) & 15;
      const float* from = x + pair * kWidth;
      for (int r = q; r < q + kShare; ++r) {
        const __m512i w = broadcast_word(values + (row + r) * 2);
#pragma GCC unroll 16
        for (int i = 0; i < kVectors; ++i) sum[r][i] = dot_bf16(w, from + i * 16, sum[r][i]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) add_block<Avx512, kVectors>(acc + r * kWidth, sum[r], first);
}

// Rows in the lanes (nm_lanes.h): a byte shuffle fetches a row's two activations.
struct DotLanes {
  using Isa = Avx512;
  using Element = bf16;
  using Packed = bf16;
  static constexpr int kBlockGroups = 128;  // the result is rounded to bf16: longer sums will do
  struct Group {
    __m512i values, control;
    Group(const uint64_t* words, const bf16* from, int)
        : values(_mm512_loadu_si512(from)),
          control(_mm512_permutexvar_epi32(Avx512::row_nibbles(words, 0), shuffle_table())) {}
  };
  static void mac(const Group& w, const bf16* four, __m512& even, __m512&) {
    int64_t word;
    std::memcpy(&word, four, 8);
    const __m512i kept = _mm512_shuffle_epi8(_mm512_set1_epi64(word), w.control);
    even = _mm512_dpbf16_ps(even, (__m512bh)w.values, (__m512bh)kept);
  }
  static bf16 convert(bf16 x) { return x; }

  // Bytes of the group that a nibble position0 | position1 << 2 keeps.
  static __m512i shuffle_table() {
    alignas(64) static constexpr auto kTable = [] {
      std::array<uint32_t, 16> table{};
      for (uint32_t nibble = 0; nibble < 16; ++nibble) {
        const uint32_t first = 2 * (nibble & 3), second = 2 * (nibble >> 2);
        table[nibble] = first | (first + 1) << 8 | second << 16 | (second + 1) << 24;
      }
      return table;
    }();
    return _mm512_load_si512(kTable.data());
  }
};

// The dot product's latency is higher than a multiply-add's: at least twelve independent sums.
constexpr int rows_at_once(int vectors) { return vectors <= 3 ? 8 : 4; }

class NmDotKernel {
 public:
  using Extra = NmExtra<DotLanes>;

  explicit NmDotKernel(const PackedWeight& weight)
      : h_(*weight.header),
        r_(nm_rows16(h_)),
        words_(weight.indices<uint64_t>()),
        values_(weight.values<bf16>()),
        extra_(weight, r_) {}

  TileShape shape() const {
    return {kMaxVectors,   r_.panels,      kRows16,
            r_.groups * 4, kPairs * 2 / 4, share() == 4 ? 4 * kNmBlockColumns : kNmBlockColumns,
            Extra::kMost};
  }

  void pack(const MatmulCall& call, int64_t token0, int vectors, int64_t column0, int64_t column1,
            float* panel) const {
    const int64_t width = 16 * int64_t(vectors);
    const __m512i low = _mm512_set1_epi32(0xffff), high = _mm512_set1_epi32(int(0xffff0000u));
    for_token_words(
        call, token0, vectors, column0, column1, [&](int64_t pair, int i, __m512i a, __m512i b) {
          float* to = panel + pair / 2 * kPairs * width + int64_t(i) * 16;
          const __m512i a_low = _mm512_and_si512(a, low), a_high = _mm512_srli_epi32(a, 16);
          const __m512i b_low = _mm512_slli_epi32(b, 16), b_high = _mm512_and_si512(b, high);
          const __m512i words[kPairs] = {a,
                                         _mm512_or_si512(a_low, b_low),
                                         _mm512_or_si512(a_high, b_low),
                                         _mm512_or_si512(a_low, b_high),
                                         _mm512_or_si512(a_high, b_high),
                                         b};
          for (int p = 0; p < kPairs; ++p) _mm512_storeu_si512(to + p * width, words[p]);
        });
  }

  const Extra& extra() const { return extra_; }

  void compute(int64_t panel0, int64_t panel1, int64_t column0, int64_t column1, const float* x,
               int vectors, float* acc) const {
    const int64_t group0 = column0 / 4, groups = (column1 - column0) / 4;
    const int rows = rows_at_once(vectors);
    const std::make_integer_sequence<int, kMaxVectors> widths{};
    Micro* const micro = (share() == 4 ? make<4>(widths) : make<1>(widths))[size_t(vectors - 1)];
    for (int64_t p = panel0; p < panel1; ++p) {
      const uint64_t* words = words_ + p * r_.words + group0;
      const bf16* values = values_ + (p * r_.pairs + group0) * 2 * kRows16;
      const int64_t next = r_.pairs * 2 * kRows16,
                    segment = groups * 2 * kRows16 * int64_t(sizeof(bf16));
      uint8_t pairs[kNmBlockColumns / 4 * kRows16];
      if (share() == 1) {
        for (int64_t g = 0; g < groups; ++g) pairs_of_rows(words[g], pairs + g * kRows16);
      }
      for (int row = 0; row < kRows16; row += rows) {
        prefetch<false>(values + next, segment * row / kRows16, segment * (row + rows) / kRows16);
        if (row == 0) prefetch<false>(words + r_.words, 0, groups * 8);
        micro(words, pairs, values, row, groups, x, acc, column0 == 0);
        acc += int64_t(rows) * vectors * 16;
      }
    }
  }

 private:
  using Micro = void(const uint64_t*, const uint8_t*, const bf16*, int, int64_t, const float*,
                     float*, bool);
  static constexpr int kMaxVectors = 6;

  template <int kShare, int... kIndex>
  static std::array<Micro*, kMaxVectors> make(std::integer_sequence<int, kIndex...>) {
    return {&dot_micro<rows_at_once(kIndex + 1), kShare, kIndex + 1>...};
  }
  int share() const { return h_.pattern.vector >= 4 ? 4 : 1; }

  const PackedHeader& h_;
  NmRows16 r_;
  const uint64_t* words_;
  const bf16* values_;
  Extra extra_;
};

void run(const MatmulCall& call) { run_tiles<Avx512, bf16>(call, NmDotKernel(call.weight)); }

// A pair of columns an instruction; laying out six words for four columns costs more than a copy.
double cost_us(const Problem& p) {
  return p.pattern.vector >= 4 ? tile_cost_us<Avx512>(p, 3.3, 0.3)
                               : tile_cost_us<Avx512>(p, 2.45, 0.8);
}
// A shuffle and a dot product for two columns.
double dot_lanes_cost_us(const Problem& p) { return lanes_cost_us<Avx512>(p, 7.8); }
// Vectors of rows that share their positions gain more with tokens in the lanes.
double dot_pixels_cost_us(const Problem& p) {
  return lanes_cost_us<Avx512>(p, p.pattern.vector >= 4 ? 6.8 : 7.8);
}

}  // namespace

SK_MATMUL_AND_CONV2D(nm_rows16_bf16_avx512bf16, only_2_of_4, cost_us, run,
                     "tokens in lanes, dot products of pairs")
extern const KernelFunctions matmul_nm_rows16_bf16_avx512bf16_lanes;
const KernelFunctions matmul_nm_rows16_bf16_avx512bf16_lanes{
    only_2_of_4, dot_lanes_cost_us, run_nm_lanes<DotLanes>,
    "rows in lanes, a shuffle for each dot product"};

extern const KernelFunctions conv2d_nm_rows16_bf16_avx512bf16_lanes;
const KernelFunctions conv2d_nm_rows16_bf16_avx512bf16_lanes{
    only_2_of_4, dot_pixels_cost_us, NmPixels<DotLanes>::run, "rows in lanes"};

}  // namespace sk
