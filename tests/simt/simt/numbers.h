// 16-bit elements, and the sums of a matrix instruction.
#pragma once
#include <cstdint>
#include <cstring>

namespace simt {

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

constexpr uint16_t kNan16 = 0x7fff;  // 9.7.9.22 cvt: what every NaN becomes

// To nearest, ties to even. The carry out of the mantissa makes the next exponent, and infinity after the largest.
inline uint16_t to_bf16(float value) {
  const uint32_t bits = float_bits(value);
  if (value != value) return kNan16;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint16_t to_f16(float value) {
  const uint32_t bits = float_bits(value), magnitude = bits & 0x7fffffff;
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  if (value != value) return kNan16;
  if (magnitude >= 0x47800000) return sign | 0x7c00;  // 65536 and beyond
  if (magnitude < 0x38800000) {
    // Below 2^-14 the steps are 2^-24: those of the float sum with 0.5, whose last bit is worth as much.
    return sign | uint16_t(float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f));
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return sign | uint16_t((rounded >> 13) - (112 << 10));
}

inline float from_bf16(uint16_t bits) { return bits_float(uint32_t(bits) << 16); }

inline float from_f16(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31,
                 mantissa = bits & 1023;
  if (exponent == 0) return bits_float(float_bits(float(mantissa) * 0x1p-24f) | sign);
  if (exponent == 31) return bits_float(sign | 0x7f800000 | mantissa << 13);
  return bits_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

// What the lanes of a warp bring to d[16][8] += a[16][..] b[kDepth][8], put together.
template <int kDepth>
struct WarpMatrices {
  double a[16][16];
  double b[kDepth][8];
  float d[16][8];

  // 9.7.14.5.8, accumulators: lane 4g + q holds in register r row g + 8 (r / 2), column 2q + r % 2.
  void load_d(int lane, const float* from) {
    for (int r = 0; r < 4; ++r) d[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2] = from[r];
  }
  void store_d(int lane, float* to) const {
    for (int r = 0; r < 4; ++r) to[r] = d[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2];
  }
  // d[row] += value * b[k]: the products are exact, every sum is rounded to float.
  void add(int row, double value, int k) {
    for (int n = 0; n < 8; ++n) d[row][n] = float(d[row][n] + value * b[k][n]);
  }
};

}  // namespace simt
