// y[m, n] = epilogue(x[m, k] · W[n, k]ᵀ) on tensor cores, for every packed W: the main loop.
//
// A block owns a tile of Tile::kRows rows of W (the m side of the instruction, where the sparse operand must be)
// by Tile::kTokens rows of x (its n side, in steps of 8, so that few tokens waste little). Along k it goes in
// stages of 64 columns through a ring of kStages slots in shared memory:
//
//   W   packed in the order of the registers: copied as it is, read back 16 bytes a lane (weights_*.cuh)
//   x   [token][64 columns] in 128-byte rows; 16-byte chunk c of token t lies at chunk c ^ (t % 8), so that
//       neither the copies nor ldmatrix meet a bank twice
//
// weights_nm.cuh and weights_bsr.cuh say which columns of x a stage takes and multiply it; rows.cuh and pixels.cuh
// copy those columns, of a matrix or of the images that a convolution sees.
#pragma once
#include "cuda/epilogue.cuh"
#include "cuda/tile_scheduler.cuh"

namespace sk::cuda {

struct MatmulParams {
  const uint8_t* weight;  // the packed buffer
  int64_t values_offset, indices_offset, order_offset;
  int k;
  EpilogueParams epilogue;
  int token_tiles, whole_tiles;  // see TileScheduler
  int* counters;                 // one a block, zero before and after
  float* parts;                  // two tiles a block
};

// What a block computes at a time and how its warps share it.
template <class T_, int kRows_, int kTokens_, int kWarpsAlongRows_, int kWarpsAlongTokens_,
          int kStages_, int kBlocksPerSm_>
struct Tile {
  using T = T_;
  static constexpr int kRows = kRows_, kTokens = kTokens_, kStages = kStages_;
  static constexpr int kWarpsAlongRows = kWarpsAlongRows_, kWarpsAlongTokens = kWarpsAlongTokens_;
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kThreads = 32 * kWarpsAlongRows * kWarpsAlongTokens;
  static constexpr int kWarpRows = kRows / kWarpsAlongRows,
                       kWarpTokens = kTokens / kWarpsAlongTokens;
  static constexpr int kRowTiles = kWarpRows / 16,
                       kTokenTiles = kWarpTokens / 8;  // of one instruction
  static constexpr int kXBytes = kTokens * kStageColumns * 2;
  static_assert(kWarpRows % 16 == 0 && kWarpTokens % 8 == 0, "a warp computes whole instructions");
  static_assert(kXBytes / 16 % kThreads == 0 || kThreads % (kXBytes / 16) == 0,
                "copies of x come out even");
};

// The ring, and behind it what the copier of x keeps of a tile.
template <class Tile, class Weights, class Copier>
struct SharedMemory {
  static constexpr int kSlotBytes = Weights::kStageBytes + Tile::kXBytes;
  static constexpr int kRingBytes = Tile::kStages * kSlotBytes;
  static constexpr int kBytes = kRingBytes + Copier::kSharedBytes;
  static_assert(Weights::kStageBytes % 128 == 0, "rows of x start on 128 bytes");
  static_assert(kEpilogueBytes<Tile::kWarpRows, Tile::kWarpTokens> * Tile::kThreads / 32 <=
                    kRingBytes,
                "the epilogue uses the ring");
};

// The part of a stage of x that a thread copies: the same chunk of 8 columns of every kStep-th token.
template <class Tile>
class ChunkCopier {
  static constexpr int kChunks = kStageColumns / 8;

 public:
  static constexpr int kStep = Tile::kThreads / kChunks;
  static constexpr int kCopies = (Tile::kTokens + kStep - 1) / kStep;

  SK_DEVICE static int chunk() { return ptx::thread_index() % kChunks; }
  SK_DEVICE static int first_token() { return ptx::thread_index() / kChunks; }

  // Calls copy(i, token of the tile, where its chunk belongs).
  template <class Copy>
  SK_DEVICE static void each_token(uint32_t slot, Copy copy) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int token = first_token() + i * kStep;
      if (Tile::kTokens % kStep != 0 && token >= Tile::kTokens) break;
      const int turn = (kStep % 8 == 0 ? first_token() : token) % 8;
      copy(i, token, slot + uint32_t(token * 128 + (chunk() ^ turn) * 16));
    }
  }
};

// Parts of a shared tile, in the order of the registers: 16 bytes a thread side by side.
template <int kRowTiles, int kTokenTiles>
SK_DEVICE void store_part(float* part, const float (&sums)[kRowTiles][kTokenTiles][4],
                          int threads) {
  float4* to = reinterpret_cast<float4*>(part) + ptx::thread_index();
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      const float(&s)[4] = sums[i][j];
      ptx::store_global(to + (i * kTokenTiles + j) * threads, float4{s[0], s[1], s[2], s[3]});
    }
  }
}

template <int kRowTiles, int kTokenTiles>
SK_DEVICE void add_part(const float* part, float (&sums)[kRowTiles][kTokenTiles][4], int threads) {
  const float4* from = reinterpret_cast<const float4*>(part) + ptx::thread_index();
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      const float4 v = ptx::load_global_cg(from + (i * kTokenTiles + j) * threads);
      float(&s)[4] = sums[i][j];
      s[0] += v.x, s[1] += v.y, s[2] += v.z, s[3] += v.w;
    }
  }
}

template <class Tile, template <class> class WeightsOf, template <class> class CopierOf>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    matmul_mma(const __grid_constant__ MatmulParams p,
               const __grid_constant__ typename CopierOf<Tile>::Params x_params) {
  using Weights = WeightsOf<Tile>;
  using Shared = SharedMemory<Tile, Weights, CopierOf<Tile>>;
  constexpr int kTileFloats = Tile::kRows * Tile::kTokens;
  const uint32_t shared = ptx::shared_base();
  const int warp = ptx::thread_index() / 32;
  const int warp_row = warp % Tile::kWarpsAlongRows * Tile::kWarpRows;
  const int warp_token = warp / Tile::kWarpsAlongRows * Tile::kWarpTokens;

  Weights weights(p);
  CopierOf<Tile> x(p, x_params, shared + Shared::kRingBytes);
  TileScheduler<Weights> scheduler(weights, p.token_tiles, p.whole_tiles);

  Work work;
  while (scheduler.next(work)) {
    const int64_t token = int64_t(work.token_tile) * Tile::kTokens;
    weights.start_tile(work);
    x.start_tile(token);
    float sums[Tile::kRowTiles][Tile::kTokenTiles][4] = {};

    int copied = work.begin;  // the next stage to copy
    uint32_t write_slot = shared, read_slot = shared;
    const auto advance = [&](uint32_t& slot) {
      slot += Shared::kSlotBytes;
      if (slot == shared + Shared::kRingBytes) slot = shared;
    };
    const auto copy_stage = [&] {
      if (copied < work.end) {
        weights.copy(write_slot, copied);
        x.copy(write_slot + Weights::kStageBytes, weights.column(copied, x.chunk()));
        advance(write_slot);
        ++copied;
      }
      ptx::cp_async_commit();  // an empty group, too: the wait below counts groups
    };
    // The ring is free, the last tile's epilogue is over; x has started the tile.
    ptx::sync_block();
#pragma unroll 1
    for (int s = 0; s < Tile::kStages - 1; ++s) copy_stage();
#pragma unroll 1
    for (int stage = work.begin; stage < work.end; ++stage) {
      ptx::cp_async_wait<Tile::kStages - 2>();
      ptx::sync_block();  // this stage is there for all, and all are done with the one before
      copy_stage();
      weights.multiply(read_slot, warp_row,
                       read_slot + Weights::kStageBytes + uint32_t(warp_token * 128), sums);
      advance(read_slot);
    }
    ptx::cp_async_wait<0>();
    ptx::sync_block();  // now the ring may hold other things

    if (!work.whole()) {
      const auto part = [&](int block) {
        return p.parts + (2 * int64_t(block) + scheduler.slot(work, block)) * kTileFloats;
      };
      const int first = scheduler.first_sharer(work), last = scheduler.last_sharer(work);
      store_part(part(ptx::block_index()), sums, Tile::kThreads);
      ptx::fence_gpu();
      ptx::sync_block();
      if (ptx::thread_index() == 0) {
        const int arrived = ptx::atomic_add(p.counters + first, 1);
        ptx::fence_gpu();
        ptx::store_shared(shared, arrived);
      }
      ptx::sync_block();
      if (ptx::load_shared<int>(shared) != last - first)
        continue;  // somebody else will finish the tile
      if (ptx::thread_index() == 0) ptx::store_global(p.counters + first, 0);
      ptx::sync_block();  // the epilogue overwrites the count
#pragma unroll
      for (auto& row : sums) {
#pragma unroll
        for (auto& tile : row) tile[0] = tile[1] = tile[2] = tile[3] = 0;
      }
      for (int block = first; block <= last; ++block) add_part(part(block), sums, Tile::kThreads);
    }
    store_tile<typename Tile::T>(
        p.epilogue, sums, work.row_tile * Tile::kRows + warp_row, token + warp_token,
        shared + uint32_t(warp * kEpilogueBytes<Tile::kWarpRows, Tile::kWarpTokens>));
  }
}

}  // namespace sk::cuda
