// AVX2 with FMA, F16C and BMI2 as the kernels' templates see it: 8 float lanes.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "core/dtype.h"

namespace sk {
namespace {  // each file that includes this has its own flags; nothing of it may be shared

struct Avx2 {
  static constexpr int kLanes = 8;
  static constexpr int kRegisters = 16;
  static constexpr bool kLoadsTransposed = false;
  using V = __m256;
  using I = __m256i;

  static V zero() { return _mm256_setzero_ps(); }
  static V set1(float v) { return _mm256_set1_ps(v); }
  static I set1(int32_t v) { return _mm256_set1_epi32(v); }
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  static I load_words(const void* p) { return _mm256_loadu_si256(static_cast<const I*>(p)); }

  // The first `count` (1 to 8) elements; the rest is zero and not read.
  static V load(const float* p, int count) { return _mm256_maskload_ps(p, first(count)); }
  static void store(float* p, V v, int count) { _mm256_maskstore_ps(p, first(count), v); }
  static V load(const bf16* p) {
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static V load(const bf16* p, int count) {
    bf16 buffer[8] = {};
    for (int i = 0; i < count; ++i) buffer[i] = p[i];
    return load(buffer);
  }
  static void store(bf16* p, V v, int count) {
    bf16 buffer[8];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(buffer), narrow(v));
    if (count == 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(buffer)));
    } else {
      for (int i = 0; i < count; ++i) p[i] = buffer[i];
    }
  }

  // Keeps a value that is used more than once in its register: GCC would rather load it again each
  // time.
  static V in_register(V v) {
    __asm__("" : "+x"(v));
    return v;
  }

  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V sub(V a, V b) { return _mm256_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static V div(V a, V b) { return _mm256_div_ps(a, b); }
  static V min(V a, V b) { return _mm256_min_ps(a, b); }  // b where one is NaN
  static V max(V a, V b) { return _mm256_max_ps(a, b); }
  static V round(V a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // In two steps, so that results in the subnormal range come out too; |n| <= 252.
  static V times_power_of_two(V a, V n) {
    const I whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    return mul(mul(a, power_of_two(half)), power_of_two(_mm256_sub_epi32(whole, half)));
  }

  static V low_bf16(I words) { return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16)); }
  static V high_bf16(I words) {
    return _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(int(0xffff0000u))));
  }

  // Row nibbles of format nm_rows16 in the low bits of each lane: rows 0 to 7 or 8 to 15.
  static I row_nibbles(const uint64_t* word, int half) {
    const I shifts = _mm256_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12);
    return _mm256_srlv_epi32(_mm256_srli_epi32(_mm256_set1_epi64x(int64_t(*word)), 16 * half),
                             shifts);
  }
  static I shift_right_2(I a) { return _mm256_srli_epi32(a, 2); }
  static V pick4(const float* table, I index) {
    return _mm256_permutevar_ps(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(table)), index);
  }
  static V pick16(const float* table, I index) {
    const V low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
    const V high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index);
    return _mm256_blendv_ps(low, high,
                            _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));  // bit 3 decides
  }

  static void transpose(V v[8]) {
    V t[8];
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      v[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      v[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      v[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      v[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm256_permute2f128_ps(v[i], v[i + 4], 0x20);
      t[i + 4] = _mm256_permute2f128_ps(v[i], v[i + 4], 0x31);
    }
    for (int i = 0; i < 8; ++i) v[i] = t[i];
  }

 private:
  static I first(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static V power_of_two(I n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }
  static V widen(__m128i words) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
  }
  static __m128i narrow(V v) {
    const I bits = _mm256_castps_si256(v);
    const I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const I rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const I quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const I nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const I high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }
};

}  // namespace
}  // namespace sk
