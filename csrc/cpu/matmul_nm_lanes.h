// 2:4 with rows in the lanes: a panel's 16 rows of W meet one token at a time.
//
// A group's four activations are broadcast to all lanes, and a shuffle with the stored positions as
// control hands each row those it kept. The shuffle for each multiply costs about a quarter of the
// arithmetic rate, but the weights stream by in order and nothing is transposed: best for few
// tokens (at one, the memory decides) and for small layers.
//
//   for each chunk of panels           its weights stay in L2
//     for each tile of tokens          at most 16
//       for each panel                 its weights stream by
//         for each block of groups     micro: tokens x 16 rows in registers
//         write out                    epilogue; the rows lie side by side in y
#pragma once
#include "cpu/matmul_nm.h"
#include "cpu/nm_lanes.h"

namespace sk {
namespace {

// Tokens of a tile: one sum each, beside the weights and what the shuffles need.
template <class S>
constexpr int lanes_max_tokens() {
  return S::kRegisters == 32 ? 16 : 8;
}

// Tokens [first, last) of x as [group][token][4], columns past k as zeros.
template <class Op>
void pack_groups(const MatmulCall& call, int64_t first, int64_t last, typename Op::Packed* to) {
  using T = typename Op::Element;
  const int64_t tokens = last - first, whole = call.k / 4;
  for (int64_t t = 0; t < tokens; ++t, to += 4) {
    const T* from = static_cast<const T*>(call.x) + (first + t) * call.x_row_stride;
    for (int64_t g = 0; g < whole; ++g) {
      for (int j = 0; j < 4; ++j) to[g * tokens * 4 + j] = Op::convert(from[4 * g + j]);
    }
    for (int64_t c = whole * 4; c < round_up(call.k, 4); ++c)
      to[whole * tokens * 4 + c % 4] = Op::convert(c < call.k ? from[c] : T{});
  }
}

// y[first .. first + tokens)[rows of the panel], from packed x to the epilogue.
template <class Op, int... kIndex>
void lanes_panel(const MatmulCall& call, const NmRows16& r, int64_t panel,
                 const typename Op::Packed* x, int64_t first, int64_t tokens,
                 std::integer_sequence<int, kIndex...>) {
  using S = typename Op::Isa;
  using T = typename Op::Element;
  constexpr decltype(&lanes_micro<Op, 1>) kMicros[] = {&lanes_micro<Op, kIndex + 1>...};
  const uint64_t* words = call.weight.indices<uint64_t>() + panel * r.words;
  const T* values = call.weight.values<T>() + panel * r.pairs * 2 * kRows16;
  alignas(kAlignment) float total[sizeof...(kIndex) * kRows16];
  for (int64_t g = 0; g < r.groups; g += Op::kBlockGroups) {
    kMicros[tokens - 1](words + g, values + g * 2 * kRows16,
                        int(std::min<int64_t>(Op::kBlockGroups, r.groups - g)), x + g * tokens * 4,
                        total, g == 0);
  }
  const Epilogue<S, T> epilogue(call);
  for (int part = 0; part < kRows16; part += S::kLanes) {
    const int64_t row = panel * kRows16 + part;
    const int count = int(std::min<int64_t>(S::kLanes, call.n - row));
    if (count <= 0) break;
    const auto bias = epilogue.bias(row, count);
    for (int64_t t = 0; t < tokens; ++t)
      epilogue.store(S::load(total + t * kRows16 + part), bias, first + t, row, count);
  }
}

template <class Op>
void run_nm_lanes(const MatmulCall& call) {
  using Packed = typename Op::Packed;
  constexpr int kMaxTokens = lanes_max_tokens<typename Op::Isa>();
  const NmRows16 r = nm_rows16(*call.weight.header);
  const int64_t tiles = ceil_div(call.m, kMaxTokens);
  const auto first_token = [&](int64_t tile) { return call.m * tile / tiles; };

  thread_local Scratch memory;  // x of the whole call, read by all threads
  const int64_t x_bytes = call.m * r.groups * 4 * int64_t(sizeof(Packed));
  Packed* const x = reinterpret_cast<Packed*>(memory.get(ceil_div(x_bytes, 4)));
  parallel_for(int(tiles), x_bytes < 1 << 17 ? 1 : call.threads, [&](int tile) {
    const int64_t first = first_token(tile);
    pack_groups<Op>(call, first, first_token(tile + 1), x + first * r.groups * 4);
  });

  // Threads share the rows or the tokens, whichever splits more evenly.
  const int64_t threads = call.threads;
  const bool by_rows = ceil_div(r.panels, threads) * tiles <= r.panels * ceil_div(tiles, threads);
  const int64_t shares = std::min(threads, by_rows ? r.panels : tiles);
  const int64_t panel_bytes = (call.weight.header->bytes - call.weight.header->indices_offset) /
                              std::max<int64_t>(1, r.panels);
  const int64_t chunk = std::max<int64_t>(1, cpu_info().l2_bytes / 2 / panel_bytes);
  parallel_for(int(shares), int(shares), [&](int share) {
    const int64_t panel0 = by_rows ? r.panels * share / shares : 0,
                  panel1 = by_rows ? r.panels * (share + 1) / shares : r.panels,
                  tile0 = by_rows ? 0 : tiles * share / shares,
                  tile1 = by_rows ? tiles : tiles * (share + 1) / shares;
    for (int64_t p0 = panel0; p0 < panel1; p0 += chunk) {
      for (int64_t tile = tile0; tile < tile1; ++tile) {
        const int64_t first = first_token(tile), tokens = first_token(tile + 1) - first;
        for (int64_t p = p0; p < std::min(panel1, p0 + chunk); ++p) {
          lanes_panel<Op>(call, r, p, x + first * r.groups * 4, first, tokens,
                          std::make_integer_sequence<int, kMaxTokens>{});
        }
      }
    }
  });
}

// Streaming at 22 bytes a nanosecond and core, or `rate` vectors of multiplies in it.
template <class S>
double lanes_cost_us(const Problem& p, double rate) {
  const double multiplies = double(p.m) * double(p.n) * double(p.k) * p.kept_share() / S::kLanes;
  return std::max(weight_bytes(p) / 22e3, multiplies / (rate * 1e3)) / p.threads + 2;
}

template <class S>
double fma_lanes_cost_us(const Problem& p) {
  return lanes_cost_us<S>(p, 4.0);
}

}  // namespace
}  // namespace sk
