// x as a matrix: a token is a row in memory.
#pragma once
#include "cuda/matmul_mma.cuh"

namespace sk::cuda {

struct RowParams {
  const uint16_t* x;  // [m, k], rows on 16 bytes
  int64_t stride;     // in elements
};

template <class Tile>
class RowCopier : ChunkCopier<Tile> {
  using Base = ChunkCopier<Tile>;
  using Base::each_token;

 public:
  using Params = RowParams;
  static constexpr int kSharedBytes = 0;  // of its own
  using Base::chunk;

  SK_DEVICE RowCopier(const MatmulParams& p, const RowParams& x, uint32_t /*shared*/)
      : p_(p), x_(x) {}

  SK_DEVICE void start_tile(int64_t token) {
    const int64_t left = p_.epilogue.m - token;
    tokens_ = left < Tile::kTokens ? int(left) : Tile::kTokens;
    from_ = x_.x + (token + Base::first_token()) * x_.stride;
  }

  // `column`: of W and x, where this thread's chunk starts. Past k, and past m, zeros come.
  SK_DEVICE void copy(uint32_t slot, int column) const {
    const uint16_t* from = from_ + column;
    const int64_t step = Base::kStep * x_.stride;
    if (tokens_ == Tile::kTokens && column + 8 <= p_.k) {
      each_token(slot, [&](int i, int, uint32_t to) { ptx::cp_async_16(to, from + i * step); });
      return;
    }
    int bytes = (p_.k - column) * 2;
    bytes = bytes < 0 ? 0 : bytes > 16 ? 16 : bytes;
    each_token(slot, [&](int i, int token, uint32_t to) {
      const bool some = token < tokens_ && bytes > 0;
      ptx::cp_async_16(to, some ? from + i * step : x_.x, some ? bytes : 0);
    });
  }

 private:
  const MatmulParams& p_;
  const RowParams& x_;
  int tokens_ = 0;
  const uint16_t* from_ = nullptr;
};

}  // namespace sk::cuda
