// NEON as the kernels' templates see it: 4 float lanes. Every aarch64 CPU has it, with conversions
// of f16 (but, before ARMv8.2, no arithmetic in f16; sums are f32 anyway).
#pragma once
#include <arm_neon.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/dtype.h"
#include "cpu/weights.h"

namespace sk {
namespace {  // simd_avx2.h: nothing of it may be shared between files of different flags

struct Neon {
  static constexpr int kLanes = 4;
  static constexpr int kRegisters = 32;
  static constexpr bool kLoadsTransposed = false;
  using V = float32x4_t;
  using I = uint32x4_t;

  static V zero() { return vdupq_n_f32(0); }
  static V set1(float v) { return vdupq_n_f32(v); }
  static V load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, V v) { vst1q_f32(p, v); }
  static I load_words(const void* p) {
    return vreinterpretq_u32_u8(vld1q_u8(static_cast<const uint8_t*>(p)));
  }

  // kRows rows, but no more than 4, of a pair of 16-bit numbers each.
  template <int kRows>
  static I load_pairs(const void* p) {
    if constexpr (kRows >= 4) return load_words(p);
    uint64_t words = 0;
    std::memcpy(&words, p, size_t(kRows) * 4);
    return vcombine_u32(vcreate_u32(words), vdup_n_u32(0));
  }

  static V load(const bf16* p) { return as_float(vshlq_n_u32(vmovl_u16(load_halves(p)), 16)); }
  static V load(const f16* p) { return vcvt_f32_f16(vreinterpret_f16_u16(load_halves(p))); }

  // The first `count` (1 to 4) elements; the rest is zero and not read.
  template <class T>
  static V load(const T* p, int count) {
    if (count == kLanes) return load(p);
    T buffer[kLanes] = {};
    for (int i = 0; i < count; ++i) buffer[i] = p[i];
    return load(buffer);
  }
  template <class T>
  static void store(T* p, V v, int count) {
    if (count == kLanes) return store_all(p, v);
    T buffer[kLanes];
    store_all(buffer, v);
    for (int i = 0; i < count; ++i) p[i] = buffer[i];
  }

  // Keeps a value that is used more than once in its register.
  static V in_register(V v) {
    __asm__("" : "+w"(v));
    return v;
  }

  // One lane of four weights: the multiply-add takes it as it is, without a broadcast.
  struct Lane {
    V four;
    int lane;
  };
  static V fma(Lane a, V b, V c) {
    switch (a.lane) {  // decided when compiling; the instruction wants a constant
      case 0:
        return vfmaq_laneq_f32(c, b, a.four, 0);
      case 1:
        return vfmaq_laneq_f32(c, b, a.four, 1);
      case 2:
        return vfmaq_laneq_f32(c, b, a.four, 2);
      default:
        return vfmaq_laneq_f32(c, b, a.four, 3);
    }
  }
  static V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
  static V add(V a, V b) { return vaddq_f32(a, b); }
  static V sub(V a, V b) { return vsubq_f32(a, b); }
  static V mul(V a, V b) { return vmulq_f32(a, b); }
  static V div(V a, V b) { return vdivq_f32(a, b); }
  static V min(V a, V b) { return vminq_f32(a, b); }  // NaN where one is NaN
  static V max(V a, V b) { return vmaxq_f32(a, b); }
  static V round(V a) { return vrndnq_f32(a); }
  // In two steps, so that results in the subnormal range come out too; |n| <= 252.
  static V times_power_of_two(V a, V n) {
    const int32x4_t whole = vcvtnq_s32_f32(n), half = vshrq_n_s32(whole, 1);
    return mul(mul(a, power_of_two(half)), power_of_two(vsubq_s32(whole, half)));
  }

  // A pair of 16-bit numbers in each word: the low ones and the high ones as floats.
  static V low_bf16(I words) { return as_float(vshlq_n_u32(words, 16)); }
  static V high_bf16(I words) { return as_float(vandq_u32(words, vdupq_n_u32(0xffff0000u))); }
  static V low_f16(I words) { return vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(words))); }
  static V high_f16(I words) { return vcvt_f32_f16(vreinterpret_f16_u16(vshrn_n_u32(words, 16))); }

  // Row nibbles of format nm_rows16 in the low bits of each lane: rows 4 quarter to 4 quarter + 3.
  static I row_nibbles(const uint64_t* word, int quarter) {
    static constexpr int32_t kRight[4] = {0, 0, -4, -4};
    const int32x4_t shift = vsubq_s32(vld1q_s32(kRight), vdupq_n_s32(8 * quarter));
    return vshlq_u32(vreinterpretq_u32_u64(vdupq_n_u64(*word)), shift);
  }
  static I shift_right_2(I a) { return vshrq_n_u32(a, 2); }
  // table[index & 3] for a table of four floats.
  static V pick4(const float* table, I index) {
    const uint8x16_t bytes = vreinterpretq_u8_f32(vld1q_f32(table));
    return as_float(vqtbl1q_u8(bytes, byte_index(vandq_u32(index, vdupq_n_u32(3)))));
  }
  // table[index & 15]; reads 16 floats.
  static V pick16(const float* table, I index) {
    const uint8x16x4_t bytes = vld1q_u8_x4(reinterpret_cast<const uint8_t*>(table));
    return as_float(vqtbl4q_u8(bytes, byte_index(vandq_u32(index, vdupq_n_u32(15)))));
  }

  // v[i] lane j <-> v[j] lane i.
  static void transpose(V v[4]) {
    const V a = vtrn1q_f32(v[0], v[1]), b = vtrn2q_f32(v[0], v[1]);
    const V c = vtrn1q_f32(v[2], v[3]), d = vtrn2q_f32(v[2], v[3]);
    v[0] = vcombine_f32(vget_low_f32(a), vget_low_f32(c));
    v[1] = vcombine_f32(vget_low_f32(b), vget_low_f32(d));
    v[2] = vcombine_f32(vget_high_f32(a), vget_high_f32(c));
    v[3] = vcombine_f32(vget_high_f32(b), vget_high_f32(d));
  }

 private:
  template <class T>
  static uint16x4_t load_halves(const T* p) {
    static_assert(sizeof(T) == 2);
    return vld1_u16(&p->bits);
  }
  static void store_all(float* p, V v) { vst1q_f32(p, v); }
  static void store_all(bf16* p, V v) { vst1_u16(&p->bits, narrow(v)); }
  static void store_all(f16* p, V v) {
    vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(v)));  // to nearest even
  }

  static V as_float(I bits) { return vreinterpretq_f32_u32(bits); }
  static V as_float(uint8x16_t bytes) { return vreinterpretq_f32_u8(bytes); }
  static V power_of_two(int32x4_t n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23));
  }
  // bf16 by round to nearest even; NaN stays a NaN.
  static uint16x4_t narrow(V v) {
    const I bits = vreinterpretq_u32_f32(v);
    const I odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const I rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const I quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet), 16);
  }
  // Index i of a float to the indices of its bytes: 4i, 4i + 1, 4i + 2, 4i + 3.
  static uint8x16_t byte_index(I index) {
    return vreinterpretq_u8_u32(vmlaq_u32(vdupq_n_u32(0x03020100), index, vdupq_n_u32(0x04040404)));
  }
};

// Up to four rows are loaded, and converted, at once.
template <>
struct Weights<Neon> {
  using One = Neon::Lane;

  template <int kRows>
  static One row(const float* rows, int r) {
    if constexpr (kRows >= 4) return {Neon::load(rows + r / 4 * 4), r % 4};
    if constexpr (kRows == 2) return {vcombine_f32(vld1_f32(rows), vdup_n_f32(0)), r};
    return {Neon::set1(*rows), 0};
  }
  template <int kRows, class T>
  static One row(const T* rows, int r) {
    if constexpr (kRows >= 4) return {Neon::load(rows + r / 4 * 4), r % 4};
    return {Neon::set1(to_float(rows[r])), 0};
  }
  template <int kRows, class T>
  static One row_of_pairs(const T* pairs, int r, bool second) {
    // A shift, since a choice of two conversions becomes a branch where `second` is not constant.
    const Neon::I words = Neon::load_pairs<kRows>(pairs + r / 4 * 8) >> (second ? 16 : 0);
    if constexpr (std::is_same_v<T, bf16>) return {Neon::low_bf16(words), r % 4};
    return {Neon::low_f16(words), r % 4};
  }
};

}  // namespace
}  // namespace sk
