// 2:4 in f32, many tokens, rows without common positions: four rows share the loads of x where they
// can.
//
// One load of x per multiply-add is more than the load ports give. Of a random 2:4's columns four rows
// keep 15 in 16 between them, two in five of these by three rows or all: read once for whoever keeps
// it, x is loaded 77 times for 128 multiply-adds, where two rows (matmul_nm_pairs.h) need 92. The
// lists of the packed weight (layout/nm_quads.h) say which; their lengths are the same for a whole
// block and nearly always for the whole weight, so the ends of the loops are predicted.
#pragma once
#include "cpu/matmul_nm.h"
#include "layout/nm_quads.h"

namespace sk {
namespace {

// sum[row] += weight x[column] for each of `kRow`, rows of the quad; `kBits` low bits of the entry are
// the slots.
template <class S, int kVectors, int kBits, int... kRow>
void quad_step(uint64_t entry, const float* const (&values)[4], const float* x,
               typename S::V (&sum)[4][kVectors]) {
  using V = typename S::V;
  constexpr int L = S::kLanes, kCount = sizeof...(kRow), kRows[] = {kRow...};
  const float* from = x + (entry >> kBits) * (kVectors * L);
  const uint64_t slot = (entry >> (kBits + 2)) * 2;  // the first of the column's group
  V w[kCount];
#pragma GCC unroll 4
  for (int r = 0; r < kCount; ++r)
    w[r] = S::set1(values[kRows[r]][(slot + (entry >> r & 1)) * kRows16]);
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; ++i) {
    V v = S::load(from + i * L);
    if (kCount > 1) v = S::in_register(v);
#pragma GCC unroll 4
    for (int r = 0; r < kCount; ++r) sum[kRows[r]][i] = S::fma(w[r], v, sum[kRows[r]][i]);
  }
}

template <class S, int kVectors>
void quad_micro(const QuadList& list, const float* values, const float* x, float* acc, bool first) {
  constexpr int kWidth = kVectors * S::kLanes;
  const int rows[4] = {list.rows & 15, list.rows >> 4 & 15, list.rows >> 8 & 15, list.rows >> 12};
  const float* const row_values[4] = {values + rows[0], values + rows[1], values + rows[2],
                                      values + rows[3]};
  typename S::V sum[4][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) sum[r][i] = S::zero();
  }
  const uint8_t* entry = list.entries;
  const auto word = [&](int at) {
    uint16_t value;
    std::memcpy(&value, entry + 2 * at, 2);
    return uint64_t(value);
  };
  for (int n = list.all; n > 0; --n, entry += 2)
    quad_step<S, kVectors, 4, 0, 1, 2, 3>(word(0), row_values, x, sum);
  for (int n = list.threes; n > 0; --n, entry += 8) {
    quad_step<S, kVectors, 4, 0, 1, 2>(word(0), row_values, x, sum);
    quad_step<S, kVectors, 4, 0, 1, 3>(word(1), row_values, x, sum);
    quad_step<S, kVectors, 4, 0, 2, 3>(word(2), row_values, x, sum);
    quad_step<S, kVectors, 4, 1, 2, 3>(word(3), row_values, x, sum);
  }
  for (int n = list.twos; n > 0; --n, entry += 6) {
    quad_step<S, kVectors, 2, 0, 1>(entry[0], row_values, x, sum);
    quad_step<S, kVectors, 2, 2, 3>(entry[1], row_values, x, sum);
    quad_step<S, kVectors, 2, 0, 2>(entry[2], row_values, x, sum);
    quad_step<S, kVectors, 2, 1, 3>(entry[3], row_values, x, sum);
    quad_step<S, kVectors, 2, 0, 3>(entry[4], row_values, x, sum);
    quad_step<S, kVectors, 2, 1, 2>(entry[5], row_values, x, sum);
  }
  for (int n = list.ones; n > 0; --n, entry += 4) {
    quad_step<S, kVectors, 2, 0>(entry[0], row_values, x, sum);
    quad_step<S, kVectors, 2, 1>(entry[1], row_values, x, sum);
    quad_step<S, kVectors, 2, 2>(entry[2], row_values, x, sum);
    quad_step<S, kVectors, 2, 3>(entry[3], row_values, x, sum);
  }
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) add_block<S, kVectors>(acc + rows[r] * kWidth, sum[r], first);
}

template <class S>
class NmQuadsKernel {
 public:
  using Extra = NmExtra<FmaLanes<S, float>>;

  explicit NmQuadsKernel(const PackedWeight& weight)
      : r_(nm_rows16(*weight.header)),
        blocks_(ceil_div(weight.header->k, kQuadColumns)),
        lists_(weight.section<QuadList>(weight.header->order_offset)),
        values_(weight.values<float>()),
        extra_(weight, r_) {}

  TileShape shape() const {
    // A block of x is to leave room in L1 for the weights and sums that pass by.
    const int vectors = cpu_info().l1d_bytes < 48 << 10 ? 5 : kMaxVectors;
    return {vectors, r_.panels, kRows16, r_.groups * 4, 2, kQuadColumns, Extra::kMost};
  }

  void pack(const MatmulCall& call, int64_t token0, int vectors, int64_t column0, int64_t column1,
            float* panel) const {
    pack_tokens<S, float>(call, token0, vectors, column0, column1, panel);
  }

  const Extra& extra() const { return extra_; }

  void compute(int64_t panel0, int64_t panel1, int64_t column0, int64_t column1, const float* x,
               int vectors, float* acc) const {
    const Micro* micro = table(std::make_integer_sequence<int, kMaxVectors>{})[size_t(vectors - 1)];
    const int64_t block = column0 / kQuadColumns, segment = (column1 - column0) / 2 * kRows16 * 4;
    for (int64_t p = panel0; p < panel1; ++p, acc += int64_t(kRows16) * vectors * S::kLanes) {
      const QuadList* list = lists_ + (p * blocks_ + block) * kQuadsPerPanel;
      const float* values = values_ + (p * r_.pairs * 2 + column0 / 2) * kRows16;
      for (int q = 0; q < kQuadsPerPanel; ++q, ++list) {
        prefetch(values + r_.pairs * 2 * kRows16, segment * q / kQuadsPerPanel,
                 segment * (q + 1) / kQuadsPerPanel);
        prefetch(list + blocks_ * kQuadsPerPanel, 0, int64_t(sizeof *list));
        micro(*list, values, x, acc, column0 == 0);
      }
    }
  }

 private:
  using Micro = void(const QuadList&, const float*, const float*, float*, bool);
  static constexpr int kMaxVectors = 6;  // 24 sums, four weights and x fill 32 registers

  template <int... kIndex>
  static std::array<Micro*, sizeof...(kIndex)> table(std::integer_sequence<int, kIndex...>) {
    return {&quad_micro<S, kIndex + 1>...};
  }

  NmRows16 r_;
  int64_t blocks_;
  const QuadList* lists_;
  const float* values_;
  Extra extra_;
};

template <class S>
void run_nm_quads(const MatmulCall& call) {
  run_tiles<S, float>(call, NmQuadsKernel<S>(call.weight));
}

template <class S>
double quads_cost_us(const Problem& p) {
  return tile_cost_us<S>(p, 1.9, 1.0);
}

}  // namespace
}  // namespace sk
