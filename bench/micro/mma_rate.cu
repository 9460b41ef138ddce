// What a GPU's tensor cores give at most to kernels that use mma.sync: the rate of m16n8k16, and of the sparse
// m16n8k32, on operands in registers, and with every operand read from shared memory on the way, as a matmul
// does. Prints JSON; operations are those of the dense product.
//
//   nvcc -std=c++17 -O3 -arch=sm_90 -I csrc -o mma_rate bench/micro/mma_rate.cu && ./mma_rate
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/ptx/ptx.cuh"

namespace {

using namespace sk::ptx;

// A warp's tile is that of the large matmul kernels, 64 rows x 64 tokens: 32 sums that do not wait for each other.
constexpr int kRowTiles = 4;
constexpr int kTokenTiles = 8;
constexpr int kMaxThreads = 256;
constexpr int kMatrixBytes = 512;  // what one LDS.128 or one ldmatrix.x4 of a warp reads
constexpr int kStepBytes = (kRowTiles + kTokenTiles) * kMatrixBytes;
constexpr int kSteps = 4;  // of different data, one after the other
constexpr int kSharedBytes = kSteps * kStepBytes;

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "mma_rate: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

__device__ uint32_t scrambled(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// Two numbers from 0.25 to 1 in size, of any sign: with zeros or equal numbers a GPU runs at higher clocks.
template <class T>
__device__ uint32_t random_pair(uint32_t index) {
  const uint32_t r = scrambled(index);
  if constexpr (__is_same(T, F16)) return (r & 0x87ff87ffu) + 0x34003400u;
  return (r & 0x80ff80ffu) + 0x3e803e80u;
}

// Eight groups of four columns keep two: the six legal pairs of positions are 4, 8, 9, 12, 13, 14.
__device__ uint32_t random_metadata(uint32_t index) {
  uint32_t bits = 0;
  for (int group = 0; group < 8; ++group) {
    bits = bits << 4 | (0xedc984u >> (scrambled(index * 8 + group) % 6 * 4) & 15);
  }
  return bits;
}

template <class T, bool kSparse>
__device__ void load(uint32_t address, int lane, uint4 (&a)[kRowTiles],
                     uint32_t (&b)[kTokenTiles][4]) {
  address += lane * 16;
#pragma unroll
  for (uint4& fragment : a) {
    fragment = load_shared<uint4>(address);
    address += kMatrixBytes;
  }
  // A dense step has half the columns: one ldmatrix.x4 serves two tiles of tokens.
#pragma unroll
  for (int token = 0; token < kTokenTiles; token += kSparse ? 1 : 2) {
    ldmatrix_x4(b[token], address);
    if constexpr (!kSparse) b[token + 1][0] = b[token][2], b[token + 1][1] = b[token][3];
    address += kMatrixBytes;
  }
}

template <class T, bool kSparse, bool kLoads>
__global__ void __launch_bounds__(kMaxThreads, 1)
    mma_loop(int rounds, long long* clocks, float* sums) {
  const int thread = thread_index(), lane = thread % 32;
  const uint32_t shared = shared_base();
  for (int at = thread * 4; at < kSharedBytes; at += int(blockDim.x) * 4) {
    store_shared(shared + at, random_pair<T>(at));
  }
  uint4 a[kRowTiles];
  uint32_t b[kTokenTiles][4], metadata[kRowTiles];
  float d[kRowTiles][kTokenTiles][4] = {};
  sync_block();
  load<T, kSparse>(shared, lane, a, b);
#pragma unroll
  for (int row = 0; row < kRowTiles; ++row) metadata[row] = random_metadata(lane * kRowTiles + row);
  sync_block();
  const long long start = clock64();
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    if constexpr (kLoads) load<T, kSparse>(shared + round % kSteps * kStepBytes, lane, a, b);
#pragma unroll
    for (int token = 0; token < kTokenTiles; ++token) {
#pragma unroll
      for (int row = 0; row < kRowTiles; ++row) {
        if constexpr (kSparse) {
          mma_sp_m16n8k32<T, 0>(d[row][token], a[row], b[token], metadata[row]);
        } else {
          mma_m16n8k16<T>(d[row][token], a[row], b[token][0], b[token][1]);
        }
      }
    }
  }
  sync_block();
  const long long end = clock64();
  float sum = 0;
  for (const auto& row : d) {
    for (const auto& token : row) sum += token[0] + token[1] + token[2] + token[3];
  }
  sums[block_index() * int(blockDim.x) + thread] = sum;
  if (thread == 0) clocks[block_index()] = end - start;
}

struct Device {
  cudaDeviceProp properties;
  long long* clocks;
  float* sums;
  cudaEvent_t start, end;
};

// Milliseconds of one launch.
template <class Kernel>
float launch(const Device& device, Kernel kernel, int threads, int rounds) {
  check(cudaEventRecord(device.start));
  kernel<<<device.properties.multiProcessorCount, threads, kSharedBytes>>>(rounds, device.clocks,
                                                                           device.sums);
  check(cudaGetLastError());
  check(cudaEventRecord(device.end));
  check(cudaEventSynchronize(device.end));
  float ms = 0;
  check(cudaEventElapsedTime(&ms, device.start, device.end));
  return ms;
}

template <class T, bool kSparse, bool kLoads>
void measure(const Device& device, int warps, const char* before) {
  const auto kernel = mma_loop<T, kSparse, kLoads>;
  const int sms = device.properties.multiProcessorCount, threads = warps * 32;
  const int few = 2000;
  launch(device, kernel, threads, few);
  // Long enough for the clocks that the GPU can hold under this load.
  const int rounds = int(std::clamp(few * 80.0 / launch(device, kernel, threads, few), 1e3, 1e8));
  std::vector<float> ms(5);
  for (float& one : ms) one = launch(device, kernel, threads, rounds);
  std::sort(ms.begin(), ms.end());
  std::vector<long long> clocks(sms);
  check(cudaMemcpy(clocks.data(), device.clocks, sms * sizeof(long long), cudaMemcpyDeviceToHost));
  const double slowest = double(*std::max_element(clocks.begin(), clocks.end()));
  const double of_sm =
      double(rounds) * warps * kRowTiles * kTokenTiles * 2 * 16 * 8 * (kSparse ? 32 : 16);
  std::printf(
      "%s\n  {\"instruction\": \"%s\", \"dtype\": \"%s\", \"shared_loads\": %s, \"warps_per_sm\": "
      "%d,\n"
      "   \"tflops\": %.1f, \"flops_per_clock_per_sm\": %.0f, \"ms\": %.2f}",
      before, kSparse ? "mma.sp.m16n8k32" : "mma.m16n8k16", __is_same(T, F16) ? "f16" : "bf16",
      kLoads ? "true" : "false", warps, of_sm * sms / ms[ms.size() / 2] / 1e9, of_sm / slowest,
      ms[ms.size() / 2]);
}

template <class T>
void measure_all(const Device& device, const char* before) {
  measure<T, false, false>(device, 4, before);
  measure<T, false, false>(device, 8, ",");
  measure<T, false, true>(device, 8, ",");
  measure<T, true, false>(device, 4, ",");
  measure<T, true, false>(device, 8, ",");
  measure<T, true, true>(device, 8, ",");
}

}  // namespace

int main() {
  Device device{};
  check(cudaGetDeviceProperties(&device.properties, 0));
  const int sms = device.properties.multiProcessorCount;
  check(cudaMalloc(&device.clocks, sms * sizeof(long long)));
  check(cudaMalloc(&device.sums, sms * kMaxThreads * sizeof(float)));
  check(cudaEventCreate(&device.start));
  check(cudaEventCreate(&device.end));
  std::printf("{\"gpu\": \"%s\", \"compute_capability\": \"%d.%d\", \"sm_count\": %d, \"rates\": [",
              device.properties.name, device.properties.major, device.properties.minor, sms);
  measure_all<F16>(device, "");
  measure_all<BF16>(device, ",");
  std::printf("\n]}\n");
  return 0;
}
