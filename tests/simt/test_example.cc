// The example of docs/simt.md.
#include "check.h"
#include "cuda/ptx/ptx.cuh"

// y = x, every 64 numbers in reverse order.
__global__ void __launch_bounds__(64) reverse(const float* __restrict__ x, float* y) {
  namespace ptx = sk::ptx;
  const int thread = ptx::thread_index(), first = ptx::block_index() * 64;
  const uint32_t base = ptx::shared_base();
  ptx::store_shared(base + uint32_t(thread) * 4, ptx::load_global_nc(x + first + thread));
  ptx::sync_block();
  ptx::store_global(y + first + thread, ptx::load_shared<float>(base + uint32_t(63 - thread) * 4));
}

int main() {
  std::vector<float> values(5 * 64);
  for (size_t i = 0; i < values.size(); ++i) values[i] = float(i);
  const auto x = simt::Buffer<float>::input("x", values);  // the kernel may only read it
  for (uint64_t seed = 0; seed < 20; ++seed) {
    auto y =
        simt::Buffer<float>::output("y", values.size());  // may not be read before it is written
    simt::Launch launch;
    launch.grid = 5;
    launch.threads = 64;
    launch.shared_bytes = 256;
    launch.seed = seed;
    launch.kernel = "reverse";
    const simt::Statistics s = simt::launch(launch, reverse, x.data(), y.data());
    for (size_t i = 0; i < y.size(); ++i) CHECK(y[i] == values[i / 64 * 64 + 63 - i % 64]);
    CHECK(s.bank_conflicts() == 0);
    CHECK(s.sectors(simt::Op::kStoreGlobal) * 32 == s.global_bytes_written());
  }
}
