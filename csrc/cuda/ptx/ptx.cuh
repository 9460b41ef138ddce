// The GPU's instructions, one function each: the only place of the project with inline PTX, and the only way
// kernels touch memory or other threads. Compiled with g++ and SPARSEKIT_SIMT defined, the same names come
// from tests/simt/, which executes them with the semantics of the PTX ISA and checks every access.
//
// Sections are those of the PTX ISA 9.0.
#pragma once

#if defined(SPARSEKIT_SIMT)

#include "simt/ptx.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define SK_DEVICE __device__ __forceinline__

namespace sk::ptx {

// Element types of the tensor cores. Kernels hold elements as their bits (uint16_t, or two in a uint32_t).
struct F16 {};
struct BF16 {};

// ---- who am I ------------------------------------------------------------------------------------

SK_DEVICE int thread_index() { return int(threadIdx.x); }
SK_DEVICE int block_index() { return int(blockIdx.x); }
SK_DEVICE int block_count() { return int(gridDim.x); }

// ---- synchronisation -----------------------------------------------------------------------------

SK_DEVICE void sync_block() { __syncthreads(); }
SK_DEVICE void sync_warp() { __syncwarp(); }
// 9.7.13.4 membar/fence: what this thread wrote or saw comes before what it writes next, for the whole GPU.
SK_DEVICE void fence_gpu() { __threadfence(); }
SK_DEVICE int atomic_add(int* address, int value) { return atomicAdd(address, value); }
SK_DEVICE uint64_t atomic_min(uint64_t* address, uint64_t value) {
  return atomicMin(reinterpret_cast<unsigned long long*>(address),
                   static_cast<unsigned long long>(value));
}
SK_DEVICE uint32_t shuffle_xor(uint32_t value, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}
SK_DEVICE uint32_t shuffle(uint32_t value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

// ---- memory --------------------------------------------------------------------------------------

// 9.7.9.8 ld: T is a type of 1, 2, 4, 8 or 16 bytes, the address a multiple of its size.
template <class T>
SK_DEVICE T load_global(const T* address) {
  return *address;
}
// .nc: nobody writes it while the kernel runs.
template <class T>
SK_DEVICE T load_global_nc(const T* address) {
  return __ldg(address);
}
// .cg: from L2, where the writes of other blocks are seen.
template <class T>
SK_DEVICE T load_global_cg(const T* address) {
  return __ldcg(address);
}
template <class T>
SK_DEVICE void store_global(T* address, T value) {
  *address = value;
}

// Shared memory is addressed by 32-bit numbers, as in PTX; the dynamic part starts here, on 1024 bytes.
SK_DEVICE uint32_t shared_base() {
  extern __shared__ __align__(1024) unsigned char dynamic_shared[];
  return uint32_t(__cvta_generic_to_shared(dynamic_shared));
}
template <class T>
SK_DEVICE T load_shared(uint32_t address) {
  return *static_cast<const T*>(__cvta_shared_to_generic(address));
}
template <class T>
SK_DEVICE void store_shared(uint32_t address, T value) {
  *static_cast<T*>(__cvta_shared_to_generic(address)) = value;
}

// 9.7.9.25.3.1 cp.async.cg: 16 bytes to shared memory, of which the first `bytes` (0 to 16) are read and the
// rest is zero. Both addresses are multiples of 16.
SK_DEVICE void cp_async_16(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}
SK_DEVICE void cp_async_16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// 9.7.9.25.3.2 and .3: this thread's copies since its last commit form a group; wait until at most kPending of
// its groups are under way.
SK_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
SK_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- matrices of a warp --------------------------------------------------------------------------

// 9.7.14.5.15 ldmatrix.x4: four 8x8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of
// matrix l / 8 (16 bytes); lane 4g + q receives elements 2q and 2q + 1 of row g of matrix i in to[i].
SK_DEVICE void ldmatrix_x4(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

#define SK_MMA(type)                                                                  \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1))

// 9.7.14.5.8 mma.m16n8k16: d[16][8] += a[16][16] · b[16][8], sums in float32. In lane 4g + q, register r of a
// holds row g + 8 (r % 2), columns 2q + 8 (r / 2) and the next; b0, b1 hold column g, rows 2q + {0, 8} and the
// next; d[r] holds row g + 8 (r / 2), column 2q + r % 2.
template <class T>
SK_DEVICE void mma_m16n8k16(float (&d)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  if constexpr (__is_same(T, F16)) {
    SK_MMA("f16");
  } else {
    SK_MMA("bf16");
  }
}
#undef SK_MMA

// .sp::ordered_metadata promises ascending positions: Blackwell runs the plain spelling at a fraction of its rate,
// to the others both are one.
#define SK_MMA_SPARSE(type)                                                                \
  asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." type "." type \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, "             \
               "{%0, %1, %2, %3}, %12, %13;"                                               \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                            \
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b[0]), "r"(b[1]), "r"(b[2]),  \
                 "r"(b[3]), "r"(metadata), "n"(kSelector))

// 9.7.14.6 mma.sp.m16n8k32: d[16][8] += a[16][32] · b[32][8] with a 2:4 sparse. a holds the 16 kept columns of
// each row as mma_m16n8k16 holds its own; b[i] holds column g, rows 2q + 8i and the next. Lanes 4g + 2 kSelector
// and the next give metadata: for columns 0 to 15 the first, 16 to 31 the second, of row g in the low half and
// row g + 8 in the high half; four bits for each group of four columns, the position of its first kept value in
// the low two.
template <class T, int kSelector>
SK_DEVICE void mma_sp_m16n8k32(float (&d)[4], const uint4& a, const uint32_t (&b)[4],
                               uint32_t metadata) {
  if constexpr (__is_same(T, F16)) {
    SK_MMA_SPARSE("f16");
  } else {
    SK_MMA_SPARSE("bf16");
  }
}
#undef SK_MMA_SPARSE

// ---- numbers -------------------------------------------------------------------------------------

// Two elements in 32 bits, the first in the low half; rounding is to nearest, ties to even.
template <class T>
SK_DEVICE uint32_t pack2(float first, float second) {
  uint32_t bits;
  if constexpr (__is_same(T, F16)) {
    const __half2 v = __floats2half2_rn(first, second);
    __builtin_memcpy(&bits, &v, 4);
  } else {
    const __nv_bfloat162 v = __floats2bfloat162_rn(first, second);
    __builtin_memcpy(&bits, &v, 4);
  }
  return bits;
}
template <class T>
SK_DEVICE float2 unpack2(uint32_t bits) {
  if constexpr (__is_same(T, F16)) {
    __half2 v;
    __builtin_memcpy(&v, &bits, 4);
    return __half22float2(v);
  } else {
    return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
  }
}

}  // namespace sk::ptx

#endif
