// 2:4 in f32, many tokens, rows without common positions: two rows share the loads of x where they
// can.
//
// One load of x per multiply-add is more than the load ports give: a core does about 6 random loads
// in the time of 8 multiply-adds. Two rows of a random 2:4 have half their columns in common, and
// among 16 rows partners can be found that have more (18 of 32 is usual); the packed weight lists
// what a pair shares and what stands alone (layout/nm_rows16.h). The counts are the same for the 8
// pairs of a panel, so the ends of the two loops are predicted.
#pragma once
#include "cpu/matmul_nm.h"

namespace sk {
namespace {

template <class S, int kVectors>
void pair_micro(const uint8_t* list, int shared, int alone, const float* values, const float* x,
                float* acc, bool first) {
  using V = typename S::V;
  constexpr int L = S::kLanes, kWidth = kVectors * L;
  const int a = list[0] & 15, b = list[0] >> 4;
  V sum_a[kVectors], sum_b[kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; ++i) sum_a[i] = sum_b[i] = S::zero();
  // An entry's column is its upper six bits; its slot is 2 * (column / 4) + one of the lower two.
  const auto weight = [values](uint64_t entry, int bit, int row) {
    return S::set1(values[((entry >> 4) * 2 + (entry >> bit & 1)) * kRows16 + uint64_t(row)]);
  };
  const auto both = [&](uint64_t entry) {
    const float* from = x + (entry >> 2) * kWidth;
    const V w_a = weight(entry, 1, a), w_b = weight(entry, 0, b);
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) {
      const V v = S::in_register(S::load(from + i * L));
      sum_a[i] = S::fma(w_a, v, sum_a[i]);
      sum_b[i] = S::fma(w_b, v, sum_b[i]);
    }
  };
  const auto one = [&](uint64_t entry, int row, V(&sum)[kVectors]) {
    const float* from = x + (entry >> 2) * kWidth;
    const V w = weight(entry, 1, row);
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) sum[i] = S::fma(w, S::load(from + i * L), sum[i]);
  };
  // Both counts are even. Two steps a turn: the ends of shorter loops are predicted.
  ++list;
  for (int s = 0; s < shared; s += 2, list += 2) {
    both(list[0]);
    both(list[1]);
  }
  for (int s = 0; s < alone; s += 2, list += 4) {
    one(list[0], a, sum_a);
    one(list[1], b, sum_b);
    one(list[2], a, sum_a);
    one(list[3], b, sum_b);
  }
  add_block<S, kVectors>(acc + a * kWidth, sum_a, first);
  add_block<S, kVectors>(acc + b * kWidth, sum_b, first);
}

template <class S>
class NmPairsKernel {
 public:
  using Extra = NmExtra<FmaLanes<S, float>>;

  explicit NmPairsKernel(const PackedWeight& weight)
      : r_(nm_rows16(*weight.header)),
        blocks_(ceil_div(weight.header->k, kPairColumns)),
        lists_(weight.section<uint8_t>(weight.header->order_offset)),
        values_(weight.values<float>()),
        extra_(weight, r_) {}

  TileShape shape() const {
    return {nm_max_vectors<S>(1), r_.panels, kRows16, r_.groups * 4, 2, kPairColumns, Extra::kMost};
  }

  void pack(const MatmulCall& call, int64_t token0, int vectors, int64_t column0, int64_t column1,
            float* panel) const {
    pack_tokens<S, float>(call, token0, vectors, column0, column1, panel);
  }

  const Extra& extra() const { return extra_; }

  void compute(int64_t panel0, int64_t panel1, int64_t column0, int64_t column1, const float* x,
               int vectors, float* acc) const {
    const Micro* micro =
        table(std::make_integer_sequence<int, nm_max_vectors<S>(1)>{})[size_t(vectors - 1)];
    const int64_t block = column0 / kPairColumns, slots = (column1 - column0) / 2;
    for (int64_t p = panel0; p < panel1; ++p, acc += int64_t(kRows16) * vectors * S::kLanes) {
      const uint8_t* lists = lists_ + (p * blocks_ + block) * kPairBlockBytes;
      const float* values = values_ + (p * r_.pairs * 2 + column0 / 2) * kRows16;
      const int shared = lists[0];
      for (int q = 0; q < kPairsPerPanel; ++q) {
        const int64_t share = slots * kRows16 * 4 / kPairsPerPanel;
        prefetch(values + r_.pairs * 2 * kRows16, q * share, (q + 1) * share);
        prefetch(lists + blocks_ * kPairBlockBytes, q * kPairListBytes, (q + 1) * kPairListBytes);
        micro(lists + 8 + q * kPairListBytes, shared, int(slots) - shared, values, x, acc,
              column0 == 0);
      }
    }
  }

 private:
  using Micro = void(const uint8_t*, int, int, const float*, const float*, float*, bool);

  template <int... kIndex>
  static std::array<Micro*, sizeof...(kIndex)> table(std::integer_sequence<int, kIndex...>) {
    return {&pair_micro<S, kIndex + 1>...};
  }

  NmRows16 r_;
  int64_t blocks_;
  const uint8_t* lists_;
  const float* values_;
  Extra extra_;
};

template <class S>
void run_nm_pairs(const MatmulCall& call) {
  run_tiles<S, float>(call, NmPairsKernel<S>(call.weight));
}

inline std::string only_with_pairs(const Problem& p) {
  return p.format == kNmRows16 && has_pairs(p.pattern, p.dtype)
             ? ""
             : "pairs of rows are listed in nm_rows16 for 2:4 without vectors";
}

// Two sums a vector and two loops a pair: narrow tiles suffer more than in the plain kernel.
template <class S>
double pairs_cost_us(const Problem& p) {
  return tile_cost_us<S>(p, 1.9, 1.5);
}

}  // namespace
}  // namespace sk
