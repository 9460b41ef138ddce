// The cutting of a product: every stage of every tile is done once, and of the blocks that share a tile each agrees on
// who they are.
#include <string>
#include <vector>

#include "check.h"
#include "cuda/plan.h"
#include "cuda/tile_scheduler.cuh"

using namespace sk;
namespace ptx = sk::ptx;

namespace {

struct Rows {
  const int* starts;  // [count + 1]
  int count;

  SK_DEVICE int row_tiles() const { return count; }
  SK_DEVICE int stage_start(int row) const { return ptx::load_global_nc(starts + row); }
  SK_DEVICE int row_of(int stage) const {
    int row = 0;
    while (stage_start(row + 1) <= stage) ++row;
    return row;
  }
};

// done[token tile][stage]: how often; slots[block][2]: how often a block's parts were used.
__global__ void cover(Rows rows, int token_tiles, int whole_tiles, int* done, int* slots,
                      int* bad) {
  if (ptx::thread_index() != 0) return;
  cuda::TileScheduler<Rows> scheduler(rows, token_tiles, whole_tiles);
  const int stages = rows.stage_start(rows.row_tiles());
  cuda::Work work;
  while (scheduler.next(work)) {
    for (int s = work.begin; s < work.end; ++s)
      ptx::atomic_add(done + work.token_tile * stages + rows.stage_start(work.row_tile) + s, 1);
    if (work.begin >= work.end || work.end > work.stages) ptx::atomic_add(bad, 1);
    if (work.whole()) continue;
    const int block = ptx::block_index();
    const int first = scheduler.first_sharer(work), last = scheduler.last_sharer(work);
    // The first sharer has the tile's first stage, the last one its last, and only they.
    if (block < first || block > last || first == last) ptx::atomic_add(bad, 1);
    if ((work.begin == 0) != (block == first)) ptx::atomic_add(bad, 1);
    if ((work.end == work.stages) != (block == last)) ptx::atomic_add(bad, 1);
    ptx::atomic_add(slots + 2 * block + scheduler.slot(work, block), 1);
  }
}

void check_cover(const std::vector<int>& stages_of_row, int token_tiles, int whole_tiles,
                 int blocks) {
  std::vector<int> starts{0};
  for (const int stages : stages_of_row) starts.push_back(starts.back() + stages);
  auto starts_buffer = simt::Buffer<int>::input("starts", starts);
  auto done =
      simt::Buffer<int>::in_out("done", std::vector<int>(size_t(token_tiles * starts.back()), 0));
  auto slots = simt::Buffer<int>::in_out("slots", std::vector<int>(size_t(2 * blocks), 0));
  auto bad = simt::Buffer<int>::in_out("bad", {0});
  simt::Launch launch;
  launch.grid = blocks;
  launch.threads = 32;
  launch.kernel = "cover";
  simt::launch(launch, cover, Rows{starts_buffer.data(), int(stages_of_row.size())}, token_tiles,
               whole_tiles, done.data(), slots.data(), bad.data());
  for (const int times : done.values()) CHECK(times == 1);
  for (const int times : slots.values()) CHECK(times <= 1);
  CHECK(bad[0] == 0);
}

// The host's plan for a GPU, and what the device makes of it.
void check_plan(const cuda::TileShape& tile, const cuda::Stages& stages, int64_t m,
                const CudaDevice& gpu) {
  const cuda::Plan p = cuda::plan(tile, stages, m, gpu);
  CHECK(p.tokens >= 1 && p.tokens <= m && p.blocks >= 1);
  CHECK(p.blocks <= cuda::blocks_per_sm(tile, gpu) * gpu.sm_count);
  CHECK(p.token_tiles == ceil_div(p.tokens, int64_t{tile.tokens}));
  CHECK(p.tokens == m || p.tokens % tile.tokens == 0);
  CHECK(stages.all * p.token_tiles < int64_t{1} << 31 || p.token_tiles == 1);
  if (stages.even && stages.row_tiles * p.token_tiles <= 200) {
    const std::vector<int> rows(size_t(stages.row_tiles), int(stages.all / stages.row_tiles));
    check_cover(rows, p.token_tiles, p.whole_tiles, p.blocks);
  }
}

}  // namespace

int main() {
  for (const int blocks : {1, 2, 3, 7, 16}) {
    for (const int tokens : {1, 2, 5}) {
      check_cover({1}, tokens, 0, blocks);
      check_cover({12, 12, 12}, tokens, 0, blocks);
      check_cover({12, 12, 12}, tokens, tokens, blocks);  // some whole, some shared
      check_cover({12, 12, 12}, tokens, 3 * tokens, blocks);
      check_cover(std::vector<int>(37, 3), tokens, 0, blocks);  // more than two bands
      check_cover(std::vector<int>(37, 3), tokens, 20, blocks);
      check_cover({1, 40, 1, 1, 7, 23, 1, 2, 2, 90, 1}, tokens, 0, blocks);  // as blocks have them
    }
  }
  CudaDevice gpu;
  gpu.sm_count = 4;
  gpu.shared_per_block = 99 << 10, gpu.shared_per_sm = 100 << 10;
  const cuda::TileShape tile{128, 128, 2, 25 << 10, 75 << 10, 2048};
  CHECK(cuda::blocks_per_sm(tile, gpu) == 1);
  for (const int64_t m : {int64_t{1}, int64_t{128}, int64_t{129}, int64_t{1000}, int64_t{1} << 20,
                          int64_t{1} << 31}) {
    for (const int64_t row_tiles : {1, 3, 4, 5, 40}) {
      for (const int64_t stages : {1, 7, 64}) {
        check_plan(tile, {row_tiles, row_tiles * stages, true}, m, gpu);
        check_plan(tile, {row_tiles, row_tiles * stages, false}, m, gpu);
      }
    }
  }
  // Shared memory: two blocks where the SM has it for two, none where one does not fit.
  gpu.shared_per_sm = 228 << 10;
  CHECK(cuda::blocks_per_sm(tile, gpu) == 2);
  gpu.shared_per_block = 48 << 10;
  CHECK(cuda::blocks_per_sm(tile, gpu) == 0);
  return 0;
}
