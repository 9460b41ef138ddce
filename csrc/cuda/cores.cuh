// y[m, n] = epilogue(x[m, k] · W[n, k]ᵀ) on CUDA cores, for W as the canonical form holds it: many tokens.
//
// What bounds it. A multiply-add takes a slot of the FP32 pipes (64 a clock on an SM of compute capability 8.0, 128
// on the others) and two operands. The operands come from shared memory, 32 words a clock, so a word must serve
// several multiply-adds: a thread holds 8 x 8 sums and reads 16 words for 64 of them. That works only where the
// rows of a tile want the same columns of x:
//
//   blocks   the rows of a block do. A stage is kDepth kept columns of a block row, from anywhere along k: the
//            multiply-adds of the kept blocks and no others
//   N:M      rows choose their columns one by one. To gather x for each kept weight is a load from shared memory
//            for each multiply-add: a quarter of the FP32 rate (half of it on 8.0), which loses at 2:4 what the
//            zeros save. So a stage is kDepth consecutive columns and W is expanded, zeros and all: as many
//            multiply-adds as dense, half the bytes of W
//
// A block owns a tile of kRows rows of W by kTokens rows of x and goes along k in stages. A thread fetches its
// share of the next stage into registers while it multiplies the present one, then puts it into the other of two
// slots in shared memory, as float32:
//
//   W   [kDepth][kRows]       x   [kDepth][kTokens]
//
// so that neither the stores (32 rows or tokens side by side) nor the loads (16 bytes a thread) meet a bank twice.
#pragma once
#include "cuda/elements.cuh"
#include "cuda/epilogue.cuh"

namespace sk::cuda {

struct OutputParams {
  void* y;                                    // [m, n]
  const void* bias;                           // [n] or null
  const void* residual;                       // [m, n] or null
  int64_t y_row_stride, residual_row_stride;  // in elements
  int64_t m;
  int n;
  int activation;
  bool residual_first;  // before the activation
  bool aligned;         // every row of y and residual and the bias start on four elements
};

template <class T>
class Output {
  using E = Element<T>;
  using Bits = typename E::Bits;
  using Quad = typename E::Quad;

 public:
  SK_DEVICE explicit Output(const OutputParams& p) : p_(p) {}

  SK_DEVICE void store(float sum, int64_t token, int row) const {
    float v[1] = {sum};
    if (p_.bias) v[0] += load(p_.bias, row);
    const float residual =
        p_.residual ? load(p_.residual, token * p_.residual_row_stride + row) : 0.0f;
    if (p_.residual_first) v[0] += residual;
    activate(v, p_.activation);
    if (!p_.residual_first) v[0] += residual;
    ptx::store_global(static_cast<Bits*>(p_.y) + token * p_.y_row_stride + row, E::bits(v[0]));
  }

  // Rows `row` to `row` + 3, as far as they lie before `end`.
  SK_DEVICE void store4(const float (&sums)[4], int64_t token, int row, int end) const {
    const bool whole = p_.aligned && row % 4 == 0 && end - row >= 4;
    float v[4] = {sums[0], sums[1], sums[2], sums[3]};
    if (p_.bias) add(p_.bias, row, whole, end - row, v);
    const int64_t residual = token * p_.residual_row_stride + row;
    if (p_.residual && p_.residual_first) add(p_.residual, residual, whole, end - row, v);
    activate(v, p_.activation);
    if (p_.residual && !p_.residual_first) add(p_.residual, residual, whole, end - row, v);
    Bits* to = static_cast<Bits*>(p_.y) + token * p_.y_row_stride + row;
    if (whole) {
      ptx::store_global(reinterpret_cast<Quad*>(to), E::pack(v));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i < end - row) ptx::store_global(to + i, E::bits(v[i]));
      }
    }
  }

 private:
  SK_DEVICE static float load(const void* from, int64_t at) {
    return E::number(ptx::load_global_nc(static_cast<const Bits*>(from) + at));
  }
  // Four numbers at once, or one by one the first `count` of them.
  SK_DEVICE static void add(const void* base, int64_t at, bool whole, int count, float (&v)[4]) {
    const Bits* from = static_cast<const Bits*>(base) + at;
    float other[4];
    E::unpack(load_some<T>(from, whole, count), other);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] += other[i];
  }

  const OutputParams& p_;
};

// What a block computes at a time and a thread of it: kThreadRows x kThreadTokens sums, in fours.
template <class T_, int kRows_, int kTokens_, int kThreadRows_, int kThreadTokens_, int kDepth_,
          int kBlocksPerSm_>
struct CoresTile {
  using T = T_;
  static constexpr int kRows = kRows_, kTokens = kTokens_, kDepth = kDepth_;
  static constexpr int kThreadRows = kThreadRows_, kThreadTokens = kThreadTokens_;
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kAlongTokens = kTokens / kThreadTokens;  // threads side by side
  static constexpr int kThreads = kRows / kThreadRows * kAlongTokens;
  static constexpr int kWeightBytes = kDepth * kRows * 4, kXBytes = kDepth * kTokens * 4;
  static constexpr int kSharedBytes = 2 * (kWeightBytes + kXBytes);
  static_assert(kSharedBytes <= 48 << 10, "more has to be asked for");
  static_assert(kThreads % 32 == 0 && kThreads % kRows == 0 && kThreads % kTokens == 0,
                "a thread fetches for one row and for one token");
};

// The part of a stage that a thread fetches: every kStep-th chunk of 8 columns of its row or token.
template <class Tile, int kLines>
struct CoresShare {
  static constexpr int kStep = Tile::kThreads / kLines, kChunks = Tile::kDepth / 8;
  static constexpr int kItems = (kChunks + kStep - 1) / kStep;

  SK_DEVICE static int line() { return ptx::thread_index() % kLines; }
  SK_DEVICE static int chunk(int item) { return ptx::thread_index() / kLines + item * kStep; }
  SK_DEVICE static bool there(int item) { return kChunks % kStep == 0 || chunk(item) < kChunks; }
  // Where column `column` of the thread's line stands in a slot.
  SK_DEVICE static uint32_t place(int column) { return uint32_t((column * kLines + line()) * 4); }
  // What was fetched, as float, into a slot.
  template <class E>
  SK_DEVICE static void put(const typename E::Quad (&raw)[kItems][2], uint32_t slot) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (!there(i)) break;
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        float v[4];
        E::unpack(raw[i][q], v);
#pragma unroll
        for (int j = 0; j < 4; ++j) ptx::store_shared(slot + place(chunk(i) * 8 + 4 * q + j), v[j]);
      }
    }
  }
};

// x of a stage: whatever columns Weights names, of the tokens that Source finds.
template <class Tile, class Weights, class Source>
class CoresX {
  using E = Element<typename Tile::T>;
  using Share = CoresShare<Tile, Tile::kTokens>;

 public:
  SK_DEVICE CoresX(const typename Source::Params& p, int64_t token, int64_t m)
      : source_(p, token + Share::line(), m) {}

  SK_DEVICE void fetch(const Weights& weights, int stage) {
#pragma unroll
    for (int i = 0; i < Share::kItems; ++i) {
      if (!Share::there(i)) break;
      const int first = stage * Tile::kDepth + Share::chunk(i) * 8;
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        if (weights.columns_in_fours()) {
          raw_[i][q] = source_.four(weights.column(first + 4 * q));
        } else {
          typename E::Bits bits[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) bits[j] = source_.one(weights.column(first + 4 * q + j));
          raw_[i][q] = E::join(bits);
        }
      }
    }
  }

  SK_DEVICE void put(uint32_t slot) const { Share::template put<E>(raw_, slot); }

 private:
  Source source_;
  typename E::Quad raw_[Share::kItems][2];
};

// sums += a stage. A thread's rows and tokens come in fours that lie as far apart as the tile allows, so that the
// threads of a warp read 16 bytes side by side.
template <class Tile>
SK_DEVICE void multiply_stage(uint32_t weights, uint32_t x,
                              float (&sums)[Tile::kThreadRows][Tile::kThreadTokens]) {
  constexpr int kRowFours = Tile::kThreadRows / 4, kTokenFours = Tile::kThreadTokens / 4;
  const uint32_t from_w = weights + uint32_t(ptx::thread_index() / Tile::kAlongTokens * 16);
  const uint32_t from_x = x + uint32_t(ptx::thread_index() % Tile::kAlongTokens * 16);
#pragma unroll 8
  for (int d = 0; d < Tile::kDepth; ++d) {
    float w[Tile::kThreadRows], v[Tile::kThreadTokens];
#pragma unroll
    for (int i = 0; i < kRowFours; ++i) {
      const float4 f = ptx::load_shared<float4>(
          from_w + uint32_t((d * Tile::kRows + i * (Tile::kRows / kRowFours)) * 4));
      w[4 * i] = f.x, w[4 * i + 1] = f.y, w[4 * i + 2] = f.z, w[4 * i + 3] = f.w;
    }
#pragma unroll
    for (int i = 0; i < kTokenFours; ++i) {
      const float4 f = ptx::load_shared<float4>(
          from_x + uint32_t((d * Tile::kTokens + i * (Tile::kTokens / kTokenFours)) * 4));
      v[4 * i] = f.x, v[4 * i + 1] = f.y, v[4 * i + 2] = f.z, v[4 * i + 3] = f.w;
    }
#pragma unroll
    for (int r = 0; r < Tile::kThreadRows; ++r) {
#pragma unroll
      for (int t = 0; t < Tile::kThreadTokens; ++t) sums[r][t] = fmaf(w[r], v[t], sums[r][t]);
    }
  }
}

// All tiles of a launch, whatever the size of its grid. Needs Tile::kSharedBytes.
template <class Tile, class Weights, class Source>
SK_DEVICE void compute_tiles(const typename Weights::Params& w, const typename Source::Params& x,
                             const OutputParams& out) {
  const uint32_t shared = ptx::shared_base();
  constexpr uint32_t kSlotBytes = Tile::kWeightBytes + Tile::kXBytes;
  uint32_t slot = 0;
  const int row_tiles = Weights::row_tiles(w, out.n);
  const int64_t tiles = row_tiles * ((out.m + Tile::kTokens - 1) / Tile::kTokens);
#pragma unroll 1
  for (int64_t tile = ptx::block_index(); tile < tiles; tile += ptx::block_count()) {
    const int64_t token = tile / row_tiles * Tile::kTokens;
    Weights weights(w, int(tile % row_tiles), out.n);
    CoresX<Tile, Weights, Source> columns(x, token, out.m);
    float sums[Tile::kThreadRows][Tile::kThreadTokens] = {};
    const int stages = weights.stages();
#pragma unroll 1
    for (int stage = -1; stage < stages; ++stage) {
      const uint32_t at = shared + slot;
      if (stage >= 0) {
        weights.put(at, stage);
        columns.put(at + Tile::kWeightBytes);
        ptx::sync_block();  // the stage is there for all, and all are done with the other slot
      }
      if (stage + 1 < stages) {
        weights.fetch(stage + 1);
        columns.fetch(weights, stage + 1);
      }
      if (stage >= 0) {
        multiply_stage<Tile>(at, at + Tile::kWeightBytes, sums);
        slot ^= kSlotBytes;
      }
    }
    const Output<typename Tile::T> output(out);
    constexpr int kRowFours = Tile::kThreadRows / 4, kTokenFours = Tile::kThreadTokens / 4;
    const int row = weights.first_row() + ptx::thread_index() / Tile::kAlongTokens * 4;
    const int64_t first = token + ptx::thread_index() % Tile::kAlongTokens * 4;
    // The next token's sums move up, so that one copy of the code serves all.
#pragma unroll 1
    for (int t = 0; t < Tile::kThreadTokens; ++t) {
      const int64_t at = first + t / 4 * (Tile::kTokens / kTokenFours) + t % 4;
#pragma unroll
      for (int i = 0; i < kRowFours; ++i) {
        const float four[4] = {sums[4 * i][0], sums[4 * i + 1][0], sums[4 * i + 2][0],
                               sums[4 * i + 3][0]};
        if (at < out.m)
          output.store4(four, at, row + i * (Tile::kRows / kRowFours), weights.end_row());
      }
#pragma unroll
      for (int r = 0; r < Tile::kThreadRows; ++r) {
#pragma unroll
        for (int next = 1; next < Tile::kThreadTokens; ++next) sums[r][next - 1] = sums[r][next];
      }
    }
  }
}

template <class Tile, class Weights, class Source>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    cores(const __grid_constant__ typename Weights::Params w,
          const __grid_constant__ typename Source::Params x,
          const __grid_constant__ OutputParams out) {
  compute_tiles<Tile, Weights, Source>(w, x, out);
}

}  // namespace sk::cuda
