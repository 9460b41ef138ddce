// What the AVX512-BF16 kernels share: `vdpbf16ps` adds the products of two neighbouring bf16 pairs
// to a float, so the panel of activations holds 32-bit words of two columns.
#pragma once
#include "cpu/simd_avx512.h"
#include "cpu/tiles.h"

namespace sk {
namespace {

inline __m512 dot_bf16(__m512i weights, const float* x, __m512 sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)_mm512_loadu_si512(x));
}

inline __m512i broadcast_word(const bf16* pair) {
  int32_t word;
  std::memcpy(&word, pair, 4);
  return _mm512_set1_epi32(word);
}

// For each 16 tokens and each two pairs of columns: emit(pair, counted from column0, vector of tokens,
// the 16 words of this pair, those of the next).
template <class Emit>
void for_token_words(const MatmulCall& call, int64_t token0, int vectors, int64_t column0,
                     int64_t column1, Emit emit) {
  for_segments(call, column0, column1, [&](const Segment& segment) {
    const int64_t columns = segment.end - segment.begin;
    for (int i = 0; i < vectors; ++i) {
      const bf16* rows[16];
      row_addresses(call, token0 + 16 * int64_t(i), segment, 16, rows);
      for (int64_t c = 0; c < columns; c += 32) {
        const int64_t loaded = std::clamp<int64_t>(segment.filled - segment.begin - c, 0, 32);
        const __mmask32 mask = loaded == 32 ? ~__mmask32(0) : (__mmask32(1) << loaded) - 1;
        __m512 v[16];
        for (int t = 0; t < 16; ++t) {
          v[t] = rows[t] ? _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, rows[t] + c))
                         : _mm512_setzero_ps();
        }
        Avx512::transpose(v);
        const int64_t pairs = std::min<int64_t>(16, (columns - c) / 2);
        for (int64_t p = 0; p < pairs; p += 2) {
          emit((segment.begin - column0 + c) / 2 + p, i, _mm512_castps_si512(v[p]),
               _mm512_castps_si512(v[p + 1]));
        }
      }
    }
  });
}

}  // namespace
}  // namespace sk
