// The fused tail of a matmul: y = activation(sum + bias) + residual, or with the residual inside, on
// vectors along n.
#pragma once
#include "core/dtype.h"
#include "dispatch/registry.h"

namespace sk {
namespace {

// e^x within one or two units in the last place; Cephes' reduction and polynomial. 0 below -104.
template <class S>
typename S::V exp(typename S::V x) {
  using V = typename S::V;
  x = S::min(S::max(x, S::set1(-104.0f)), S::set1(88.8f));
  const V n = S::round(S::mul(x, S::set1(1.44269504088896341f)));
  V r = S::fma(n, S::set1(-0.693359375f), x);  // ln 2 in two parts
  r = S::fma(n, S::set1(2.12194440e-4f), r);
  V p = S::set1(1.9875691500e-4f);
  for (float c :
       {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    p = S::fma(p, r, S::set1(c));
  }
  p = S::fma(S::mul(p, r), r, S::add(r, S::set1(1.0f)));
  return S::times_power_of_two(p, n);
}

template <class S>
typename S::V sigmoid(typename S::V x) {
  return S::div(S::set1(1.0f), S::add(S::set1(1.0f), exp<S>(S::sub(S::zero(), x))));
}

// erf as a rational function of degree 11 over 10 with a relative error below 2e-8 up to 3.92,
// where erf rounds to 1. Coefficients: iteratively reweighted least squares on Chebyshev nodes.
template <class S>
typename S::V erf(typename S::V x) {
  using V = typename S::V;
  x = S::min(S::max(x, S::set1(-3.92f)), S::set1(3.92f));
  const V t = S::mul(x, x);
  V p = S::set1(2.05017110e-06f);
  for (float c :
       {2.84877890e-04f, 3.76530296e-03f, 5.27477529e-02f, 1.90398793e-01f, 1.12837915e+00f}) {
    p = S::fma(p, t, S::set1(c));
  }
  V q = S::set1(3.80923431e-05f);
  for (float c : {1.16246382e-03f, 1.49685830e-02f, 1.14105980e-01f, 5.02069279e-01f, 1.0f}) {
    q = S::fma(q, t, S::set1(c));
  }
  return S::div(S::mul(x, p), q);
}

template <class S>
typename S::V activate(typename S::V v, int activation) {
  using V = typename S::V;
  switch (activation) {
    case SK_ACTIVATION_RELU:
      return S::max(S::zero(), v);  // v second: NaN stays
    case SK_ACTIVATION_GELU: {
      const V half = S::mul(v, S::set1(0.5f));
      return S::fma(half, erf<S>(S::mul(v, S::set1(0.70710678118654752f))), half);
    }
    case SK_ACTIVATION_GELU_TANH: {  // 0.5 (1 + tanh u) = sigmoid(2 u)
      const V cube = S::fma(S::mul(S::mul(v, v), v), S::set1(0.044715f), v);
      return S::mul(v, sigmoid<S>(S::mul(cube, S::set1(2 * 0.79788456080286536f))));
    }
    case SK_ACTIVATION_SILU:
      return S::mul(v, sigmoid<S>(v));
    case SK_ACTIVATION_RELU6:
      return S::min(S::set1(6.0f), S::max(S::zero(), v));
    default:
      return v;
  }
}

// Writes the sums of one token for outputs [j, j + count), count <= lanes.
template <class S, class T>
class Epilogue {
 public:
  using V = typename S::V;
  explicit Epilogue(const MatmulCall& call)
      : y_(static_cast<T*>(call.y)),
        bias_(static_cast<const T*>(call.bias)),
        residual_(static_cast<const T*>(call.residual)),
        y_stride_(call.y_row_stride),
        residual_stride_(call.residual_row_stride),
        residual_first_(call.residual_first),
        activation_(call.activation) {}

  V bias(int64_t j, int count) const { return bias_ ? S::load(bias_ + j, count) : S::zero(); }

  void store(V sum, V bias, int64_t i, int64_t j, int count) const {
    V v = bias_ ? S::add(sum, bias) : sum;
    if (residual_ && residual_first_) v = add_residual(v, i, j, count);
    if (activation_ != SK_ACTIVATION_NONE) v = activate<S>(v, activation_);
    if (residual_ && !residual_first_) v = add_residual(v, i, j, count);
    S::store(y_ + i * y_stride_ + j, v, count);
  }

 private:
  V add_residual(V v, int64_t i, int64_t j, int count) const {
    return S::add(v, S::load(residual_ + i * residual_stride_ + j, count));
  }

  T* y_;
  const T *bias_, *residual_;
  int64_t y_stride_, residual_stride_;
  bool residual_first_;
  int activation_;
};

}  // namespace
}  // namespace sk
