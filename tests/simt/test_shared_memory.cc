// Every check of shared memory and of cp.async: a kernel that breaks the rule is stopped, its correct twin is not.
#include "check.h"
#include "cuda/ptx/ptx.cuh"

namespace ptx = sk::ptx;
using simt::Buffer;
using simt::Fault;

namespace {

// Calls the kernel under every seed: it runs, or it fails each time.
template <class Kernel, class... Arguments>
void passes(int threads, int shared_bytes, Kernel kernel, Arguments... arguments) {
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    simt::launch(launch_of(3, threads, shared_bytes, seed), kernel, arguments...);
  }
}
template <class Kernel, class... Arguments>
void fails(int threads, int shared_bytes, Fault fault, const char* text, Kernel kernel,
           Arguments... arguments) {
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    CHECK_FAULT(simt::launch(launch_of(3, threads, shared_bytes, seed), kernel, arguments...),
                fault, text);
  }
}

void test_bounds_and_alignment() {
  const auto kernel = +[](int offset) {
    if (ptx::thread_index() == 3)
      ptx::store_shared(ptx::shared_base() + uint32_t(offset), uint2{1, 2});
  };
  passes(32, 64, kernel, 56);
  fails(32, 64, Fault::kOutOfBounds, "shared_base() + 64; the block has 64 bytes", kernel, 64);
  fails(32, 64, Fault::kOutOfBounds, "shared_base() + 60", kernel, 60);
  fails(32, 64, Fault::kOutOfBounds, "shared_base() + -8", kernel, -8);
  fails(32, 64, Fault::kMisaligned, "a multiple of 8", kernel, 4);
  fails(32, 0, Fault::kOutOfBounds, "has 0 bytes", kernel, 0);
  fails(32, 64, Fault::kOutOfBounds, "load_shared", +[] { ptx::load_shared<float>(0); });

  const auto matrices = +[](int offset) {
    uint32_t to[4];
    ptx::ldmatrix_x4(to, ptx::shared_base() + uint32_t(ptx::thread_index() * 16 + offset));
  };
  passes(32, 512, matrices, 0);
  fails(32, 512, Fault::kMisaligned, "a shared address that is a multiple of 16", matrices, 8);
  fails(32, 512, Fault::kOutOfBounds, "ldmatrix", matrices, 16);
}

void test_poison() {
  const auto kernel = +[](uint32_t* y) {
    ptx::store_global(
        y + ptx::block_index() * 32 + ptx::thread_index(),
        ptx::load_shared<uint32_t>(ptx::shared_base() + uint32_t(ptx::thread_index()) * 4));
    ptx::store_shared(ptx::shared_base() + uint32_t(ptx::thread_index()) * 4, 0u);
  };
  auto y = Buffer<uint32_t>::output("y", 96);
  simt::launch(launch_of(3, 32, 128), kernel, y.data());
  for (uint32_t value : y.values())
    CHECK(value == 0xffffffffu);  // in the second and third block too
}

// ---- races -------------------------------------------------------------------------------------

enum Barrier { kNone, kWarp, kBlock };

template <Barrier kBarrier>
void barrier() {
  if (kBarrier == kWarp) ptx::sync_warp();
  if (kBarrier == kBlock) ptx::sync_block();
}

// A value goes from each thread to the one `distance` further.
template <Barrier kBarrier>
__global__ void pass_on(int distance) {
  const int thread = ptx::thread_index();
  const uint32_t base = ptx::shared_base();
  ptx::store_shared(base + uint32_t(thread) * 4, thread);
  barrier<kBarrier>();
  const int from = (thread + distance) % 64;
  const int value = ptx::load_shared<int>(base + uint32_t(from) * 4);
  if (kBarrier == kBlock && value != from) std::abort();
}

// Each reads what another has, and then writes its own.
template <Barrier kBarrier>
__global__ void overwrite(int distance) {
  const int thread = ptx::thread_index();
  const uint32_t base = ptx::shared_base();
  ptx::load_shared<int>(base + uint32_t((thread + distance) % 64) * 4);
  barrier<kBarrier>();
  ptx::store_shared(base + uint32_t(thread) * 4, thread);
}

template <Barrier kBarrier>
__global__ void write_twice(int distance) {
  const int thread = ptx::thread_index();
  const uint32_t base = ptx::shared_base();
  ptx::store_shared(base + uint32_t(thread) * 4, thread);
  barrier<kBarrier>();
  ptx::store_shared(base + uint32_t((thread + distance) % 64) * 4, thread);
}

void test_races() {
  // 1: within the warp for most threads, but thread 31 needs one of the next warp.
  passes(64, 256, pass_on<kBlock>, 1);
  fails(64, 256, Fault::kRace, "sync", pass_on<kWarp>, 1);
  fails(64, 256, Fault::kRace, "sync", pass_on<kNone>, 1);
  fails(64, 256, Fault::kRace, "no sync_block came between", pass_on<kNone>, 32);
  fails(64, 256, Fault::kRace, "no sync_block came between", pass_on<kWarp>, 32);
  passes(64, 256, pass_on<kNone>, 0);

  passes(64, 256, overwrite<kBlock>, 1);
  fails(64, 256, Fault::kRace, "sync_block", overwrite<kWarp>, 1);
  fails(64, 256, Fault::kRace, "sync", overwrite<kNone>, 1);
  passes(64, 256, overwrite<kNone>, 0);

  passes(64, 256, write_twice<kBlock>, 1);
  fails(64, 256, Fault::kRace, "sync_block", write_twice<kWarp>, 1);
  fails(64, 256, Fault::kRace, "sync", write_twice<kNone>, 1);
  passes(64, 256, write_twice<kNone>, 0);
}

// Within a warp sync_warp is enough, and a shuffle is none.
template <Barrier kBarrier>
__global__ void pass_on_in_warp(bool with_shuffle) {
  const int thread = ptx::thread_index(), lane = thread % 32;
  const uint32_t base = ptx::shared_base() + uint32_t(thread - lane) * 4;
  ptx::store_shared(base + uint32_t(lane) * 4, lane);
  if (with_shuffle) ptx::shuffle(0, 0);
  barrier<kBarrier>();
  ptx::load_shared<int>(base + uint32_t(lane ^ 1) * 4);
}

// Several lanes read, one of them writes: each of the reads counts, not the last one alone.
template <Barrier kBarrier>
__global__ void all_read_one_writes(int writer) {
  const uint32_t base = ptx::shared_base();
  ptx::load_shared<int>(base);
  barrier<kBarrier>();
  if (ptx::thread_index() == writer) ptx::store_shared(base, 1);
}

void test_races_in_a_warp() {
  passes(64, 256, pass_on_in_warp<kWarp>, false);
  fails(64, 256, Fault::kRace, "no sync_warp came between", pass_on_in_warp<kNone>, false);
  fails(64, 256, Fault::kRace, "no sync_warp came between", pass_on_in_warp<kNone>, true);
  passes(32, 256, all_read_one_writes<kWarp>, 5);
  fails(32, 256, Fault::kRace, "no sync_warp", all_read_one_writes<kNone>, 5);
  passes(64, 256, all_read_one_writes<kBlock>, 5);
  fails(64, 256, Fault::kRace, "no sync_block", all_read_one_writes<kWarp>, 5);
  fails(64, 256, Fault::kRace, "sync", all_read_one_writes<kNone>, 5);

  // So does a read before the other's, and the writer's own (shuffles order the three without being a barrier).
  const auto reads_in_turn = +[](int second) {
    const uint32_t base = ptx::shared_base();
    const int thread = ptx::thread_index();
    if (thread == 5) ptx::load_shared<int>(base);
    ptx::shuffle(0, 0);
    if (thread == second) ptx::load_shared<int>(base);
    ptx::shuffle(0, 0);
    if (thread == 5) ptx::store_shared(base, 1);
  };
  passes(32, 256, reads_in_turn, 5);
  fails(32, 256, Fault::kRace, "no sync_warp", reads_in_turn, 6);
  // A read long ago by its own warp, and one just now by the writer itself.
  passes(
      32, 256, +[] {
        const uint32_t base = ptx::shared_base();
        ptx::load_shared<int>(base);
        ptx::sync_warp();
        if (ptx::thread_index() == 9) {
          ptx::load_shared<int>(base);
          ptx::store_shared(base, 1);
        }
      });
  // Neighbouring 16-bit elements of one word belong to two threads.
  passes(
      32, 64, +[] {
        ptx::store_shared(ptx::shared_base() + uint32_t(ptx::thread_index()) * 2, uint16_t(1));
      });
}

// ldmatrix reads for the lanes that receive, not for those that give the addresses.
template <Barrier kBarrier>
__global__ void store_and_ldmatrix() {
  const uint32_t mine = ptx::shared_base() + uint32_t(ptx::thread_index()) * 16;
  ptx::store_shared(mine, uint4{1, 2, 3, 4});
  barrier<kBarrier>();
  uint32_t to[4];
  ptx::ldmatrix_x4(to, mine);
  barrier<kBarrier>();
  ptx::store_shared(mine, uint4{1, 2, 3, 4});
}

void test_ldmatrix_races() {
  passes(64, 1024, store_and_ldmatrix<kWarp>);
  passes(64, 1024, store_and_ldmatrix<kBlock>);
  fails(64, 1024, Fault::kRace, "no sync_warp came between", store_and_ldmatrix<kNone>);
}

// ---- cp.async ----------------------------------------------------------------------------------

enum Copying {
  kRight,
  kNoWait,
  kNoCommit,
  kWaitsForTheOlderOnly,
  kNoBarrier,
  kWaitAfterBarrier,
  kOverwrites,
  kCopiesOverReads,
  kNeverWaits,
};

// Each thread copies its 16 bytes and reads those of another thread of its warp.
template <Copying kVariant>
__global__ void copy_and_read(const uint4* x, uint4* y) {
  const int thread = ptx::thread_index(), other = thread ^ 1;
  const uint32_t base = ptx::shared_base();
  const uint32_t mine = base + uint32_t(thread) * 16;
  if (kVariant == kCopiesOverReads) ptx::load_shared<uint4>(base + uint32_t(other) * 16);
  if (kVariant == kWaitsForTheOlderOnly) {
    ptx::cp_async_16(mine + 1024, x + thread);
    ptx::cp_async_commit();
  }
  ptx::cp_async_16(mine, x + thread);
  if (kVariant != kNoCommit) ptx::cp_async_commit();
  if (kVariant == kOverwrites) ptx::store_shared(mine, uint4{});
  if (kVariant == kNeverWaits) return;
  if (kVariant == kWaitsForTheOlderOnly) {
    ptx::cp_async_wait<1>();
  } else if (kVariant != kNoWait && kVariant != kWaitAfterBarrier) {
    ptx::cp_async_wait<0>();
  }
  if (kVariant != kNoBarrier) ptx::sync_block();
  if (kVariant == kWaitAfterBarrier) ptx::cp_async_wait<0>();
  const uint4 value = ptx::load_shared<uint4>(base + uint32_t(other) * 16);
  ptx::store_global(y + ptx::block_index() * 64 + thread, value);
}

void test_copies() {
  std::vector<uint4> values(64);
  for (unsigned i = 0; i < 64; ++i) values[i] = {i, i + 1, i + 2, i + 3};
  const auto x = Buffer<uint4>::input("x", values);
  auto y = Buffer<uint4>::output("y", 3 * 64);
  passes(64, 2048, copy_and_read<kRight>, x.data(), y.data());
  for (size_t i = 0; i < 64; ++i) CHECK(y[i].x == (i ^ 1) && y[i].w == (i ^ 1) + 3);
  const char* under_way = "has a copy under way";
  fails(64, 2048, Fault::kPendingCopy, under_way, copy_and_read<kNoWait>, x.data(), y.data());
  fails(64, 2048, Fault::kPendingCopy, under_way, copy_and_read<kNoCommit>, x.data(), y.data());
  fails(64, 2048, Fault::kPendingCopy, under_way, copy_and_read<kWaitsForTheOlderOnly>, x.data(),
        y.data());
  fails(64, 2048, Fault::kPendingCopy, under_way, copy_and_read<kOverwrites>, x.data(), y.data());
  fails(64, 2048, Fault::kPendingCopy, "returns with 1 copies under way",
        copy_and_read<kNeverWaits>, x.data(), y.data());
  fails(64, 2048, Fault::kRace, "no sync_warp", copy_and_read<kCopiesOverReads>, x.data(),
        y.data());
  // Without the barrier the other thread's copy may have landed, or not.
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    for (const auto kernel : {copy_and_read<kNoBarrier>, copy_and_read<kWaitAfterBarrier>}) {
      try {
        simt::launch(launch_of(1, 64, 2048, seed), kernel, x.data(), y.data());
        CHECK(false);
      } catch (const simt::Error& error) {
        CHECK(error.fault == Fault::kRace || error.fault == Fault::kPendingCopy);
      }
    }
  }
}

void test_zero_fill() {
  const auto kernel = +[](const uint8_t* x, uint8_t* y, int bytes) {
    const int thread = ptx::thread_index();
    const uint32_t mine = ptx::shared_base() + uint32_t(thread) * 16;
    ptx::cp_async_16(mine, x, bytes);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    for (int i = 0; i < 16; ++i) {
      if (thread == 0) ptx::store_global(y + i, ptx::load_shared<uint8_t>(mine + uint32_t(i)));
    }
  };
  for (int bytes = 0; bytes <= 16; ++bytes) {
    // The source ends where the copy must stop reading.
    std::vector<uint8_t> values(size_t(bytes), uint8_t(7));
    const auto x = Buffer<uint8_t>::input("x", values);
    auto y = Buffer<uint8_t>::output("y", 16);
    simt::launch(launch_of(1, 32, 512), kernel, x.data(), y.data(), bytes);
    for (int i = 0; i < 16; ++i) CHECK(y[size_t(i)] == (i < bytes ? 7 : 0));
  }
  const auto x = Buffer<uint8_t>::input("x", std::vector<uint8_t>(64));
  auto y = Buffer<uint8_t>::output("y", 16);
  fails(32, 512, Fault::kBadOperand, "0 to 16 bytes, not 17", kernel, x.data(), y.data(), 17);
  fails(32, 512, Fault::kBadOperand, "0 to 16 bytes, not -1", kernel, x.data(), y.data(), -1);
  fails(32, 512, Fault::kMisaligned, "a multiple of 16, got x + 8 bytes", kernel, x.data() + 8,
        y.data(), 4);
  // No byte is read: any pointer will do.
  simt::launch(launch_of(1, 32, 512), kernel, static_cast<const uint8_t*>(nullptr), y.data(), 0);

  const auto misplaced = +[](const uint8_t* x) {
    ptx::cp_async_16(ptx::shared_base() + uint32_t(ptx::thread_index()) * 16 + 8, x);
  };
  fails(32, 1024, Fault::kMisaligned, "a multiple of 16", misplaced, x.data());
  fails(
      32, 256, Fault::kOutOfBounds, "cp_async_16",
      +[](const uint8_t* x) {
        ptx::cp_async_16(ptx::shared_base() + uint32_t(ptx::thread_index()) * 16, x);
        ptx::cp_async_commit();
        ptx::cp_async_wait<0>();
      },
      x.data());
}

// The copy reads its source when it is issued, or when it is waited for: both come up.
void test_late_and_early_reads() {
  const auto kernel = +[](uint4* x, uint4* y) {
    const int thread = ptx::thread_index();
    const uint32_t mine = ptx::shared_base() + uint32_t(thread) * 16;
    ptx::cp_async_16(mine, x + thread);
    ptx::cp_async_commit();
    ptx::store_global(x + thread, uint4{2, 2, 2, 2});
    ptx::cp_async_wait<0>();
    ptx::store_global(y + thread, ptx::load_shared<uint4>(mine));
  };
  auto x = Buffer<uint4>::in_out("x", std::vector<uint4>(32, uint4{1, 1, 1, 1}));
  auto y = Buffer<uint4>::output("y", 32);
  simt::launch(launch_of(1, 32, 512), kernel, x.data(), y.data());
  int old = 0;
  for (const uint4& value : y.values()) old += value.x == 1;
  CHECK(old > 4 && old < 28);
}

// wait_group N leaves the N youngest groups under way, an empty one counts.
void test_groups() {
  const auto kernel = +[](const uint4* x, int read) {
    const uint32_t mine = ptx::shared_base() + uint32_t(ptx::thread_index()) * 48;
    ptx::cp_async_16(mine, x);
    ptx::cp_async_16(mine + 16, x);
    ptx::cp_async_commit();
    ptx::cp_async_commit();
    ptx::cp_async_16(mine + 32, x);
    ptx::cp_async_commit();
    ptx::cp_async_wait<2>();
    ptx::load_shared<uint4>(mine);
    ptx::load_shared<uint4>(mine + 16);
    if (read == 1) ptx::load_shared<uint4>(mine + 32);
    ptx::cp_async_wait<1>();
    if (read == 2) ptx::load_shared<uint4>(mine + 32);
    ptx::cp_async_wait<0>();
    ptx::load_shared<uint4>(mine + 32);
  };
  const auto x = Buffer<uint4>::input("x", std::vector<uint4>(1));
  passes(32, 2048, kernel, x.data(), 0);
  fails(32, 2048, Fault::kPendingCopy, "cp_async_16 at ", kernel, x.data(), 1);
  fails(32, 2048, Fault::kPendingCopy, "commit it and wait", kernel, x.data(), 2);
}

// A pipeline of stages, as the matmul kernels have it; it fails without the barrier that frees a stage.
template <bool kFreesStages>
__global__ void pipeline(const uint4* x, uint4* y, int steps) {
  constexpr int kStages = 3;
  const int thread = ptx::thread_index();
  const uint32_t base = ptx::shared_base();
  const auto copy = [&](int step) {
    if (step < steps)
      ptx::cp_async_16(base + uint32_t(step % kStages * 64 + thread) * 16, x + step * 64 + thread);
    ptx::cp_async_commit();
  };
  for (int step = 0; step < kStages - 1; ++step) copy(step);
  uint4 sum = {};
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kStages - 2>();
    if (kFreesStages || step == 0) ptx::sync_block();
    const uint4 value =
        ptx::load_shared<uint4>(base + uint32_t(step % kStages * 64 + 63 - thread) * 16);
    sum.x += value.x;
    copy(step + kStages - 1);
  }
  ptx::cp_async_wait<0>();
  ptx::store_global(y + thread, sum);
}

void test_pipeline() {
  constexpr int kSteps = 20;
  std::vector<uint4> values(64 * kSteps);
  for (unsigned i = 0; i < values.size(); ++i) values[i].x = i;
  const auto x = Buffer<uint4>::input("x", values);
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    auto y = Buffer<uint4>::output("y", 64);
    simt::launch(launch_of(1, 64, 3 * 1024, seed), pipeline<true>, x.data(), y.data(), kSteps);
    for (unsigned i = 0; i < 64; ++i)
      CHECK(y[i].x == 64 * (kSteps * (kSteps - 1) / 2) + kSteps * (63 - i));
    try {
      simt::launch(launch_of(1, 64, 3 * 1024, seed), pipeline<false>, x.data(), y.data(), kSteps);
      CHECK(false);
    } catch (const simt::Error& error) {
      CHECK(error.fault == Fault::kRace || error.fault == Fault::kPendingCopy);
    }
  }
}

}  // namespace

int main() {
  test_bounds_and_alignment();
  test_poison();
  test_races();
  test_races_in_a_warp();
  test_ldmatrix_races();
  test_copies();
  test_zero_fill();
  test_late_and_early_reads();
  test_groups();
  test_pipeline();
}
