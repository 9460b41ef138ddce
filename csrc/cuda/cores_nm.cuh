// N:M weights in the canonical form, of every N, M and vector, on CUDA cores.
//
// Many tokens: a row's part of a stage, expanded (cores.cuh). Few tokens: nm_decode, which is bound by reading W.
// A kept weight of 2:4 in float32 takes 4 bytes and a quarter, and each byte is read once; per token it takes
// a multiply-add and a word of shared memory. An SM gets about 13 bytes of memory a clock (A100, H100) and reads
// 32 words of shared memory, so that up to 8 tokens the gather is faster than memory.
//
// A lane takes a chunk of W, up to 16 columns of a row, 4 kept weights where 16 bytes may be loaded at once, and the
// next lane the next chunk. Which columns of x it meets is known only from the positions; x is laid out so that a
// lane finds all columns of its chunk in banks of its own:
//
//   x   [column of the chunk][chunk][token]      in fours of tokens: [column][four][chunk][4]
//
// A warp computes kRows rows at a time with the same x, all lanes' sums are added up in a tree at the end.
#pragma once
#include "cuda/cores.cuh"
#include "cuda/cores_x.cuh"

namespace sk::cuda {

struct NmParams {
  const void* values;      // [n, slots]
  const uint8_t* indices;  // [ceil(n / vector), index_row_bytes]
  int k;
  int kept, group, vector;
  int slots, index_row_bytes, index_bits;
  bool wide;  // four slots of a row from a multiple of four on may be loaded at once

  __host__ __device__ NmParams(const void* values_, const void* indices_, int n_kept, int m_group,
                               int vector_, int64_t k_, int element_size)
      : values(values_),
        indices(static_cast<const uint8_t*>(indices_)),
        k(int(k_)),
        kept(n_kept),
        group(m_group),
        vector(vector_),
        slots(int((k_ + m_group - 1) / m_group * n_kept)),
        index_row_bytes(int((int64_t{slots} * (m_group > 4 ? 4 : 2) + 7) / 8)),
        index_bits(m_group > 4 ? 4 : 2),
        wide(slots % 4 == 0 &&
             reinterpret_cast<uintptr_t>(values_) % uintptr_t(4 * element_size) == 0) {}
};

// Positions of up to four slots from `slot` on, the first in the lowest bits.
SK_DEVICE uint32_t load_positions(const NmParams& p, const uint8_t* row, int slot, int count) {
  const int64_t bit = int64_t{slot} * p.index_bits;
  const int shift = int(bit % 8), bytes = (shift + count * p.index_bits + 7) / 8;
  uint32_t positions = 0;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    if (i < bytes) positions |= uint32_t{ptx::load_global_nc(row + bit / 8 + i)} << (8 * i);
  }
  return positions >> shift;
}
SK_DEVICE int load_position(const NmParams& p, const uint8_t* row, int slot) {
  const int64_t bit = int64_t{slot} * p.index_bits;
  return ptx::load_global_nc(row + bit / 8) >> (bit % 8) & ((1 << p.index_bits) - 1);
}

template <class Tile>
class NmCores {
  using E = Element<typename Tile::T>;
  using Share = CoresShare<Tile, Tile::kRows>;
  static constexpr int kMostSlots = 8;  // of 8 columns

 public:
  using Params = NmParams;

  SK_DEVICE static int row_tiles(const Params&, int n) {
    return int((int64_t{n} + Tile::kRows - 1) / Tile::kRows);
  }

  SK_DEVICE NmCores(const Params& p, int row_tile, int n)
      : p_(p), first_row_(row_tile * Tile::kRows), end_row_(n) {
    // Past n any row will do, it is not stored.
    const int row = Share::line() < n - first_row_ ? first_row_ + Share::line() : n - 1;
    values_ = static_cast<const typename E::Bits*>(p.values) + int64_t{row} * p.slots;
    indices_ = p.indices + int64_t{row / p.vector} * p.index_row_bytes;
  }

  SK_DEVICE int first_row() const { return first_row_; }
  SK_DEVICE int end_row() const { return end_row_; }
  SK_DEVICE int stages() const { return (p_.k - 1) / Tile::kDepth + 1; }
  SK_DEVICE static bool columns_in_fours() { return true; }
  SK_DEVICE static int column(int at) { return at; }

  SK_DEVICE void fetch(int stage) {
    if (!ahead()) return;
#pragma unroll
    for (int i = 0; i < Share::kItems; ++i) {
      if (!Share::there(i)) break;
      const int slots = 8 / p_.group * p_.kept;
      const int slot = (stage * (Tile::kDepth / 8) + Share::chunk(i)) * slots;
      count_[i] = p_.slots - slot < slots ? p_.slots - slot : slots;
      if (count_[i] <= 0) continue;
      positions_[i] = load_positions(p_, indices_, slot, count_[i]);
      raw_[i] = load_some<typename Tile::T>(values_ + slot, p_.wide && slots == 4, count_[i]);
    }
  }

  // Zeros, and what is kept over them.
  SK_DEVICE void put(uint32_t at, int stage) const {
#pragma unroll
    for (int i = 0; i < Share::kItems; ++i) {
      if (!Share::there(i)) break;
      const int first = Share::chunk(i) * 8;
#pragma unroll
      for (int c = 0; c < 8; ++c) ptx::store_shared(at + Share::place(first + c), 0.0f);
      if (!ahead()) {
        put_late(at, first, stage * Tile::kDepth + first);
        continue;
      }
      float v[4];
      E::unpack(raw_[i], v);
      uint32_t positions = positions_[i];
      int group = first, in_group = 0;
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        if (s >= count_[i]) break;
        const int position = int(positions & ((1u << p_.index_bits) - 1));
        positions >>= p_.index_bits;
        ptx::store_shared(at + Share::place(group + position), v[s]);
        if (++in_group == p_.kept) in_group = 0, group += p_.group;
      }
    }
  }

 private:
  // Whether 8 columns are whole groups of up to four slots, which the registers have room for.
  SK_DEVICE bool ahead() const { return p_.group <= 8 && 8 / p_.group * p_.kept <= 4; }

  // What is kept of the 8 columns from `column` on, loaded where it is needed; `first` is the same in the stage.
  SK_DEVICE void put_late(uint32_t at, int first, int column) const {
    const int slot = column / p_.group * p_.kept;
    const int slots = (p_.group < 8 ? 8 / p_.group : 1) * p_.kept;
    int group = column / p_.group * p_.group - column, in_group = 0;
#pragma unroll 1
    for (int s = 0; s < slots && slot + s < p_.slots; ++s) {
      const int position = group + load_position(p_, indices_, slot + s);
      if (position >= 0 && position < 8)
        ptx::store_shared(at + Share::place(first + position),
                          E::number(ptx::load_global_nc(values_ + slot + s)));
      if (++in_group == p_.kept) in_group = 0, group += p_.group;
    }
  }

  const Params& p_;
  const int first_row_, end_row_;
  const typename E::Bits* values_;
  const uint8_t* indices_;
  int count_[Share::kItems] = {};
  uint32_t positions_[Share::kItems] = {};
  typename E::Quad raw_[Share::kItems] = {};
};

// The tile that fills a GPU best, and one for where there are too few of those.
template <class T>
using NmLarge = CoresTile<T, 128, 64, 8, 8, 16, 3>;
template <class T>
using NmSmall = CoresTile<T, 64, 32, 4, 4, 32, 4>;

// ---- few tokens ----------------------------------------------------------------------------------

constexpr int kDecodeWarps = 8, kDecodeThreads = 32 * kDecodeWarps;
constexpr int kDecodeSharedBytes = 32 << 10;

// How a row is cut into chunks, each of whole groups.
struct NmChunks {
  int groups, columns, slots;  // of a chunk
  int chunks;                  // of a row
  int stage;                   // chunks whose x is in shared memory at a time: a multiple of 32

  __host__ __device__ NmChunks(const NmParams& p, int tokens) {
    groups = p.kept >= 3 ? 1 : 4 / p.kept;
    if (groups * p.group > 16) groups = 16 / p.group;
    columns = groups * p.group, slots = groups * p.kept;
    chunks = (p.k - 1) / columns + 1;
    stage = kDecodeSharedBytes / 4 / (columns * tokens) / 32 * 32;
    if (stage > (chunks - 1) / 32 * 32 + 32) stage = (chunks - 1) / 32 * 32 + 32;
  }
};

// What lane r * kTokens + t has to store: the sum over all lanes of sums[r][t], always added in the same order.
template <int kRows, int kTokens>
SK_DEVICE float sum_of_warp(const float (*sums)[kTokens]) {
  static_assert(kRows * kTokens <= 32, "a lane for each");
  float mine = 0;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      float v = sums[r][t];
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2)
        v += __uint_as_float(ptx::shuffle_xor(__float_as_uint(v), mask));
      if (ptx::thread_index() % 32 == r * kTokens + t) mine = v;
    }
  }
  return mine;
}

// A block's kDecodeWarps * kRows rows, for kTokens tokens. kVector: a warp's rows share their positions, so that one
// word of shared memory serves them all.
template <class T, int kTokens, int kRows, bool kVector>
class NmDecode {
  using E = Element<T>;
  static constexpr int kFour = kTokens < 4 ? kTokens : 4, kFours = kTokens / kFour;
  static constexpr int kAhead = kVector ? 1 : 4;  // chunks of a lane whose loads go out together
  static constexpr int kPositions = kVector ? 1 : kRows;  // lists of them
  using Values = const typename E::Bits* [kRows];
  using Indices = const uint8_t* [kPositions];

 public:
  static constexpr int kBlockRows = kDecodeWarps * kRows;

  SK_DEVICE NmDecode(const NmParams& p, const NmChunks& chunks, const MatrixParams& x,
                     const OutputParams& out)
      : p_(p), c_(chunks), x_(x), out_(out), shared_(ptx::shared_base()) {}

  // All of it, whatever the size of the grid. Needs kDecodeSharedBytes.
  SK_DEVICE static void run_all(const NmParams& p, const NmChunks& chunks, const MatrixParams& x,
                                const OutputParams& out) {
    const NmDecode decode(p, chunks, x, out);
    const int row_blocks = int((int64_t{out.n} + kBlockRows - 1) / kBlockRows);
    const int64_t blocks = row_blocks * ((out.m + kTokens - 1) / kTokens);
#pragma unroll 1
    for (int64_t block = ptx::block_index(); block < blocks; block += ptx::block_count())
      decode.run(int(block % row_blocks), block / row_blocks * kTokens);
  }

 private:
  SK_DEVICE void run(int row_block, int64_t token) const {
    const int lane = ptx::thread_index() % 32, warp = ptx::thread_index() / 32;
    const int64_t first_row = int64_t{row_block} * kBlockRows + warp * kRows;
    Values values;
    Indices indices;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first_row + r < out_.n ? first_row + r : out_.n - 1;  // not stored
      values[r] = static_cast<const typename E::Bits*>(p_.values) + row * p_.slots;
      if (r < kPositions) indices[r] = p_.indices + row / p_.vector * p_.index_row_bytes;
    }
    const bool wide = p_.wide && c_.slots == 4;
    float sums[kRows][kTokens] = {};
#pragma unroll 1
    for (int first = 0; first < c_.chunks; first += c_.stage) {
      ptx::sync_block();  // the stage before has been read
      fill(first, token);
      ptx::sync_block();
      const int count = c_.chunks - first < c_.stage ? c_.chunks - first : c_.stage;
#pragma unroll 1
      for (int at = lane; at < count; at += 32 * kAhead) {
        if (wide) {
          add_wide(values, indices, first, at, count, sums);
        } else {
          for (int i = 0; i < kAhead && at + 32 * i < count; ++i)
            add_chunk(values, indices, first, at + 32 * i, sums);
        }
      }
    }
    constexpr int kTogether = 32 / kTokens < kRows ? 32 / kTokens : kRows;  // rows: a lane a sum
#pragma unroll
    for (int r = 0; r < kRows; r += kTogether) {
      const float sum = sum_of_warp<kTogether, kTokens>(sums + r);
      const int64_t row = first_row + r + lane / kTokens, to = token + lane % kTokens;
      if (lane < kTogether * kTokens && row < out_.n && to < out_.m)
        Output<T>(out_).store(sum, to, int(row));
    }
  }

  SK_DEVICE uint32_t place(int column, int four, int chunk) const {
    return shared_ + uint32_t(((column * kFours + four) * c_.stage + chunk) * kFour * 4);
  }

  // x of the chunks from `first` on, turned around; zeros past k and past m.
  SK_DEVICE void fill(int first, int64_t token) const {
#pragma unroll 1
    for (int four = 0; four < kFours; ++four) {
#pragma unroll 1
      for (int chunk = ptx::thread_index(); chunk < c_.stage; chunk += kDecodeThreads) {
        if (first + chunk >= c_.chunks) break;
#pragma unroll 1
        for (int column = 0; column < c_.columns; column += 4) {
          float v[kFour][4];
#pragma unroll
          for (int t = 0; t < kFour; ++t) {
            const MatrixX<T> x(x_, token + four * kFour + t, out_.m);
            E::unpack(x.four((first + chunk) * c_.columns + column), v[t]);
          }
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const uint32_t to = place(column + j, four, chunk);
            if constexpr (kFour == 4) {
              ptx::store_shared(to, float4{v[0][j], v[1][j], v[2][j], v[3][j]});
            } else {
#pragma unroll
              for (int t = 0; t < kFour; ++t) ptx::store_shared(to + uint32_t(t * 4), v[t][j]);
            }
          }
        }
      }
    }
  }

  // sums += weights of rows that share a column of x, times that.
  template <int kCount>
  SK_DEVICE void add(const float (&weights)[kCount], int column, int chunk,
                     float (*sums)[kTokens]) const {
#pragma unroll
    for (int four = 0; four < kFours; ++four) {
      const uint32_t from = place(column, four, chunk);
      float x[kFour];
      if constexpr (kFour == 4) {
        const float4 v = ptx::load_shared<float4>(from);
        x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
      } else {
#pragma unroll
        for (int t = 0; t < kFour; ++t) x[t] = ptx::load_shared<float>(from + uint32_t(t * 4));
      }
#pragma unroll
      for (int r = 0; r < kCount; ++r) {
#pragma unroll
        for (int t = 0; t < kFour; ++t)
          sums[r][four * kFour + t] = fmaf(weights[r], x[t], sums[r][four * kFour + t]);
      }
    }
  }

  // The kept weights of a slot in all rows, `column(list)` being its column of the chunk by a list of positions.
  template <class Column>
  SK_DEVICE void add_slot(const float (&weights)[kRows], int chunk, float (&sums)[kRows][kTokens],
                          Column column) const {
    if constexpr (kVector) {
      add(weights, column(0), chunk, sums);
    } else {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float weight[1] = {weights[r]};
        add(weight, column(r), chunk, sums + r);
      }
    }
  }

  // kAhead chunks of four slots, 32 chunks apart.
  SK_DEVICE void add_wide(const Values& values, const Indices& indices, int first, int at,
                          int count, float (&sums)[kRows][kTokens]) const {
    typename E::Quad raw[kAhead][kRows];
    uint32_t positions[kAhead][kPositions];
    const int index_bytes = p_.index_bits / 2;  // of four slots
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (at + 32 * i >= count) break;
      const int chunk = first + at + 32 * i;
#pragma unroll
      for (int r = 0; r < kRows; ++r) raw[i][r] = load_some<T>(values[r] + chunk * 4, true, 4);
#pragma unroll
      for (int r = 0; r < kPositions; ++r) {
        const uint8_t* index = indices[r] + int64_t{chunk} * index_bytes;
        positions[i][r] = ptx::load_global_nc(index);
        if (index_bytes == 2) positions[i][r] |= uint32_t{ptx::load_global_nc(index + 1)} << 8;
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (at + 32 * i >= count) break;
      float v[kRows][4];
#pragma unroll
      for (int r = 0; r < kRows; ++r) E::unpack(raw[i][r], v[r]);
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const int group = (p_.kept == 1 ? s : p_.kept == 2 ? s / 2 : 0) * p_.group;
        float weights[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) weights[r] = v[r][s];
        add_slot(weights, at + 32 * i, sums, [&](int list) {
          return group +
                 int(positions[i][list] >> (s * p_.index_bits) & ((1u << p_.index_bits) - 1));
        });
      }
    }
  }

  // Any chunk, slot by slot.
  SK_DEVICE void add_chunk(const Values& values, const Indices& indices, int first, int at,
                           float (&sums)[kRows][kTokens]) const {
    const int slot = (first + at) * c_.slots;
    int group = 0, in_group = 0;
#pragma unroll 1
    for (int s = 0; s < c_.slots && slot + s < p_.slots; ++s) {
      float weights[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        weights[r] = E::number(ptx::load_global_nc(values[r] + slot + s));
      add_slot(weights, at, sums,
               [&](int list) { return group + load_position(p_, indices[list], slot + s); });
      if (++in_group == p_.kept) in_group = 0, group += p_.group;
    }
  }

  const NmParams& p_;
  const NmChunks& c_;
  const MatrixParams& x_;
  const OutputParams& out_;
  const uint32_t shared_;
};

template <class T, int kTokens, int kRows, bool kVector>
__global__ void __launch_bounds__(kDecodeThreads, 2)
    nm_decode(const __grid_constant__ NmParams w, const __grid_constant__ NmChunks chunks,
              const __grid_constant__ MatrixParams x, const __grid_constant__ OutputParams out) {
  NmDecode<T, kTokens, kRows, kVector>::run_all(w, chunks, x, out);
}

}  // namespace sk::cuda
