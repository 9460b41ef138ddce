// Block-sparse weights in the canonical form, of every block shape, on CUDA cores.
//
// The kept columns of a block row are numbered one block after the other: `kept column` j is column j % bc of its
// block j / bc. Many tokens: a stage is kDepth of them (cores.cuh). Few tokens: bsr_decode, where a lane takes four
// of them (one where bc is no multiple of 4) and the next lane the next, for kBsrDecodeRows rows at once, so that a
// number of x from L1 meets as many weights. W is read once, 16 bytes a lane: 4 bytes a kept weight in float32.
#pragma once
#include "cuda/cores_nm.cuh"

namespace sk::cuda {

struct BsrParams {
  const void* values;  // [nnzb, block_rows, block_cols]
  const int* columns;  // [nnzb], in blocks
  const int* crow;     // [block rows + 1]
  int block_rows;
  Divider block_cols;

  BsrParams(const void* values_, const void* columns_, const void* crow_, int rows, int cols)
      : values(values_),
        columns(static_cast<const int*>(columns_)),
        crow(static_cast<const int*>(crow_)),
        block_rows(rows),
        block_cols(cols) {}
};

// A block row as kept columns.
template <class T>
class KeptColumns {
  using E = Element<T>;

 public:
  SK_DEVICE KeptColumns(const BsrParams& p, int block_row)
      : p_(p), first_(ptx::load_global_nc(p.crow + block_row)) {
    count_ = (ptx::load_global_nc(p.crow + block_row + 1) - first_) * cols();
  }

  SK_DEVICE bool in_fours() const { return p_.block_cols.divisor % 4 == 0; }
  SK_DEVICE int count() const { return count_; }
  // Of W and x; -1 for none.
  SK_DEVICE int column(int kept) const {
    if (kept >= count_) return -1;
    const int block = int(p_.block_cols(uint32_t(kept)));
    return ptx::load_global_nc(p_.columns + first_ + block) * cols() + kept - block * cols();
  }
  SK_DEVICE const typename E::Bits* value(int kept, int row) const {
    const int block = int(p_.block_cols(uint32_t(kept)));
    return static_cast<const typename E::Bits*>(p_.values) +
           (int64_t{first_ + block} * p_.block_rows + row) * cols() + kept - block * cols();
  }

 private:
  SK_DEVICE int cols() const { return int(p_.block_cols.divisor); }

  const BsrParams& p_;
  const int first_;
  int count_;
};

// A tile is kRows rows of a block row, or what is left of it.
template <class Tile>
class BsrCores {
  using T = typename Tile::T;
  using E = Element<T>;
  using Share = CoresShare<Tile, Tile::kRows>;

 public:
  using Params = BsrParams;

  SK_DEVICE static int row_tiles(const Params& p, int n) {
    return (n - 1) / p.block_rows * tiles_of_block(p) + (n - 1) % p.block_rows / Tile::kRows + 1;
  }

  SK_DEVICE BsrCores(const Params& p, int row_tile, int n)
      : kept_(p, row_tile / tiles_of_block(p)) {
    const int block_row = row_tile / tiles_of_block(p);
    const int row = row_tile % tiles_of_block(p) * Tile::kRows;
    first_row_ = block_row * p.block_rows + row;
    end_row_ = n - first_row_ < p.block_rows - row ? n : first_row_ + p.block_rows - row;
    row_ = row + Share::line() < p.block_rows ? row + Share::line() : -1;
  }

  SK_DEVICE int first_row() const { return first_row_; }
  SK_DEVICE int end_row() const { return end_row_; }
  SK_DEVICE int stages() const { return (kept_.count() + Tile::kDepth - 1) / Tile::kDepth; }
  SK_DEVICE bool columns_in_fours() const { return kept_.in_fours(); }
  SK_DEVICE int column(int at) const { return kept_.column(at); }

  SK_DEVICE void fetch(int stage) {
#pragma unroll
    for (int i = 0; i < Share::kItems; ++i) {
      if (!Share::there(i)) break;
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        const int kept = stage * Tile::kDepth + Share::chunk(i) * 8 + 4 * q;
        if (kept_.in_fours()) {
          raw_[i][q] = load_some<T>(kept_.value(kept, row_), row_ < 0 ? 0 : kept_.count() - kept);
        } else {
          typename E::Bits bits[4] = {};
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (row_ >= 0 && kept + j < kept_.count())
              bits[j] = ptx::load_global_nc(kept_.value(kept + j, row_));
          }
          raw_[i][q] = E::join(bits);
        }
      }
    }
  }

  SK_DEVICE void put(uint32_t at, int /*stage*/) const { Share::template put<E>(raw_, at); }

 private:
  SK_DEVICE static int tiles_of_block(const Params& p) {
    return (p.block_rows - 1) / Tile::kRows + 1;
  }

  const KeptColumns<T> kept_;
  int first_row_, end_row_;
  int row_;  // of a block, this thread's; -1: behind the last
  typename E::Quad raw_[Share::kItems][2];
};

// For blocks of more than 32 rows where they fill a GPU, and for all others.
template <class T>
using BsrLarge = CoresTile<T, 64, 128, 8, 8, 16, 3>;
template <class T>
using BsrSmall = CoresTile<T, 16, 128, 4, 4, 16, 4>;

// ---- few tokens ----------------------------------------------------------------------------------

constexpr int kBsrDecodeRows = 4;   // of a warp, all of one block row
constexpr int kBsrDecodeWarps = 4;  // of a block

// kBsrDecodeRows rows of a block, from `row` on, for kTokens tokens.
template <class T, int kTokens>
SK_DEVICE void bsr_decode_rows(const BsrParams& p, const MatrixParams& x, const OutputParams& out,
                               int block_row, int row, int64_t token) {
  using E = Element<T>;
  const int lane = ptx::thread_index() % 32;
  const KeptColumns<T> kept(p, block_row);
  float sums[kBsrDecodeRows][kTokens] = {};
  if (kept.in_fours()) {
#pragma unroll 1
    for (int j = 4 * lane; j < kept.count(); j += 4 * 32) {
      const int column = kept.column(j);
      float w[kBsrDecodeRows][4];
#pragma unroll
      for (int r = 0; r < kBsrDecodeRows; ++r)
        E::unpack(load_some<T>(kept.value(j, row + r), row + r < p.block_rows ? 4 : 0), w[r]);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        float v[4];
        E::unpack(MatrixX<T>(x, token + t, out.m).four(column), v);
#pragma unroll
        for (int r = 0; r < kBsrDecodeRows; ++r) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[r][t] = fmaf(w[r][i], v[i], sums[r][t]);
        }
      }
    }
  } else {
#pragma unroll 1
    for (int j = lane; j < kept.count(); j += 32) {
      const int column = kept.column(j);
      float w[kBsrDecodeRows];
#pragma unroll
      for (int r = 0; r < kBsrDecodeRows; ++r) {
        w[r] = row + r < p.block_rows ? E::number(ptx::load_global_nc(kept.value(j, row + r))) : 0;
      }
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const float v = E::number(MatrixX<T>(x, token + t, out.m).one(column));
#pragma unroll
        for (int r = 0; r < kBsrDecodeRows; ++r) sums[r][t] = fmaf(w[r], v, sums[r][t]);
      }
    }
  }
  const float sum = sum_of_warp<kBsrDecodeRows, kTokens>(sums);
  const int r = lane / kTokens, first_row = block_row * p.block_rows + row;
  const int64_t to = token + lane % kTokens;
  if (r < kBsrDecodeRows && row + r < p.block_rows && r < out.n - first_row && to < out.m)
    Output<T>(out).store(sum, to, first_row + r);
}

template <class T, int kTokens>
__global__ void __launch_bounds__(32 * kBsrDecodeWarps, 3)
    bsr_decode(const __grid_constant__ BsrParams w, const __grid_constant__ MatrixParams x,
               const __grid_constant__ OutputParams out) {
  const int units_of_block = (w.block_rows - 1) / kBsrDecodeRows + 1;
  const int units = ((out.n - 1) / w.block_rows + 1) * units_of_block;
  const int64_t all = units * ((out.m + kTokens - 1) / kTokens);
#pragma unroll 1
  for (int64_t at = int64_t{ptx::block_index()} * kBsrDecodeWarps + ptx::thread_index() / 32;
       at < all; at += int64_t{ptx::block_count()} * kBsrDecodeWarps) {
    const int unit = int(at % units);
    bsr_decode_rows<T, kTokens>(w, x, out, unit / units_of_block,
                                unit % units_of_block * kBsrDecodeRows, at / units * kTokens);
  }
}

}  // namespace sk::cuda
