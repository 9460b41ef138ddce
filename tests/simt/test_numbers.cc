// pack2 and unpack2 against the definition of the formats, in double.
#include <cmath>
#include <limits>

#include "check.h"
#include "cuda/ptx/ptx.cuh"

namespace {

using sk::ptx::BF16;
using sk::ptx::F16;

template <class T>
struct Format;
template <>
struct Format<F16> {
  static constexpr int kExponentBits = 5, kMantissaBits = 10;
};
template <>
struct Format<BF16> {
  static constexpr int kExponentBits = 8, kMantissaBits = 7;
};

// IEEE 754: sign, exponent with a bias, fraction.
template <class T>
double value_of(uint16_t bits) {
  constexpr int kMantissa = Format<T>::kMantissaBits, kMax = (1 << Format<T>::kExponentBits) - 1,
                kBias = kMax / 2;
  const int exponent = bits >> kMantissa & kMax, fraction = bits & ((1 << kMantissa) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == kMax)
    return fraction ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - kBias - kMantissa);
  return sign * std::ldexp(fraction + (1 << kMantissa), exponent - kBias - kMantissa);
}

template <class T>
uint16_t pack(float value) {
  const uint32_t low = sk::ptx::pack2<T>(value, 1), high = sk::ptx::pack2<T>(1, value);
  CHECK(uint16_t(low) == uint16_t(high >> 16));
  CHECK(low >> 16 == (sk::ptx::pack2<T>(1, 1) & 0xffff));
  return uint16_t(low);
}

template <class T>
void test() {
  constexpr uint16_t kInfinity = ((1 << Format<T>::kExponentBits) - 1) << Format<T>::kMantissaBits;
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const double value = value_of<T>(uint16_t(bits));
    const float2 both = sk::ptx::unpack2<T>(bits | (bits ^ 1) << 16);
    if (value != value) {
      CHECK(both.x != both.x);
      const uint16_t nan = pack<T>(both.x);
      CHECK((nan & 0x7fff) > kInfinity);
      continue;
    }
    CHECK(double(both.x) == value && std::signbit(both.x) == std::signbit(value));
    CHECK(pack<T>(both.x) == bits);
    CHECK(std::isnan(both.y) || double(both.y) == value_of<T>(uint16_t(bits ^ 1)));

    // Half-way to the next of the same sign: the even one; a float nearer by a bit: the nearer one.
    if ((bits & 0x7fff) == kInfinity) continue;
    const uint16_t next = uint16_t(bits + 1);
    // What comes after the largest number, were the exponent one longer.
    const double next_value = (next & 0x7fff) == kInfinity
                                  ? 2 * value - value_of<T>(uint16_t(bits - 1))
                                  : value_of<T>(next);
    const float middle = float((value + next_value) / 2);
    CHECK(double(middle) == (value + next_value) / 2);
    CHECK(pack<T>(middle) == (bits & 1 ? next : bits));
    CHECK(pack<T>(std::nextafter(middle, float(value))) == bits);
    CHECK(pack<T>(std::nextafter(middle, float(next_value))) == next);
  }
  CHECK(pack<T>(std::numeric_limits<float>::max()) == kInfinity);
  CHECK(pack<T>(-std::numeric_limits<float>::max()) == (0x8000 | kInfinity));
  CHECK(pack<T>(std::numeric_limits<float>::infinity()) == kInfinity);
  if (std::is_same_v<T, F16>) CHECK(pack<T>(std::numeric_limits<float>::denorm_min()) == 0);
}

}  // namespace

int main() {
  test<F16>();
  test<BF16>();
}
