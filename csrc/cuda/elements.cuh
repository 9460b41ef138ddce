// The element types of kernels that compute in float32: how one and four of them come from memory and go back.
#pragma once
#include "cuda/ptx/ptx.cuh"

namespace sk::cuda {

struct F32 {};  // beside ptx::F16 and ptx::BF16

template <class T>
struct Element {
  using Bits = uint16_t;
  using Quad = uint2;
  SK_DEVICE static float number(Bits bits) { return ptx::unpack2<T>(bits).x; }
  SK_DEVICE static Bits bits(float number) { return Bits(ptx::pack2<T>(number, 0.0f)); }
  SK_DEVICE static void unpack(const Quad& quad, float (&v)[4]) {
    const float2 low = ptx::unpack2<T>(quad.x), high = ptx::unpack2<T>(quad.y);
    v[0] = low.x, v[1] = low.y, v[2] = high.x, v[3] = high.y;
  }
  SK_DEVICE static Quad pack(const float (&v)[4]) {
    return {ptx::pack2<T>(v[0], v[1]), ptx::pack2<T>(v[2], v[3])};
  }
  SK_DEVICE static Quad join(const Bits (&b)[4]) {
    return {b[0] | uint32_t{b[1]} << 16, b[2] | uint32_t{b[3]} << 16};
  }
};

template <>
struct Element<F32> {
  using Bits = float;
  using Quad = float4;
  SK_DEVICE static float number(Bits bits) { return bits; }
  SK_DEVICE static Bits bits(float number) { return number; }
  SK_DEVICE static void unpack(const Quad& quad, float (&v)[4]) {
    v[0] = quad.x, v[1] = quad.y, v[2] = quad.z, v[3] = quad.w;
  }
  SK_DEVICE static Quad pack(const float (&v)[4]) { return {v[0], v[1], v[2], v[3]}; }
  SK_DEVICE static Quad join(const Bits (&b)[4]) { return {b[0], b[1], b[2], b[3]}; }
};

// The first `count` (any number) of four elements, zeros for the others; `whole`: all four, from an address that is
// a multiple of their size.
template <class T>
SK_DEVICE typename Element<T>::Quad load_some(const typename Element<T>::Bits* from, bool whole,
                                              int count) {
  if (whole) return ptx::load_global_nc(reinterpret_cast<const typename Element<T>::Quad*>(from));
  typename Element<T>::Bits bits[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < count) bits[i] = ptx::load_global_nc(from + i);
  }
  return Element<T>::join(bits);
}
template <class T>
SK_DEVICE typename Element<T>::Quad load_some(const typename Element<T>::Bits* from, int count) {
  return load_some<T>(from, count >= 4, count);
}

}  // namespace sk::cuda
