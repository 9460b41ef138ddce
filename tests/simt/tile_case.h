// One launch of a tile kernel, or two, on a random problem of small integers: exact sums, nothing written beside y,
// counters zero afterwards. test_matmul.cc and test_conv2d.cc say what x is.
#pragma once
#include <algorithm>
#include <cmath>
#include <functional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "core/cuda_info.h"
#include "cuda/plan.h"
#include "cuda/weights_bsr.cuh"
#include "cuda/weights_nm.cuh"
#include "layout/format.h"
#include "layout/weight.h"

using namespace sk;
namespace ptx = sk::ptx;

namespace {

template <class T>
uint16_t to_bits(float v) {
  return uint16_t(ptx::pack2<T>(v, 0.0f));
}
template <class T>
float to_float(uint16_t bits) {
  return ptx::unpack2<T>(bits).x;
}

struct Case {
  int64_t m, n, k;
  int blocks;         // of the grid
  bool share = true;  // tiles among blocks; else a whole tile at a time
  int activation = cuda::kNone;
  bool bias = false, residual = false, residual_first = false;
  int y_pad = 0;           // columns beside y
  int64_t cut = 0;         // tokens of a launch before this one, for the rest
  double density = 0.5;    // of blocks
  unsigned seed = 1;       // of the problem
  unsigned order = 1;      // of blocks and warps
  bool fractions = false;  // sums that depend on their order; only the bits are returned

  std::string describe() const {
    return "m=" + std::to_string(m) + " n=" + std::to_string(n) + " k=" + std::to_string(k) +
           " blocks=" + std::to_string(blocks) + (share ? " shared" : " whole") +
           " activation=" + std::to_string(activation) + " cut=" + std::to_string(cut) +
           " seed=" + std::to_string(seed);
  }

  float number(std::mt19937& random) const {
    return fractions ? float(random() % 1000) / 999 : float(int(random() % 5) - 2);
  }
};

// x as the copier finds it, and the same as a matrix.
template <class Params>
struct X {
  std::vector<uint16_t> memory;
  std::vector<float> dense;  // [m, k]
  // For a launch that starts at a token; `x` is an offset of `memory` in elements.
  std::function<std::pair<Params, int64_t>(int64_t token)> params;
};

// A random weight of small integers, packed, and the same dense.
struct Weight {
  std::vector<float> dense;  // [n, k]
  std::vector<uint64_t> packed;
  PackedHeader header;
};

template <class T>
Weight make_weight(const sk_pattern& pattern, int format_id, const Case& c, std::mt19937& random) {
  constexpr int dtype = std::is_same_v<T, ptx::F16> ? SK_F16 : SK_BF16;
  Weight w;
  w.dense.assign(size_t(c.n * c.k), 0);
  std::vector<uint8_t> mask(size_t(c.n * c.k), 0);
  const auto keep = [&](int64_t row, int64_t column) {
    if (row >= c.n || column >= c.k) return;
    const size_t at = size_t(row * c.k + column);
    mask[at] = 1;
    w.dense[at] = c.number(random);
  };
  if (pattern.family == SK_FAMILY_NM) {
    for (int64_t row = 0; row < c.n; ++row) {
      for (int64_t group = 0; group < c.k; group += 4) {
        const int first = int(random() % 4), second = int(random() % 4);
        keep(row, group + first);
        if (second != first) keep(row, group + second);
      }
    }
  } else {
    for (int64_t row = 0; row < c.n; row += pattern.block_rows) {
      for (int64_t column = 0; column < c.k; column += pattern.block_cols) {
        if (double(random() % 1000) >= 1000 * c.density) continue;
        for (int r = 0; r < pattern.block_rows; ++r) {
          for (int j = 0; j < pattern.block_cols; ++j) keep(row + r, column + j);
        }
      }
    }
  }
  std::vector<uint16_t> bits(w.dense.size());
  std::transform(w.dense.begin(), w.dense.end(), bits.begin(), to_bits<T>);

  sk_weight canonical{};
  canonical.pattern = pattern;
  canonical.dtype = dtype;
  canonical.n = c.n, canonical.k = c.k;
  const int64_t nnzb =
      pattern.family == SK_FAMILY_BSR ? count_blocks(pattern, mask.data(), c.n, c.k) : 0;
  const WeightSizes sizes = weight_sizes(pattern, dtype, c.n, c.k, nnzb);
  std::vector<uint64_t> values(size_t(sizes.values / 8 + 1)),
      indices(size_t(sizes.indices / 8 + 1)), crow(size_t(sizes.crow_indices / 8 + 1));
  canonical.values = values.data(), canonical.values_bytes = sizes.values;
  canonical.indices = indices.data(), canonical.indices_bytes = sizes.indices;
  if (pattern.family == SK_FAMILY_BSR) {
    canonical.crow_indices = crow.data(), canonical.crow_indices_bytes = sizes.crow_indices;
  }
  compress(bits.data(), c.k, mask.data(), canonical);
  w.header = make_header(canonical, format_id);
  std::vector<uint64_t> storage(size_t(w.header.bytes / 8 + 8));
  void* aligned = storage.data();
  size_t space = storage.size() * 8;
  std::align(64, size_t(w.header.bytes), aligned, space);
  pack(canonical, format_id, aligned, w.header.bytes);
  w.packed.assign(static_cast<uint64_t*>(aligned),
                  static_cast<uint64_t*>(aligned) + w.header.bytes / 8);
  return w;
}

double activate_exactly(double v, int activation) {
  switch (activation) {
    case cuda::kRelu:
      return std::max(v, 0.0);
    case cuda::kGelu:
      return 0.5 * v * (1 + std::erf(v * M_SQRT1_2));
    case cuda::kGeluTanh:
      return 0.5 * v * (1 + std::tanh(M_2_SQRTPI * M_SQRT1_2 * (v + 0.044715 * v * v * v)));
    case cuda::kSilu:
      return v / (1 + std::exp(-v));
    case cuda::kRelu6:
      return std::min(std::max(v, 0.0), 6.0);
    default:
      return v;
  }
}

// Runs every token; returns the bits of y, for comparing runs. make_x(random) is X<Params of the copier>.
template <class Tile, template <class> class WeightsOf, template <class> class CopierOf,
          class MakeX>
std::vector<uint16_t> run(const sk_pattern& pattern, int format_id, const Case& c, MakeX make_x,
                          simt::Statistics* statistics = nullptr) {
  using T = typename Tile::T;
  using Shared = cuda::SharedMemory<Tile, WeightsOf<Tile>, CopierOf<Tile>>;
  std::mt19937 random(c.seed);
  const Weight w = make_weight<T>(pattern, format_id, c, random);
  const X<typename CopierOf<Tile>::Params> x = make_x(random);

  const int64_t y_stride = c.n + c.y_pad;
  std::vector<float> bias(size_t(c.n)), residual(size_t(c.m * c.n));
  // What stands beside the residual must not matter: NaN.
  std::vector<uint16_t> bias_bits(bias.size()), residual_bits(size_t(c.m * y_stride), 0xffff);
  for (int64_t i = 0; i < c.m; ++i) {
    for (int64_t j = 0; j < c.n; ++j) {
      residual[size_t(i * c.n + j)] = c.number(random);
      residual_bits[size_t(i * y_stride + j)] = to_bits<T>(residual[size_t(i * c.n + j)]);
    }
  }
  for (size_t j = 0; j < bias.size(); ++j)
    bias[j] = c.number(random), bias_bits[j] = to_bits<T>(bias[j]);

  auto weight_buffer = simt::Buffer<uint64_t>::input("weight", w.packed);
  auto x_buffer = simt::Buffer<uint16_t>::input("x", x.memory);
  auto bias_buffer = simt::Buffer<uint16_t>::input("bias", bias_bits);
  auto residual_buffer = simt::Buffer<uint16_t>::input("residual", residual_bits);
  auto y = simt::Buffer<uint16_t>::output("y", size_t(c.m * y_stride));
  auto counters = simt::Buffer<int>::in_out("counters", std::vector<int>(size_t(c.blocks), 0));
  auto parts =
      simt::Buffer<float>::output("parts", size_t(2 * c.blocks * Tile::kRows * Tile::kTokens));

  cuda::MatmulParams p{};
  p.weight = reinterpret_cast<const uint8_t*>(weight_buffer.data());
  p.values_offset = w.header.values_offset;
  p.indices_offset = w.header.indices_offset;
  p.order_offset = w.header.order_offset;
  p.k = int(c.k);
  p.epilogue.bias = c.bias ? bias_buffer.data() : nullptr;
  p.epilogue.y_row_stride = p.epilogue.residual_row_stride = y_stride;
  p.epilogue.n = int(c.n);
  p.epilogue.activation = c.activation;
  p.epilogue.residual_first = c.residual_first;
  p.epilogue.aligned = y_stride % 8 == 0;
  p.counters = counters.data();
  p.parts = parts.data();

  simt::Launch launch;
  launch.grid = c.blocks;
  launch.threads = Tile::kThreads;
  launch.shared_bytes = Shared::kBytes;
  launch.seed = c.order;
  launch.kernel = "matmul_mma";
  const auto launch_tokens = [&](int64_t from, int64_t to) {
    p.epilogue.y = y.data() + from * y_stride;
    p.epilogue.residual = c.residual ? residual_buffer.data() + from * y_stride : nullptr;
    p.epilogue.m = to - from;
    p.token_tiles = int(ceil_div(to - from, int64_t{Tile::kTokens}));
    const bool even = pattern.family == SK_FAMILY_NM;  // only tiles of one size go round whole
    p.whole_tiles = c.share || !even ? 0 : p.token_tiles * int(ceil_div(c.n, int64_t{Tile::kRows}));
    auto [params, offset] = x.params(from);
    params.x = reinterpret_cast<decltype(params.x)>(x_buffer.data() + offset);
    return simt::launch(launch, cuda::matmul_mma<Tile, WeightsOf, CopierOf>, p, params);
  };
  if (c.cut > 0) launch_tokens(0, c.cut);
  const simt::Statistics all = launch_tokens(c.cut, c.m);
  if (statistics) *statistics = all;

  for (int i = 0; i < c.blocks; ++i) CHECK(counters[size_t(i)] == 0);
  if (c.fractions) return y.values();
  const bool exact = c.activation == cuda::kNone || c.activation == cuda::kRelu;
  for (int64_t i = 0; i < c.m; ++i) {
    for (int64_t j = 0; j < y_stride; ++j) {
      const size_t at = size_t(i * y_stride + j);
      if (j >= c.n) {
        CHECK(!y.written(at));
        continue;
      }
      CHECK(y.written(at));
      double sum = c.bias ? bias[size_t(j)] : 0;
      for (int64_t l = 0; l < c.k; ++l)
        sum += double(x.dense[size_t(i * c.k + l)]) * w.dense[size_t(j * c.k + l)];
      const double add = c.residual ? residual[size_t(i * c.n + j)] : 0;
      const double expected = c.residual_first ? activate_exactly(sum + add, c.activation)
                                               : activate_exactly(sum, c.activation) + add;
      const float got = to_float<T>(y[at]);
      // Curves: one rounding of the result, and float32 on the way.
      const double slack =
          (std::is_same_v<T, ptx::F16> ? 1.0 / 2048 : 1.0 / 256) * std::abs(expected) + 1e-6;
      if (exact ? got != to_float<T>(to_bits<T>(float(expected)))
                : std::abs(got - expected) > slack) {
        fail(__FILE__, __LINE__,
             c.describe() + ": y[" + std::to_string(i) + ", " + std::to_string(j) + "] is " +
                 std::to_string(got) + ", expected " + std::to_string(expected));
      }
    }
  }
  return y.values();
}

// Of a full tile of 8 stages: shared memory is met without bank conflicts, but for the epilogue's reads, and global
// memory in whole sectors; W is read once, x as often as the tile has it.
template <class Tile, template <class> class WeightsOf>
void check_accesses(const simt::Statistics& statistics) {
  for (const simt::PlaceStatistics& at : statistics.places) {
    if (std::string(at.place.file).find("epilogue.cuh") == std::string::npos ||
        at.op == simt::Op::kStoreShared) {
      if (at.bank_conflicts != 0) fail(__FILE__, __LINE__, statistics.report());
    }
    if (at.op == simt::Op::kCpAsync || at.op == simt::Op::kStoreGlobal)
      CHECK(at.sectors * 32 == at.global_bytes);
  }
  const uint64_t x = uint64_t(Tile::kTokens) * 64 * 8 * 2;
  const uint64_t w = uint64_t(WeightsOf<Tile>::kStageBytes) * 8;
  uint64_t copied = 0;
  for (const simt::PlaceStatistics& at : statistics.places) {
    if (at.op == simt::Op::kCpAsync) copied += at.global_bytes;
  }
  CHECK(copied == x + w);
}

// Calls test<Tile, Weights>(pattern, format) for a line of tiles.inc, in both dtypes, where the program's argument is
// part of its name.
#define SK_TEST_NM(test, rows, tokens, wr, wt, stages, blocks, about)                             \
  if (wanted("nm " #rows "x" #tokens)) {                                                          \
    const sk_pattern nm{SK_FAMILY_NM, 2, 4, 1, 0, 0};                                             \
    test<cuda::Tile<ptx::F16, rows, tokens, wr, wt, stages, blocks>, cuda::NmWeights>(nm,         \
                                                                                      kNmMmaSp);  \
    test<cuda::Tile<ptx::BF16, rows, tokens, wr, wt, stages, blocks>, cuda::NmWeights>(nm,        \
                                                                                       kNmMmaSp); \
  }
#define SK_TEST_BSR(test, rows, tokens, wr, wt, stages, blocks, about)                             \
  for (const int columns : {16, 32, 64, 128}) {                                                    \
    if (!wanted("bsr " #rows "x" #tokens)) continue;                                               \
    const sk_pattern bsr{SK_FAMILY_BSR, 0, 0, 0, rows, columns};                                   \
    if (columns == 16 || columns == 128) {                                                         \
      test<cuda::Tile<ptx::F16, rows, tokens, wr, wt, stages, blocks>, cuda::BsrWeights>(bsr,      \
                                                                                         kBsrMma); \
    } else {                                                                                       \
      test<cuda::Tile<ptx::BF16, rows, tokens, wr, wt, stages, blocks>, cuda::BsrWeights>(         \
          bsr, kBsrMma);                                                                           \
    }                                                                                              \
  }

}  // namespace
