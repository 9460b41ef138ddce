// Element types: names, sizes, and the scalar conversions that references and packers use.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/error.h"

namespace sk {

inline int dtype_size(int dtype) {
  SK_REQUIRE(dtype == SK_F32 || dtype == SK_BF16 || dtype == SK_F16,
             "dtype: expected f32 (0), bf16 (1) or f16 (2), got ", dtype);
  return dtype == SK_F32 ? 4 : 2;
}

inline const char* dtype_name(int dtype) {
  return dtype == SK_F32 ? "f32" : dtype == SK_BF16 ? "bf16" : dtype == SK_F16 ? "f16" : "?";
}

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

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

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) { return bits_float(uint32_t(value.bits) << 16); }
#if defined(__aarch64__)  // converts f16 itself
inline float to_float(f16 value) {
  __fp16 half;
  std::memcpy(&half, &value, 2);
  return half;
}
#else
inline float to_float(f16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
  const uint32_t exponent = (value.bits >> 10) & 31, mantissa = value.bits & 1023;
  if (exponent == 31) return bits_float(sign | 0x7f800000 | mantissa << 13);
  const float magnitude = exponent ? std::ldexp(float(mantissa + 1024), int(exponent) - 25)
                                   : std::ldexp(float(mantissa), -24);
  return sign ? -magnitude : magnitude;
}
#endif

template <class T>
T from_float(float value);

template <>
inline float from_float<float>(float value) {
  return value;
}
template <>
inline bf16 from_float<bf16>(float value) {  // round to nearest even; NaN stays NaN
  uint32_t bits = float_bits(value);
  if (value != value) return {uint16_t(bits >> 16 | 0x40)};
  bits += 0x7fff + (bits >> 16 & 1);
  return {uint16_t(bits >> 16)};
}
template <>
inline f16 from_float<f16>(float value) {
  const uint32_t bits = float_bits(value);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  const float magnitude = std::fabs(value);
  if (value != value) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 65520.0f) return {uint16_t(sign | 0x7c00)};
  // Let the float unit round: the sum's last place is the f16's last place.
  const uint32_t exponent = bits >> 23 & 255;
  if (exponent < 113) {  // below 2^-14: subnormal, steps of 2^-24
    return {uint16_t(sign | uint16_t(std::nearbyint(std::ldexp(magnitude, 24))))};
  }
  const uint32_t rounded = (bits & 0x7fffffff) + 0xfff + (bits >> 13 & 1);
  return {uint16_t(sign | uint16_t((rounded - (112u << 23)) >> 13))};
}

inline float load_as_float(const void* base, int dtype, int64_t index) {
  if (dtype == SK_F32) return static_cast<const float*>(base)[index];
  if (dtype == SK_BF16) return to_float(static_cast<const bf16*>(base)[index]);
  return to_float(static_cast<const f16*>(base)[index]);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace sk
