// The kernel that calls every instruction, under many schedules.
#include "check.h"
#include "every_instruction.cuh"

template <class T>
void run() {
  std::vector<uint4> values;
  for (unsigned i = 0; i < 64; ++i) values.push_back({i * 4 + 1, i * 4 + 2, i * 4 + 3, i * 4 + 4});
  const auto x = simt::Buffer<uint4>::input("x", values);
  for (uint64_t seed = 0; seed < 50; ++seed) {
    auto counter = simt::Buffer<int>::in_out("counter", {0});
    auto least = simt::Buffer<uint64_t>::in_out("least", {~uint64_t{0}});
    auto y = simt::Buffer<float>::output("y", 64);
    simt::Launch launch;
    launch.threads = 64;
    launch.shared_bytes = 2048;
    launch.seed = seed;
    launch.kernel = "every_instruction";
    simt::launch(launch, every_instruction<T>, 3, x.data(), counter.data(), least.data(), y.data());
    for (size_t i = 0; i < 64; ++i) CHECK(y[i] == 0);
    CHECK(counter[0] == 3);
    CHECK(least[0] == uint64_t{1} << 32);
  }
}

int main() {
  run<sk::ptx::F16>();
  run<sk::ptx::BF16>();
}
