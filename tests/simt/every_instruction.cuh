// Every function of ptx.cuh, called once: compiled by g++ and run on the emulator, and compiled by nvcc where it is.
#pragma once
#include "cuda/ptx/ptx.cuh"

// One block of 64 threads and 2048 bytes of shared memory. y[i] = 0 for each thread i where all went well.
template <class T>
__global__ void __launch_bounds__(64)
    every_instruction(const __grid_constant__ int scale, const uint4* __restrict__ x, int* counter,
                      uint64_t* least, float* y) {
  namespace ptx = sk::ptx;
  const int thread = ptx::thread_index(), lane = thread % 32;
  const uint32_t mine = ptx::shared_base() + uint32_t(thread) * 16;

  // Four ways into shared memory, all with x[thread].
  ptx::cp_async_16(mine, x + thread);
  ptx::cp_async_commit();
  ptx::cp_async_16(mine + 1024, x + thread, 8);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  ptx::cp_async_wait<0>();
  const uint4 half = ptx::load_shared<uint4>(mine + 1024), whole = ptx::load_global(x + thread);
  bool good = half.x == whole.x && half.y == whole.y && half.z == 0 && half.w == 0;
  ptx::store_shared(mine + 1024, ptx::load_global_nc(x + thread));
  ptx::sync_warp();

  uint32_t row[4];
  const uint32_t warp_rows = ptx::shared_base() + uint32_t(thread - lane) * 16;
  ptx::ldmatrix_x4(row, warp_rows + uint32_t(lane) * 16);
  good = good && row[0] == ptx::load_shared<uint32_t>(warp_rows + uint32_t(lane) * 4);

  // Ones: 16 products a sum, of the dense and of the sparse kind.
  const uint32_t one = ptx::pack2<T>(1.0f, 1.0f);
  const float2 ones = ptx::unpack2<T>(one);
  const uint4 a = {one, one, one, one};
  const uint32_t b[4] = {one, one, one, one};
  float d[4] = {0, 0, 0, 0};
  ptx::mma_m16n8k16<T>(d, a, one, one);
  ptx::mma_sp_m16n8k32<T, 0>(d, a, b, 0x44444444u);
  ptx::mma_sp_m16n8k32<T, 1>(d, a, b, 0xeeeeeeeeu);
  for (int r = 0; r < 4; ++r) good = good && d[r] == 48 * ones.x * ones.y;

  good = good && ptx::shuffle(uint32_t(lane), 5) == 5;
  good = good && ptx::shuffle_xor(uint32_t(lane), 16) == uint32_t(lane ^ 16);

  ptx::atomic_min(least, uint64_t(thread + 1) << 32);

  ptx::store_global(y + thread, good ? 0.0f : 1.0f);
  ptx::fence_gpu();
  ptx::sync_block();
  if (thread == 0 && ptx::atomic_add(counter, scale) == (ptx::block_count() - 1) * scale) {
    ptx::fence_gpu();
    float sum = 0;
    for (int i = 0; i < 64; ++i) sum += ptx::load_global_cg(y + i);
    ptx::store_global(y, sum + float(ptx::block_index()));
  }
}
