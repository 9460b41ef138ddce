// N:M matmul for CPUs, written once for every instruction set (S) and element type (T).
//
// Many tokens (tiles.h): one weight is broadcast and meets a vector of tokens of its column. Where
// vectors of 4 rows or more share positions, each load of x serves four rows; other rows need a load
// for each multiply-add (matmul_nm_pairs.h does better for 2:4 in f32).
// Few tokens (decode, m <= 8): 16 rows lie in the lanes; the weights stream by once, and a
// permutation with the stored positions as control fetches each row's activation from its group.
#pragma once
#include <array>
#include <utility>

#include "cpu/nm_lanes.h"
#include "cpu/tiles.h"
#include "cpu/weights.h"
#include "layout/nm_rows16.h"

namespace sk {
namespace {

// Weight of a slot and one of kRows rows of a panel. `values` is the panel's block from the first of
// these rows on, and starts at an even slot.
template <class S, int kRows>
typename Weights<S>::One slot_weight(const float* values, int64_t slot, int row) {
  return Weights<S>::template row<kRows>(values + slot * kRows16, row);
}
template <class S, int kRows, class T>
typename Weights<S>::One slot_weight(const T* values, int64_t slot, int row) {
  return Weights<S>::template row_of_pairs<kRows>(values + (slot >> 1) * 2 * kRows16, row,
                                                  slot & 1);
}

// Position in its group of (slot, row).
template <int kBits>
int64_t position(const uint64_t* words, int64_t slot, int row) {
  const int shift = nibble_shift(row);
  return kBits == 2 ? int64_t(words[slot >> 1] >> (shift + 2 * (slot & 1)) & 3)
                    : int64_t(words[slot] >> shift & 15);
}

// One block of columns for `kRows` rows: acc[r][token] += W[row + r][..] x. Each `kShare` rows
// share their positions. kKept is N where the compiler may know it (2), else 0.
template <class S, class T, int kRows, int kShare, int kVectors, int kKept, int kBits>
void nm_micro(const uint64_t* words, const T* values, int row, int64_t groups, int kept, int group,
              const float* x, float* acc, bool first) {
  using V = typename S::V;
  constexpr int L = S::kLanes, kWidth = kVectors * L;
  V sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) sum[r][i] = S::zero();
  }
  const int n = kKept ? kKept : kept;
  values += row * (sizeof(T) == 4 ? 1 : 2);
  int64_t slot = 0;
  for (int64_t g = 0; g < groups; ++g, x += int64_t(group) * kWidth) {
    for (int j = 0; j < n; ++j, ++slot) {
#pragma GCC unroll 8
      for (int q = 0; q < kRows; q += kShare) {
        const float* from = x + position<kBits>(words, slot, row + q) * kWidth;
        typename Weights<S>::One w[kShare];
#pragma GCC unroll 4
        for (int r = 0; r < kShare; ++r) w[r] = slot_weight<S, kRows>(values, slot, q + r);
#pragma GCC unroll 16
        for (int i = 0; i < kVectors; ++i) {
          V v = S::load(from + i * L);
          if (kShare > 1) v = S::in_register(v);
#pragma GCC unroll 4
          for (int r = 0; r < kShare; ++r) sum[q + r][i] = S::fma(w[r], v, sum[q + r][i]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) add_block<S, kVectors>(acc + r * kWidth, sum[r], first);
}

// Columns of a block: what keeps its panel in L1, and sums short.
constexpr int kNmBlockColumns = 64;

// Blocks of columns jump through the weights, which no hardware prefetcher follows: fetch the next
// panel's share while this one is at work, into L1 or, where x needs all of that, into L2. Past the
// end of the buffer it is a hint without effect.
template <bool kIntoL1 = true>
void prefetch(const void* base, int64_t from, int64_t to) {
  for (int64_t at = from & -64; at < to; at += 64)
    __builtin_prefetch(static_cast<const char*>(base) + at, 0, kIntoL1 ? 3 : 2);
}

// Tile widths that fill the registers without spilling, and rows at a time: a narrow tile takes
// more rows, for enough independent sums to hide the latency of a multiply-add.
template <class S>
constexpr int nm_max_vectors(int share) {
  return S::kRegisters == 32 ? (share == 1 ? 8 : 6) : (share == 1 ? 6 : 2);
}
template <class S>
constexpr int nm_rows_at_once(int share, int vectors) {
  if (share == 4) return vectors <= (S::kRegisters == 32 ? 3 : 1) ? 8 : 4;
  return vectors <= (S::kRegisters == 32 ? 2 : 1)   ? 8
         : vectors <= (S::kRegisters == 32 ? 4 : 2) ? 4
                                                    : 2;
}

template <class S, class T>
class NmTileKernel {
 public:
  using Extra = NmExtra<FmaLanes<S, T>>;

  explicit NmTileKernel(const PackedWeight& weight)
      : h_(*weight.header),
        r_(nm_rows16(h_)),
        words_(weight.indices<uint64_t>()),
        values_(weight.values<T>()),
        extra_(weight, r_) {}

  int share() const { return h_.pattern.vector >= 4 ? 4 : 1; }

  TileShape shape() const {
    const bool lanes = h_.pattern.kept == 2 && h_.pattern.group == 4;
    return {nm_max_vectors<S>(share()),   r_.panels, kRows16,
            r_.groups * h_.pattern.group, 2,         kNmBlockColumns,
            lanes ? Extra::kMost : 0};
  }

  void pack(const MatmulCall& call, int64_t token0, int vectors, int64_t column0, int64_t column1,
            float* panel) const {
    pack_tokens<S, T>(call, token0, vectors, column0, column1, panel);
  }

  const Extra& extra() const { return extra_; }

  void compute(int64_t panel0, int64_t panel1, int64_t column0, int64_t column1, const float* x,
               int vectors, float* acc) const {
    const Micro* micro = table()[size_t(vectors - 1)];
    const int64_t group0 = column0 / h_.pattern.group,
                  groups = (column1 - column0) / h_.pattern.group;
    const int64_t slot0 = group0 * h_.pattern.kept,
                  word0 = h_.pattern.group <= 4 ? slot0 / 2 : slot0;
    const int rows = nm_rows_at_once<S>(share(), vectors);
    for (int64_t p = panel0; p < panel1; ++p) {
      const uint64_t* words = words_ + p * r_.words + word0;
      const T* values = values_ + (p * r_.pairs * 2 + slot0) * kRows16;
      const int64_t next = r_.pairs * 2 * kRows16,
                    segment = groups * h_.pattern.kept * kRows16 * int64_t(sizeof(T));
      for (int row = 0; row < kRows16; row += rows) {
        prefetch(values + next, segment * row / kRows16, segment * (row + rows) / kRows16);
        if (row == 0)
          prefetch(words + r_.words, 0, groups * h_.pattern.kept * (h_.pattern.group <= 4 ? 4 : 8));
        micro(words, values, row, groups, h_.pattern.kept, h_.pattern.group, x, acc, column0 == 0);
        acc += int64_t(rows) * vectors * S::kLanes;
      }
    }
  }

 private:
  using Micro = void(const uint64_t*, const T*, int, int64_t, int, int, const float*, float*, bool);
  using Table = std::array<Micro*, 8>;

  template <int kShare, int kKept, int kBits, int... kIndex>
  static Table make(std::integer_sequence<int, kIndex...>) {
    return {&nm_micro<S, T, nm_rows_at_once<S>(kShare, kIndex + 1), kShare, kIndex + 1, kKept,
                      kBits>...};
  }
  // The three cases worth a body of their own: 2 of 4, other N of M <= 4, and M of 8 or 16.
  template <int kShare>
  Table pick() const {
    const std::make_integer_sequence<int, nm_max_vectors<S>(kShare)> widths{};
    if (h_.pattern.group > 4) return make<kShare, 0, 4>(widths);
    if (h_.pattern.kept == 2) return make<kShare, 2, 2>(widths);
    return make<kShare, 0, 2>(widths);
  }
  Table table() const { return share() == 4 ? pick<4>() : pick<1>(); }

  const PackedHeader& h_;
  NmRows16 r_;
  const uint64_t* words_;
  const T* values_;
  Extra extra_;
};

// ---- few tokens ----

constexpr int kMaxDecodeTokens = 8;

// Short sums here too: every so many pairs of weights they move into a total.
constexpr int kDecodeBlock = 32;
template <class S, int kTokens, int kChains>
void flush(typename S::V (&sum)[kTokens][kChains], typename S::V (&total)[kTokens]) {
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
    total[t] = S::add(total[t], kChains == 1 ? sum[t][0] : S::add(sum[t][0], sum[t][kChains - 1]));
#pragma GCC unroll 2
    for (int c = 0; c < kChains; ++c) sum[t][c] = S::zero();
  }
}

template <class S, class T, int kTokens, int kBits>
void nm_decode_panels(const MatmulCall& call, const float* x, int64_t x_stride, int64_t panel0,
                      int64_t panel1) {
  using V = typename S::V;
  constexpr int L = S::kLanes;
  constexpr int kChains =
      kTokens < 4 ? 2 : 1;  // enough independent sums to hide the latency of fma
  const PackedHeader& h = *call.weight.header;
  const NmRows16 r = nm_rows16(h);
  const Epilogue<S, T> epilogue(call);
  const int kept = h.pattern.kept, group = h.pattern.group;
  for (int64_t p = panel0; p < panel1; ++p) {
    for (int half = 0; half < kRows16 / L; ++half) {
      const uint64_t* words = call.weight.indices<uint64_t>() + p * r.words;
      const T* values = call.weight.values<T>() + p * r.pairs * 2 * kRows16;
      V sum[kTokens][kChains], total[kTokens];
      for (int t = 0; t < kTokens; ++t) {
        total[t] = S::zero();
        for (V& v : sum[t]) v = S::zero();
      }
      int64_t column_even =
          0;  // first column of the group of the pair's even slot; `used` slots of it are done
      int used = 0;
      for (int64_t pair = 0; pair < r.pairs; ++pair, values += 2 * kRows16) {
        V even, odd;
        load_pair<S>(values, half, even, odd);
        const auto index_even = S::row_nibbles(words, half);
        const auto index_odd =
            kBits == 2 ? S::shift_right_2(index_even) : S::row_nibbles(words + 1, half);
        words += kBits == 2 ? 1 : 2;
        if (used == kept) used = 0, column_even += group;
        const int64_t column_odd = used + 1 == kept ? column_even + group : column_even;
        for (int t = 0; t < kTokens; ++t) {
          const float* row = x + t * x_stride;
          const V x_even = kBits == 2 ? S::pick4(row + column_even, index_even)
                                      : S::pick16(row + column_even, index_even);
          const V x_odd = kBits == 2 ? S::pick4(row + column_odd, index_odd)
                                     : S::pick16(row + column_odd, index_odd);
          sum[t][0] = S::fma(even, x_even, sum[t][0]);
          sum[t][kChains - 1] = S::fma(odd, x_odd, sum[t][kChains - 1]);
        }
        used += 2;
        if (used > kept) used -= kept, column_even += group;
        if (pair % kDecodeBlock == kDecodeBlock - 1) flush<S>(sum, total);
      }
      flush<S>(sum, total);
      const int64_t row0 = p * kRows16 + half * L;
      const int count = int(std::min<int64_t>(L, call.n - row0));
      if (count <= 0) break;
      const V bias = epilogue.bias(row0, count);
      for (int t = 0; t < kTokens; ++t) epilogue.store(total[t], bias, t, row0, count);
    }
  }
}

// x as padded floats, so that a group may be read whole. Shared by the threads of the call.
template <class S, class T>
const float* copy_tokens(const MatmulCall& call, int64_t stride, Scratch& memory) {
  float* x = memory.get(call.m * stride);
  for (int64_t t = 0; t < call.m; ++t) {
    const T* from = static_cast<const T*>(call.x) + t * call.x_row_stride;
    float* to = x + t * stride;
    for (int64_t c = 0; c < call.k; ++c) to[c] = to_float(from[c]);
    std::fill(to + call.k, to + stride, 0.0f);
  }
  return x;
}

// Splits the units among threads and calls panels(tokens as a constant, unit0, unit1).
template <class Panels, int... kIndex>
void run_decode(const MatmulCall& call, int64_t units, Panels panels,
                std::integer_sequence<int, kIndex...>) {
  const int shares = int(std::min<int64_t>(call.threads, units));
  parallel_for(shares, shares, [&](int share) {
    const int64_t u0 = units * share / shares, u1 = units * (share + 1) / shares;
    ((call.m == kIndex + 1 ? panels(std::integral_constant<int, kIndex + 1>{}, u0, u1) : void()),
     ...);
  });
}

template <class S, class T>
void run_nm_decode(const MatmulCall& call) {
  thread_local Scratch memory;
  const NmRows16 r = nm_rows16(*call.weight.header);
  // A last odd slot's partner lies one group further on; pick16 reads 16 columns.
  const int64_t stride = round_up((r.groups + 1) * call.weight.header->pattern.group + 16, 16);
  const float* x = copy_tokens<S, T>(call, stride, memory);
  run_decode(
      call, r.panels,
      [&](auto tokens, int64_t panel0, int64_t panel1) {
        if (r.index_bits == 2) {
          nm_decode_panels<S, T, decltype(tokens)::value, 2>(call, x, stride, panel0, panel1);
        } else {
          nm_decode_panels<S, T, decltype(tokens)::value, 4>(call, x, stride, panel0, panel1);
        }
      },
      std::make_integer_sequence<int, kMaxDecodeTokens>{});
}

template <class S, class T>
void run_nm(const MatmulCall& call) {
  run_tiles<S, T>(call, NmTileKernel<S, T>(call.weight));
}

// ---- cost model: microseconds; the constants are fitted to measurements ----

inline std::string any_nm(const Problem&) { return ""; }
inline std::string only_2_of_4(const Problem& p) {
  return p.pattern.kept == 2 && p.pattern.group == 4 ? "" : "is for 2:4 only";
}
inline std::string few_tokens(const Problem& p) {
  return p.m <= kMaxDecodeTokens
             ? ""
             : concat("is for m <= ", kMaxDecodeTokens, ", the problem has m=", p.m);
}

inline double weight_bytes(const Problem& p) {
  return double(p.n) * double(p.k) * p.kept_share() * (dtype_size(p.dtype) + 0.25);
}

// Multiply-adds of whole vectors at 4 GHz and `per_cycle` of them, plus building and emptying the
// panels. A tile of V vectors takes as long as one of V + `narrow` would at full speed: ends of loops and
// latencies weigh more the narrower it is. It reads the weights at no more than 8 bytes a nanosecond
// and core.
template <class S>
double tile_cost_us(const Problem& p, double per_cycle, double narrow) {
  const double vectors = double(ceil_div(p.m, S::kLanes));
  const double fma = vectors * (1 + narrow / std::clamp(vectors, 1.0, 8.0)) * double(p.n) *
                     double(p.k) * p.kept_share() / (per_cycle * 4e3);
  const double panels = vectors * (double(p.k) + double(p.n)) * 1.5e-3;
  return (std::max(fma, weight_bytes(p) / 8e3) + panels) / p.threads + 3;
}

// Streaming at 22 bytes a nanosecond and core, or the permutations and multiply-adds of many
// tokens.
template <class S>
double decode_cost_us(const Problem& p) {
  const double steps = double(p.m) * double(p.n) * double(p.k) * p.kept_share() / S::kLanes;
  return std::max(weight_bytes(p) / (S::kLanes == 16 ? 22e3 : 20e3),
                  steps / (S::kLanes == 16 ? 1.2e3 : 1.8e3)) /
             p.threads +
         2;
}

template <class S>
double nm_cost_us(const Problem& p) {
  return p.pattern.vector >= 4 ? tile_cost_us<S>(p, 1.8, 0.2) : tile_cost_us<S>(p, 1.4, 0.5);
}

}  // namespace
}  // namespace sk
