// Bank conflicts, sectors and instructions of patterns whose counts are known.
#include "check.h"
#include "cuda/ptx/ptx.cuh"

namespace ptx = sk::ptx;
using simt::Buffer;
using simt::Op;
using simt::Statistics;

namespace {

constexpr int kShared = 32 * 1024;

// Lane l stores a T at the byte offset stride * l.
template <class T>
__global__ void store_strided(int stride) {
  ptx::store_shared(ptx::shared_base() + uint32_t(ptx::thread_index() * stride), T{});
}
template <class T>
__global__ void load_strided(int stride) {
  ptx::load_shared<T>(ptx::shared_base() + uint32_t(ptx::thread_index() * stride));
}

template <class T>
void expect(int stride, uint64_t conflicts) {
  if (stride != 0)
    CHECK(simt::launch(launch_of(1, 32, kShared), store_strided<T>, stride).bank_conflicts() ==
          conflicts);
  const Statistics loads = simt::launch(launch_of(1, 32, kShared), load_strided<T>, stride);
  CHECK(loads.bank_conflicts() == conflicts && loads.bank_conflicts(Op::kLoadShared) == conflicts);
  CHECK(loads.instructions() == 1 && loads.instructions(Op::kLoadShared) == 1);
}

// 32 banks, each a word of 4 bytes wide; an access of n cycles counts n - 1, over the cycles it needs at least.
void test_strides() {
  expect<uint32_t>(4, 0);
  expect<uint32_t>(8, 1);
  expect<uint32_t>(12, 0);  // odd strides, in words, meet every bank
  expect<uint32_t>(16, 3);
  expect<uint32_t>(64, 15);
  expect<uint32_t>(128, 31);
  expect<uint32_t>(132, 0);
  expect<uint32_t>(0, 0);  // one word, for all
  expect<uint16_t>(2, 0);  // two lanes to a word
  expect<uint16_t>(4, 0);
  expect<uint16_t>(8, 1);
  // 8 bytes: half a warp at a time.
  expect<uint2>(8, 0);
  expect<uint2>(16, 2 * 1);
  expect<uint2>(128, 2 * 15);
  // 16 bytes: a quarter.
  expect<uint4>(16, 0);
  expect<uint4>(32, 4 * 1);
  expect<uint4>(128, 4 * 7);
  expect<uint4>(144, 0);
}

// Row r of a tile of 128-byte rows holds its 16-byte chunk c at place c ^ (r % 8), or at c.
template <bool kSwizzled>
__global__ void tile() {
  const int lane = ptx::thread_index();
  const auto address = [&](int row, int chunk) {
    return ptx::shared_base() + uint32_t(row * 128 + (kSwizzled ? chunk ^ (row % 8) : chunk) * 16);
  };
  for (int i = 0; i < 4; ++i)
    ptx::store_shared(address(i * 4 + lane / 8, lane % 8), uint4{});  // along rows
  ptx::sync_warp();
  uint32_t to[4];
  for (int chunk = 0; chunk < 8; chunk += 2) {
    ptx::ldmatrix_x4(to, address(lane % 16, chunk + lane / 16));  // down columns
  }
}

void test_ldmatrix() {
  const Statistics plain = simt::launch(launch_of(1, 32, kShared), tile<false>);
  const Statistics swizzled = simt::launch(launch_of(1, 32, kShared), tile<true>);
  CHECK(plain.bank_conflicts(Op::kStoreShared) == 0 &&
        swizzled.bank_conflicts(Op::kStoreShared) == 0);
  CHECK(plain.bank_conflicts(Op::kLdmatrix) == 4 * 4 * 7);  // eight rows in one group of four banks
  CHECK(swizzled.bank_conflicts(Op::kLdmatrix) == 0);
  CHECK(swizzled.instructions(Op::kLdmatrix) == 4 && swizzled.instructions(Op::kStoreShared) == 4);
}

__global__ void copies(const uint4* x, int from_stride, int to_stride) {
  const int lane = ptx::thread_index() % 32, warp = ptx::thread_index() / 32;
  ptx::cp_async_16(ptx::shared_base() + uint32_t(warp * 8192 + lane * to_stride),
                   x + lane * from_stride);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
}

void test_copies() {
  const auto x = Buffer<uint4>::input("x", std::vector<uint4>(32 * 4));
  const auto run = [&](int from, int to) {
    return simt::launch(launch_of(1, 64, kShared), copies, x.data(), from, to);
  };
  const Statistics good = run(1, 16);
  CHECK(good.bank_conflicts() == 0 && good.sectors(Op::kCpAsync) == 2 * 16);
  CHECK(good.global_bytes_read() == 2 * 512 && good.global_bytes_written() == 0);
  CHECK(good.instructions(Op::kCpAsync) == 2 && good.instructions() == 6);
  const Statistics bad = run(4, 128);
  CHECK(bad.bank_conflicts(Op::kCpAsync) == 2 * 4 * 7 && bad.sectors(Op::kCpAsync) == 2 * 32);
  CHECK(bad.global_bytes_read() == 2 * 512);
}

void test_sectors() {
  const auto kernel = +[](const float* x, float* y, int stride) {
    const int thread = ptx::thread_index();
    ptx::store_global(y + thread * stride, ptx::load_global(x + thread));
  };
  const auto x = Buffer<float>::input("x", std::vector<float>(64));
  auto y = Buffer<float>::output("y", 64 * 8);
  for (const int stride : {1, 2, 8}) {
    const Statistics s = simt::launch(launch_of(1, 64, 0), kernel, x.data(), y.data(), stride);
    CHECK(s.sectors(Op::kLoadGlobal) == 2 * 4);
    CHECK(s.sectors(Op::kStoreGlobal) == uint64_t(2 * 4 * stride));
    CHECK(s.global_bytes_read() == 256 && s.global_bytes_written() == 256);
  }
}

// The n-th time that each lane comes to a line is one instruction, whatever the order in which lanes run, and though
// some lanes come less often.
void test_grouping() {
  const auto kernel = +[] {
    const int lane = ptx::thread_index();
    for (int i = 0; i < (lane < 8 ? 5 : 3); ++i) {
      ptx::store_shared(ptx::shared_base() + uint32_t(lane * 128 + i * 4),
                        0);  // 32 lanes in one bank
    }
    ptx::sync_warp();
    for (int i = 0; i < 10; ++i)
      ptx::store_shared(ptx::shared_base() + uint32_t(i * 128 + lane * 4), 0);
  };
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    const Statistics s = simt::launch(launch_of(1, 32, kShared, seed), kernel);
    CHECK(s.places.size() == 3);
    const auto& first = s.places[0];
    CHECK(first.op == Op::kStoreShared && first.instructions == 5 && first.lanes == 3 * 32 + 2 * 8);
    CHECK(first.bank_conflicts == 3 * 31 + 2 * 7);
    CHECK(s.instructions(Op::kSyncWarp) == 1);
    CHECK(s.bank_conflicts() == first.bank_conflicts);
    CHECK(s.instructions() == 5 + 1 + 10);
    CHECK(std::string(first.place.file).find("test_statistics.cc") != std::string::npos);
  }
}

void test_report() {
  const Statistics s = simt::launch(launch_of(1, 32, kShared), load_strided<uint32_t>, 128);
  const std::string report = s.report();
  CHECK(report.find("31") != std::string::npos);
  CHECK(report.find("load_shared test_statistics.cc:" + std::to_string(s.places[0].place.line)) !=
        std::string::npos);
}

}  // namespace

int main() {
  test_strides();
  test_ldmatrix();
  test_copies();
  test_sectors();
  test_grouping();
  test_report();
}
