// Every check of global memory: a kernel that breaks the rule is stopped, its correct twin is not.
#include "check.h"
#include "cuda/ptx/ptx.cuh"

namespace ptx = sk::ptx;
using simt::Buffer;
using simt::Fault;

namespace {

std::vector<float> zeros(size_t n) { return std::vector<float>(n); }

void test_bounds() {
  const auto copy = +[](const float* x, float* y, int from, int to) {
    if (ptx::thread_index() == 7) ptx::store_global(y + to, ptx::load_global(x + from));
  };
  const auto x = Buffer<float>::input("x", zeros(10));
  auto y = Buffer<float>::output("y", 10);
  const simt::Launch launch = launch_of(3, 32, 0);
  simt::launch(launch_of(1, 32, 0), copy, x.data(), y.data(), 9, 9);
  CHECK(y.written(9) && !y.written(8) && y[9] == 0);
  CHECK_FAULT(simt::launch(launch, copy, x.data(), y.data(), 10, 0), Fault::kOutOfBounds,
              "thread 7 (warp 0, lane 7), load_global: out of bounds: access of 4 bytes out of "
              "bounds at x + 40 "
              "bytes (x has 40 bytes)");
  CHECK_FAULT(simt::launch(launch, copy, x.data(), y.data(), 0, -1), Fault::kOutOfBounds,
              "y - 4 bytes");
  CHECK_FAULT(simt::launch(launch, copy, x.data(), y.data(), 1 << 20, 0), Fault::kOutOfBounds, "");
  CHECK_FAULT(simt::launch(launch, copy, static_cast<const float*>(nullptr), y.data(), 0, 0),
              Fault::kOutOfBounds, "in no buffer of the test");

  // A wide access that begins inside and ends outside.
  const auto wide =
      +[](const float* x, int from) { ptx::load_global(reinterpret_cast<const uint4*>(x + from)); };
  simt::launch(launch, wide, x.data(), 4);
  CHECK_FAULT(simt::launch(launch, wide, x.data(), 8), Fault::kOutOfBounds, "x + 32 bytes");

  // A buffer that is gone.
  const float* gone = Buffer<float>::input("gone", zeros(10)).data();
  CHECK_FAULT(simt::launch(launch, copy, gone, y.data(), 0, 0), Fault::kOutOfBounds,
              "in no buffer");
}

void test_place() {
  const auto kernel = +[](float* y) { ptx::store_global(y + 1, 0.0f); };
  auto y = Buffer<float>::output("y", 1);
  simt::Launch launch = launch_of(1, 32, 0);
  launch.kernel = "named";
  try {
    simt::launch(launch, kernel, y.data());
    CHECK(false);
  } catch (const simt::Error& error) {
    const std::string message = error.what();
    CHECK(error.block == 0 && error.thread >= 0 && error.thread < 32);
    CHECK(std::string(error.place.file).find("test_global_memory.cc") != std::string::npos);
    CHECK(error.place.line > 0);
    CHECK(message.find("test_global_memory.cc:" + std::to_string(error.place.line) +
                       ": named, block 0, thread ") != std::string::npos);
  }
  // The machine goes on after a fault.
  simt::launch(launch, kernel, y.data() - 1);
  CHECK(y[0] == 0);
}

void test_alignment() {
  const auto kernel = +[](const float* x, int offset) {
    ptx::load_global(reinterpret_cast<const uint4*>(x + offset));
  };
  const auto x = Buffer<float>::input("x", zeros(64));
  CHECK(reinterpret_cast<uintptr_t>(x.data()) % 256 == 0);
  simt::launch(launch_of(1, 32, 0), kernel, x.data(), 4);
  CHECK_FAULT(simt::launch(launch_of(1, 32, 0), kernel, x.data(), 2), Fault::kMisaligned,
              "a multiple of 16, got x + 8 bytes");
}

void test_read_only() {
  const auto kernel = +[](float* x) { ptx::store_global(x + ptx::thread_index(), 1.0f); };
  const auto input = Buffer<float>::input("x", zeros(32));
  CHECK_FAULT(simt::launch(launch_of(1, 32, 0), kernel, input.data()), Fault::kReadOnly,
              "which is an input");
  CHECK(input[5] == 0);
  auto in_out = Buffer<float>::in_out("x", zeros(32));
  simt::launch(launch_of(1, 32, 0), kernel, in_out.data());
  CHECK(in_out[5] == 1);
  const auto count = +[](int* x) { ptx::atomic_add(x, 1); };
  const auto counter = Buffer<int>::input("counter", {0});
  CHECK_FAULT(simt::launch(launch_of(1, 32, 0), count, counter.data()), Fault::kReadOnly,
              "counter + 0");
}

void test_uninitialised() {
  const auto add = +[](float* y) {
    float* mine = y + ptx::thread_index();
    ptx::store_global(mine, ptx::load_global(mine) + 1);
  };
  auto output = Buffer<float>::output("y", 32);
  CHECK(output[3] != output[3]);  // NaN
  CHECK_FAULT(simt::launch(launch_of(1, 32, 0), add, output.data()), Fault::kUninitialised,
              "nobody has written");
  auto in_out = Buffer<float>::in_out("y", zeros(32));
  simt::launch(launch_of(1, 32, 0), add, in_out.data());
  simt::launch(launch_of(1, 32, 0), add, in_out.data());
  CHECK(in_out[31] == 2);

  // cp.async reads too, but only the bytes that it is asked for.
  const auto copy = +[](const float* x, int bytes) {
    ptx::cp_async_16(ptx::shared_base() + uint32_t(ptx::thread_index()) * 16, x, bytes);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
  };
  auto half = Buffer<float>::output("half", 3);
  simt::launch(
      launch_of(1, 32, 0),
      +[](float* y) {
        if (ptx::thread_index() < 2) ptx::store_global(y + ptx::thread_index(), 1.0f);
      },
      half.data());
  simt::launch(launch_of(1, 32, 512), copy, half.data(), 8);
  CHECK_FAULT(simt::launch(launch_of(1, 32, 512), copy, half.data(), 12), Fault::kUninitialised,
              "half + 8 bytes");
  CHECK_FAULT(simt::launch(launch_of(1, 32, 512), copy, half.data(), 16), Fault::kOutOfBounds,
              "half + 0 bytes");
}

void test_non_coherent() {
  const auto kernel = +[](float* x, int shift) {
    const float value = ptx::load_global_nc(x + ptx::thread_index());
    ptx::store_global(x + ptx::thread_index() + shift, value);
  };
  auto x = Buffer<float>::in_out("x", zeros(64));
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    simt::launch(launch_of(1, 32, 0, seed), kernel, x.data(), 32);
    CHECK_FAULT(simt::launch(launch_of(1, 32, 0, seed), kernel, x.data(), 1), Fault::kNonCoherent,
                "x + ");
  }
}

// ---- between blocks ----------------------------------------------------------------------------

void test_blocks_do_not_write_the_same() {
  const auto kernel = +[](float* y, int stride) {
    ptx::store_global(y + ptx::block_index() * stride + ptx::thread_index(), 1.0f);
  };
  auto y = Buffer<float>::output("y", 128);
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    simt::launch(launch_of(4, 32, 0, seed), kernel, y.data(), 32);
    CHECK_FAULT(simt::launch(launch_of(4, 32, 0, seed), kernel, y.data(), 31), Fault::kRace,
                "has written");
  }
}

enum Sum {
  kCorrect,
  kNoFence,
  kNoBarrier,
  kNoAtomic,
  kFirstLevelCache,
  kFencedLoad,
  kFenceBeforeBarrier
};

// Each block writes its part; the last to arrive adds all of them up.
template <Sum kVariant>
__global__ void sum_of_parts(float* parts, int* arrived, int* last, float* y) {
  const int thread = ptx::thread_index(), block = ptx::block_index(), blocks = ptx::block_count();
  ptx::store_global(parts + block * 64 + thread, float(block + 1));
  if (kVariant == kFenceBeforeBarrier) ptx::fence_gpu();
  if (kVariant != kNoBarrier) ptx::sync_block();
  const uint32_t flag = ptx::shared_base();
  if (thread == 0) {
    if (kVariant != kNoFence && kVariant != kFenceBeforeBarrier) ptx::fence_gpu();
    int before = ptx::load_global_cg(last + block);
    if (kVariant != kNoAtomic) before = ptx::atomic_add(arrived, 1);
    if (kVariant == kFencedLoad) ptx::fence_gpu();
    ptx::store_shared(flag, int(before == blocks - 1));
  }
  ptx::sync_block();
  if (!ptx::load_shared<int>(flag)) return;
  float sum = 0;
  for (int i = 0; i < blocks; ++i) {
    const float* part = parts + i * 64 + thread;
    constexpr bool kPlain = kVariant == kFirstLevelCache || kVariant == kFencedLoad;
    sum += kPlain ? ptx::load_global(part) : ptx::load_global_cg(part);
  }
  ptx::store_global(y + thread, sum);
}

constexpr int kBlocks = 6;

template <Sum kVariant>
float run_sum(uint64_t seed) {
  auto parts = Buffer<float>::output("parts", kBlocks * 64);
  auto arrived = Buffer<int>::in_out("arrived", {0});
  // Without the atomic: the block with the highest number, whenever that comes.
  auto last = Buffer<int>::in_out("last", {0, 1, 2, 3, 4, kBlocks - 1});
  auto y = Buffer<float>::output("y", 64);
  simt::Launch launch = launch_of(kBlocks, 64, 16, seed);
  launch.resident_blocks = 1 + int(seed % 3);
  simt::launch(launch, sum_of_parts<kVariant>, parts.data(), arrived.data(), last.data(), y.data());
  for (size_t i = 1; i < 64; ++i) CHECK(y[i] == y[0]);
  return y[0];
}

template <Sum kVariant>
int caught(Fault fault) {
  int count = 0;
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    try {
      run_sum<kVariant>(seed);
    } catch (const simt::Error& error) {
      CHECK(error.fault == fault || error.fault == Fault::kUninitialised);
      ++count;
    }
  }
  return count;
}

void test_order_of_blocks() {
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    CHECK(run_sum<kCorrect>(seed) == 21);
    CHECK(run_sum<kFenceBeforeBarrier>(seed) == 21);
    CHECK(run_sum<kFencedLoad>(seed) == 21);
    CHECK_FAULT(run_sum<kNoFence>(seed), Fault::kRace, "no fence_gpu and atomic_add order the two");
    CHECK_FAULT(run_sum<kFirstLevelCache>(seed), Fault::kRace, "use load_global_cg");
  }
  // These are wrong under some schedules only.
  CHECK(caught<kNoAtomic>(Fault::kRace) == int(kSeeds));
  CHECK(caught<kNoBarrier>(Fault::kRace) >= int(kSeeds) / 2);
}

// Blocks add to one number in the order of their indices; the next one waits for its turn.
template <bool kFence>
__global__ void in_turn(int* turn, float* y) {
  const int thread = ptx::thread_index(), block = ptx::block_index();
  if (thread == 0) {
    while (ptx::load_global_cg(turn) != block) {
    }
  }
  ptx::sync_block();
  ptx::store_global(y + thread, ptx::load_global_cg(y + thread) * 2 + float(block));
  ptx::sync_block();
  if (thread > 0) return;
  if (kFence) ptx::fence_gpu();
  ptx::atomic_add(turn, 1);
}

void test_turns() {
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    auto turn = Buffer<int>::in_out("turn", {0});
    auto y = Buffer<float>::in_out("y", zeros(64));
    simt::Launch launch = launch_of(4, 64, 0, seed);
    launch.resident_blocks = 4;
    simt::launch(launch, in_turn<true>, turn.data(), y.data());
    for (size_t i = 0; i < 64; ++i) CHECK(y[i] == 11);
    turn[0] = 0;
    CHECK_FAULT(simt::launch(launch, in_turn<false>, turn.data(), y.data()), Fault::kRace,
                "which block 0 has written");
  }
}

void test_guard_zones() {
  const auto direct = +[](float* y, int i) {
    if (ptx::thread_index() == 0) y[i] = 1;
  };
  auto y = Buffer<float>::output("y", 10);
  simt::launch(launch_of(1, 32, 0), direct, y.data(), 9);
  CHECK_FAULT(simt::launch(launch_of(1, 32, 0), direct, y.data(), 10), Fault::kBypassedMemory,
              "buffer y");
}

}  // namespace

int main() {
  test_bounds();
  test_place();
  test_alignment();
  test_read_only();
  test_uninitialised();
  test_non_coherent();
  test_blocks_do_not_write_the_same();
  test_order_of_blocks();
  test_turns();
  test_guard_zones();
}
