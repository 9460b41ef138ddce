// Threads, warps and blocks: shuffles, barriers, divergence, the order in which things run.
#include <algorithm>
#include <set>

#include "check.h"
#include "cuda/ptx/ptx.cuh"

namespace ptx = sk::ptx;
using simt::Buffer;
using simt::Fault;

namespace {

void test_indices() {
  auto y = Buffer<int>::output("y", 5 * 96);
  simt::launch(
      launch_of(5, 96, 0),
      +[](int* y) {
        ptx::store_global(
            y + ptx::block_index() * 96 + ptx::thread_index(),
            ptx::block_count() * 10000 + ptx::block_index() * 1000 + ptx::thread_index());
      },
      y.data());
  for (int i = 0; i < 5 * 96; ++i) CHECK(y[size_t(i)] == 50000 + i / 96 * 1000 + i % 96);
}

// 9.7.9.7 shfl.sync: .bfly reads lane ^ b, .idx lane b, of which the low five bits count.
void test_shuffles() {
  auto y = Buffer<uint32_t>::output("y", 64 * 4);
  simt::launch(
      launch_of(1, 64, 0),
      +[](uint32_t* y) {
        const int thread = ptx::thread_index();
        ptx::store_global(y + thread * 4, ptx::shuffle_xor(uint32_t(thread), 1));
        ptx::store_global(y + thread * 4 + 1, ptx::shuffle_xor(uint32_t(thread), 31));
        ptx::store_global(y + thread * 4 + 2, ptx::shuffle(uint32_t(thread), thread + 3));
        ptx::store_global(y + thread * 4 + 3, ptx::shuffle(uint32_t(thread), 0));
      },
      y.data());
  for (unsigned i = 0; i < 64; ++i) {
    const unsigned warp = i / 32 * 32, lane = i % 32;
    CHECK(y[i * 4] == warp + (lane ^ 1) && y[i * 4 + 1] == warp + (lane ^ 31));
    CHECK(y[i * 4 + 2] == warp + (lane + 3) % 32 && y[i * 4 + 3] == warp);
  }
}

// ---- divergence --------------------------------------------------------------------------------

template <class Kernel, class... Arguments>
void diverges(const char* text, Kernel kernel, Arguments... arguments) {
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    CHECK_FAULT(simt::launch(launch_of(2, 64, 0, seed), kernel, arguments...), Fault::kDivergence,
                text);
  }
}

void test_divergence() {
  // Some return, others wait for them.
  diverges(
      "threads 0-31 have returned; threads 32-63 wait in sync_block at ", +[] {
        if (ptx::thread_index() < 32) return;
        ptx::sync_block();
      });
  diverges(
      "threads 0-30 have returned; threads 31-63 wait in sync_block at ", +[] {
        if (ptx::thread_index() > 30) ptx::sync_block();
      });
  diverges(
      "threads 0, 32 have returned; threads 1-31, 33-63 wait in shuffle at ", +[] {
        if (ptx::thread_index() % 32 > 0) ptx::shuffle(0, 0);
      });
  // They wait at two places: for each other, or for nobody.
  diverges(
      "another sync_block", +[] {
        if (ptx::thread_index() < 32) {
          ptx::sync_block();
        } else {
          ptx::sync_block();
        }
      });
  diverges(
      "all lanes must come to the same place", +[] {
        if (ptx::thread_index() % 2) {
          ptx::sync_warp();
        } else {
          ptx::sync_warp();
        }
      });
  diverges(
      "all lanes must come to the same place", +[] {
        if (ptx::thread_index() % 2) {
          ptx::sync_warp();
        } else {
          ptx::shuffle(0, 0);
        }
      });
  diverges(
      "no thread can go on: threads 0-31, 33, 35", +[] {
        if (ptx::thread_index() < 32 || ptx::thread_index() % 2) {
          ptx::sync_block();
        } else {
          ptx::sync_warp();
        }
      });
  // Whole warps may go their own way as long as nobody waits for them.
  simt::launch(
      launch_of(2, 64, 0), +[] {
        ptx::sync_block();
        if (ptx::thread_index() < 32) return;
        ptx::sync_warp();
        ptx::shuffle(0, 0);
      });
}

void test_no_progress() {
  auto flag = Buffer<int>::in_out("flag", {0});
  simt::Launch launch = launch_of(1, 32, 0);
  launch.max_instructions = 100'000;
  CHECK_FAULT(simt::launch(
                  launch,
                  +[](int* flag) {
                    while (ptx::load_global_cg(flag) == 0) {
                    }
                  },
                  flag.data()),
              Fault::kNoProgress, "more than 100000 instructions");
}

// Whatever a kernel throws comes out of launch().
void test_other_exceptions() {
  try {
    simt::launch(
        launch_of(2, 64, 0), +[] {
          if (ptx::thread_index() == 40) throw 7;
        });
    CHECK(false);
  } catch (int value) {
    CHECK(value == 7);
  }
}

void test_arguments_of_launch() {
  const auto nothing = +[] {};
  const auto refuses = [&](const simt::Launch& launch, const char* text) {
    try {
      simt::launch(launch, nothing);
      CHECK(false);
    } catch (const std::invalid_argument& error) {
      CHECK(std::string(error.what()).find(text) != std::string::npos);
    }
  };
  refuses(launch_of(0, 32, 0), "grid is 0; at least 1 is needed");
  refuses(launch_of(1, 33, 0), "threads is 33; a multiple of 32 up to 1024 is needed");
  refuses(launch_of(1, 0, 0), "threads is 0");
  refuses(launch_of(1, 1056, 0), "threads is 1056");
  refuses(launch_of(1, 32, -1), "shared_bytes is -1");
  refuses(launch_of(1, 32, 232449), "shared_bytes is 232449; 0 to 232448 are possible");
  simt::Launch launch = launch_of(1, 1024, 232448);
  simt::launch(launch, nothing);
  launch.resident_blocks = 0;
  refuses(launch, "resident_blocks is 0");
  try {
    ptx::thread_index();
    CHECK(false);
  } catch (const std::logic_error& error) {
    CHECK(std::string(error.what()).find("outside of simt::launch") != std::string::npos);
  }
}

// ---- the order of things -----------------------------------------------------------------------

// In which order the threads (or blocks) came to the counter.
std::vector<int> order(int grid, int threads, uint64_t seed, int resident = 2) {
  auto counter = Buffer<int>::in_out("counter", {0});
  auto place = Buffer<int>::output("place", size_t(grid * threads));
  simt::Launch launch = launch_of(grid, threads, 0, seed);
  launch.resident_blocks = resident;
  simt::launch(
      launch,
      +[](int* counter, int* place, int threads) {
        ptx::store_global(place + ptx::block_index() * threads + ptx::thread_index(),
                          ptx::atomic_add(counter, 1));
      },
      counter.data(), place.data(), threads);
  CHECK(counter[0] == grid * threads);
  return place.values();
}

void test_orders() {
  std::set<std::vector<int>> different;
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    const auto first = order(4, 64, seed);
    CHECK(first == order(4, 64, seed));  // a seed gives one order
    different.insert(first);
    auto sorted = first;
    std::sort(sorted.begin(), sorted.end());
    for (int i = 0; i < 256; ++i) CHECK(sorted[size_t(i)] == i);
  }
  CHECK(different.size() == kSeeds);

  // Each block is first under some seed, each lane too, and the warp need not be the first one.
  std::set<int> first_blocks, first_lanes, first_warps;
  for (uint64_t seed = 0; seed < 400; ++seed) {
    const auto place = order(4, 64, seed);
    const int first = int(std::find(place.begin(), place.end(), 0) - place.begin());
    first_blocks.insert(first / 64);
    first_warps.insert(first / 32 % 2);
    first_lanes.insert(first % 32);
  }
  CHECK(first_blocks.size() == 4 && first_warps.size() == 2 && first_lanes.size() == 32);

  // One resident block: the next starts where one has ended. Two: they mix.
  const auto mixed = [](int resident) {
    bool any = false;
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
      const auto place = order(2, 64, seed, resident);
      any = any || *std::max_element(place.begin(), place.begin() + 64) -
                           *std::min_element(place.begin(), place.begin() + 64) >
                       63;
    }
    return any;
  };
  CHECK(!mixed(1));
  CHECK(mixed(2));
}

// Other threads come between two memory accesses of one.
void test_switches_between_accesses() {
  const auto kernel = +[](int* counter, float* scratch, int* apart) {
    const int before = ptx::atomic_add(counter, 1);
    for (int i = 0; i < 50; ++i) ptx::store_global(scratch + ptx::thread_index(), 0.0f);
    if (ptx::atomic_add(counter, 1) != before + 1) ptx::atomic_add(apart, 1);
  };
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    auto counter = Buffer<int>::in_out("counter", {0});
    auto scratch = Buffer<float>::output("scratch", 64);
    auto apart = Buffer<int>::in_out("apart", {0});
    simt::launch(launch_of(1, 64, 0, seed), kernel, counter.data(), scratch.data(), apart.data());
    CHECK(apart[0] > 32);
  }
}

// Each resident block has shared memory of its own.
void test_blocks_do_not_share() {
  auto y = Buffer<int>::output("y", 4 * 32);
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    simt::Launch launch = launch_of(4, 32, 128, seed);
    launch.resident_blocks = 4;
    simt::launch(
        launch,
        +[](int* y) {
          const uint32_t mine = ptx::shared_base() + uint32_t(ptx::thread_index()) * 4;
          ptx::store_shared(mine, ptx::block_index());
          ptx::sync_block();
          ptx::store_global(y + ptx::block_index() * 32 + ptx::thread_index(),
                            ptx::load_shared<int>(mine));
        },
        y.data());
    for (int i = 0; i < 128; ++i) CHECK(y[size_t(i)] == i / 32);
  }
}

}  // namespace

int main() {
  test_indices();
  test_shuffles();
  test_divergence();
  test_no_progress();
  test_other_exceptions();
  test_arguments_of_launch();
  test_orders();
  test_switches_between_accesses();
  test_blocks_do_not_share();
}
