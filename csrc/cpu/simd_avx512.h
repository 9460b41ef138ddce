// AVX-512 (F, BW, DQ, VL) as the kernels' templates see it: 16 float lanes.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "core/dtype.h"

namespace sk {
namespace {  // each file that includes this has its own flags; nothing of it may be shared

struct Avx512 {
  static constexpr int kLanes = 16;
  static constexpr int kRegisters = 32;
  using V = __m512;
  using I = __m512i;

  static V zero() { return _mm512_setzero_ps(); }
  static V set1(float v) { return _mm512_set1_ps(v); }
  static I set1(int32_t v) { return _mm512_set1_epi32(v); }
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  static I load_words(const void* p) { return _mm512_loadu_si512(p); }
  static __mmask16 first(int count) { return __mmask16((1u << count) - 1); }

  // The first `count` (1 to 16) elements; the rest is zero and not read.
  static V load(const float* p, int count) { return _mm512_maskz_loadu_ps(first(count), p); }
  static void store(float* p, V v, int count) { _mm512_mask_storeu_ps(p, first(count), v); }
  static V load(const bf16* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static V load(const bf16* p, int count) {
    return widen(_mm256_maskz_loadu_epi16(first(count), p));
  }
  static void store(bf16* p, V v, int count) {
    _mm256_mask_storeu_epi16(p, first(count), narrow(v));
  }

  // Keeps a value that is used more than once in its register: GCC would rather load it again each
  // time.
  static V in_register(V v) {
    __asm__("" : "+v"(v));
    return v;
  }

  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static V div(V a, V b) { return _mm512_div_ps(a, b); }
  static V min(V a, V b) { return _mm512_min_ps(a, b); }  // b where one is NaN
  static V max(V a, V b) { return _mm512_max_ps(a, b); }
  static V round(V a) { return _mm512_roundscale_ps(a, 8); }
  static V times_power_of_two(V a, V n) { return _mm512_scalef_ps(a, n); }

  // A pair of bf16 in each word: the low one and the high one as floats.
  static V low_bf16(I words) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); }
  static V high_bf16(I words) {
    return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(int(0xffff0000u))));
  }

  // Row nibbles of format nm_rows16 in the low bits of each lane; `half` is 0: all 16 rows at once.
  static I row_nibbles(const uint64_t* word, int) {
    const I shifts = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
    return _mm512_srlv_epi32(_mm512_set1_epi64(int64_t(*word)), shifts);
  }
  static I shift_right_2(I a) { return _mm512_srli_epi32(a, 2); }
  // table[index & 3] for a table of four floats.
  static V pick4(const float* table, I index) {
    return _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(table)), index);
  }
  // table[index & 15]; reads 16 floats.
  static V pick16(const float* table, I index) {
    return _mm512_permutexvar_ps(index, _mm512_loadu_ps(table));
  }

  // to[c] lane r = rows[r][column + c]. Loads of four columns, each into its place, leave half of
  // transpose()'s shuffles.
  static constexpr bool kLoadsTransposed = true;
  static void load_transposed(const float* const (&rows)[16], int64_t column, V (&to)[4]) {
    V v[4];
    for (int i = 0; i < 4; ++i) {
      const auto four = [&](int r) { return _mm_loadu_ps(rows[i + r] + column); };
      v[i] = _mm512_castps128_ps512(four(0));
      v[i] = _mm512_mask_broadcast_f32x4(v[i], 0x00f0, four(4));
      v[i] = _mm512_mask_broadcast_f32x4(v[i], 0x0f00, four(8));
      v[i] = _mm512_mask_broadcast_f32x4(v[i], 0xf000, four(12));
    }
    const V low01 = _mm512_unpacklo_ps(v[0], v[1]), high01 = _mm512_unpackhi_ps(v[0], v[1]),
            low23 = _mm512_unpacklo_ps(v[2], v[3]), high23 = _mm512_unpackhi_ps(v[2], v[3]);
    to[0] = unpack_pairs<false>(low01, low23);
    to[1] = unpack_pairs<true>(low01, low23);
    to[2] = unpack_pairs<false>(high01, high23);
    to[3] = unpack_pairs<true>(high01, high23);
  }

  // v[i] lane j <-> v[j] lane i.
  static void transpose(V v[16]) {
    V t[16];
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      v[i] = unpack_pairs<false>(t[i], t[i + 2]);
      v[i + 1] = unpack_pairs<true>(t[i], t[i + 2]);
      v[i + 2] = unpack_pairs<false>(t[i + 1], t[i + 3]);
      v[i + 3] = unpack_pairs<true>(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_f32x4(v[i], v[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_f32x4(v[i], v[i + 4], 0xdd);
      t[i + 8] = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0x88);
      t[i + 12] = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
      v[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
      v[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
      v[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
      v[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
    }
  }

 private:
  static V widen(__m256i words) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
  }
  // Round to nearest even; NaN stays a NaN.
  static __m256i narrow(V v) {
    const I bits = _mm512_castps_si512(v);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const I rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const I quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
  }
  template <bool kHigh>
  static V unpack_pairs(V a, V b) {
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return _mm512_castpd_ps(kHigh ? _mm512_unpackhi_pd(x, y) : _mm512_unpacklo_pd(x, y));
  }
};

}  // namespace
}  // namespace sk
