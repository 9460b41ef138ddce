// Every tile of the tensor-core matmul kernels: exact sums of small integers, at the edges of tiles and stages,
// with blocks sharing tiles and without, all epilogues.
#include "cuda/rows.cuh"
#include "tile_case.h"

namespace {

// The rows of a matrix, with `x_pad` columns or more beside it. What stands there must not matter: NaN.
template <class T>
X<cuda::RowParams> make_rows(const Case& c, int x_pad, std::mt19937& random) {
  const int64_t stride = (c.k + 7) / 8 * 8 + x_pad;
  X<cuda::RowParams> x;
  x.dense.resize(size_t(c.m * c.k));
  x.memory.assign(size_t(std::max<int64_t>(c.m, 1) * stride), 0xffff);
  for (int64_t i = 0; i < c.m; ++i) {
    for (int64_t j = 0; j < c.k; ++j) {
      const float number = x.dense[size_t(i * c.k + j)] = c.number(random);
      x.memory[size_t(i * stride + j)] = to_bits<T>(number);
    }
  }
  x.params = [stride](int64_t token) {
    return std::make_pair(cuda::RowParams{nullptr, stride}, token * stride);
  };
  return x;
}

template <class Tile, template <class> class WeightsOf>
void test_tile(const sk_pattern& pattern, int format_id) {
  const int64_t rows = Tile::kRows, tokens = Tile::kTokens;
  const auto check = [&](const Case& c, int x_pad = 0, simt::Statistics* statistics = nullptr) {
    const auto make_x = [&](std::mt19937& random) {
      return make_rows<typename Tile::T>(c, x_pad, random);
    };
    return run<Tile, WeightsOf, cuda::RowCopier>(pattern, format_id, c, make_x, statistics);
  };
  Case full{tokens, rows, 64 * 8, 1, false};
  full.density = 1;
  simt::Statistics statistics;
  check(full, 0, &statistics);
  check_accesses<Tile, WeightsOf>(statistics);
  check({0, rows, 64, 2});  // no token: nothing is read or written
  // One tile of one stage and all that is smaller: the edges of n, k and m.
  for (const int64_t n : {int64_t{1}, rows - 1, rows}) {
    for (const int64_t k : {1, 8, 63, 64}) check({std::min<int64_t>(tokens, 9), n, k, 1, false});
  }
  for (const int64_t m : {int64_t{1}, tokens - 1, tokens, tokens + 1})
    check({m, rows + 1, 65, 2, false});
  // Tiles in parts: by many blocks of few stages, by blocks that hold parts of several tiles, by one alone.
  check({3, rows, 64 * 33, 4});
  check({tokens + 3, rows + 8, 64 * 11 + 5, 3});
  check({tokens + 3, 2 * rows + 5, 64 * 10, 5});
  check({2 * tokens, rows, 64 * 3, 7});
  // The same bits, whoever comes last.
  Case parts{tokens, rows, 64 * 40, 5};
  parts.fractions = true;
  const auto bits = check(parts);
  for (parts.order = 2; parts.order < 5; ++parts.order) CHECK(check(parts) == bits);
  // Epilogues, aligned and not.
  for (const int activation :
       {cuda::kNone, cuda::kRelu, cuda::kGelu, cuda::kGeluTanh, cuda::kSilu, cuda::kRelu6}) {
    Case c{5, rows, 64, 1, false, activation, true, true};
    check(c);
    c.n = rows - 3, c.y_pad = 2, c.residual_first = true;
    check(c, 8);
  }
  check({5, rows, 100, 1, true, cuda::kNone, false, true});
  // A launch for the rest of the rows.
  Case rest{tokens + 5, rows, 65, 2};
  rest.cut = 3;
  check(rest);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string only = argc > 1 ? argv[1] : "";
  const auto wanted = [&](const std::string& name) {
    return only.empty() || name.find(only) != std::string::npos;
  };
#define SK_NM_TILE(...) SK_TEST_NM(test_tile, __VA_ARGS__)
#define SK_BSR_TILE(...) SK_TEST_BSR(test_tile, __VA_ARGS__)
#include "cuda/tiles.inc"
  return 0;
}
