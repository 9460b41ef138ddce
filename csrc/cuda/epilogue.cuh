// What happens to a tile's sums: y = activation(sum + bias) + residual, or with the residual inside, rounded
// once, transposed.
//
// The tensor cores hold a tile as rows of W times tokens; y wants the rows of W next to each other. Each warp
// turns its part around in shared memory of its own and stores 16 bytes a thread.
#pragma once
#include "cuda/ptx/ptx.cuh"

namespace sk::cuda {

// Numbered as sk_activation.
enum Activation { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kSilu = 4, kRelu6 = 5 };

struct EpilogueParams {
  uint16_t* y;                                // [m, n]
  const uint16_t* bias;                       // [n] or null
  const uint16_t* residual;                   // [m, n] or null
  int64_t y_row_stride, residual_row_stride;  // in elements
  int64_t m;
  int n;
  int activation;
  bool residual_first;  // before the activation
  bool aligned;         // every row of y and residual and the bias start on 16 bytes
};

template <int kCount>
SK_DEVICE void activate(float (&v)[kCount], int activation) {
  if (activation == kRelu) {
#pragma unroll
    for (float& f : v) f = f < 0 ? 0.0f : f;  // keeps NaN
  } else if (activation == kGelu) {
#pragma unroll
    for (float& f : v) f = 0.5f * f * (1.0f + erff(f * 0.70710678f));
  } else if (activation == kGeluTanh) {
#pragma unroll
    for (float& f : v) f = 0.5f * f * (1.0f + tanhf(0.79788456f * (f + 0.044715f * f * f * f)));
  } else if (activation == kSilu) {
#pragma unroll
    for (float& f : v) f = f / (1.0f + expf(-f));
  } else if (activation == kRelu6) {
#pragma unroll
    for (float& f : v) f = f < 0 ? 0.0f : f > 6 ? 6.0f : f;
  }
}

template <class T>
SK_DEVICE float load_element(const uint16_t* address) {
  return ptx::unpack2<T>(ptx::load_global_nc(address)).x;
}

// Row `row` of one token, its sum at `sum` in shared memory.
template <class T>
SK_DEVICE void finish_one(const EpilogueParams& p, uint32_t sum, int64_t token, int row) {
  float v[1] = {ptx::load_shared<float>(sum)};
  if (p.bias) v[0] += load_element<T>(p.bias + row);
  const float residual =
      p.residual ? load_element<T>(p.residual + token * p.residual_row_stride + row) : 0.0f;
  if (p.residual_first) v[0] += residual;
  activate(v, p.activation);
  if (!p.residual_first) v[0] += residual;
  ptx::store_global(p.y + token * p.y_row_stride + row, uint16_t(ptx::pack2<T>(v[0], 0.0f)));
}

// The same for eight rows, where all addresses are aligned.
template <class T>
SK_DEVICE void finish_eight(const EpilogueParams& p, uint32_t sum, int64_t token, int row) {
  const float4 low = ptx::load_shared<float4>(sum), high = ptx::load_shared<float4>(sum + 16);
  float v[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  const auto add = [&](const uint16_t* from) {
    const uint4 bits = ptx::load_global_nc(reinterpret_cast<const uint4*>(from));
    const uint32_t pairs[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 f = ptx::unpack2<T>(pairs[i]);
      v[2 * i] += f.x, v[2 * i + 1] += f.y;
    }
  };
  if (p.bias) add(p.bias + row);
  if (p.residual && p.residual_first) add(p.residual + token * p.residual_row_stride + row);
  activate(v, p.activation);
  if (p.residual && !p.residual_first) add(p.residual + token * p.residual_row_stride + row);
  ptx::store_global(reinterpret_cast<uint4*>(p.y + token * p.y_row_stride + row),
                    uint4{ptx::pack2<T>(v[0], v[1]), ptx::pack2<T>(v[2], v[3]),
                          ptx::pack2<T>(v[4], v[5]), ptx::pack2<T>(v[6], v[7])});
}

// Floats of shared memory from one token to the next: the lanes 4g + q that write rows g of tokens 2q meet
// 32 different banks.
template <int kRows>
constexpr int kEpilogueStride = kRows + 4;
template <int kRows, int kTokens>
constexpr int kEpilogueBytes = kTokens * kEpilogueStride<kRows> * 4;

// Sums of a warp, as mma_m16n8k16 leaves them: kRowTiles x 16 rows from `row`, kTokenTiles x 8 tokens from
// `token`. `shared`: kEpilogueBytes, the warp's own.
template <class T, int kRowTiles, int kTokenTiles>
SK_DEVICE void store_tile(const EpilogueParams& p, const float (&sums)[kRowTiles][kTokenTiles][4],
                          int row, int64_t token, uint32_t shared) {
  constexpr int kRows = kRowTiles * 16, kStride = kEpilogueStride<kRows> * 4;
  const int lane = ptx::thread_index() % 32;
  const uint32_t mine = shared + uint32_t(lane % 4 * 2 * kStride + lane / 4 * 4);
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        ptx::store_shared(mine + uint32_t((8 * j + r % 2) * kStride + (16 * i + r / 2 * 8) * 4),
                          sums[i][j][r]);
      }
    }
  }
  ptx::sync_warp();
  constexpr int kVectors = kRows / 8;  // of a token
  const int rows = p.n - row;
  const int64_t tokens = p.m - token;
#pragma unroll 1
  for (int v = lane; v < kVectors * kTokenTiles * 8; v += 32) {
    const int t = v / kVectors, r = v % kVectors * 8;
    if (t >= tokens) break;
    const uint32_t sum = shared + uint32_t(t * kStride + r * 4);
    if (p.aligned && r + 8 <= rows) {
      finish_eight<T>(p, sum, token + t, row + r);
    } else {
#pragma unroll 1
      for (int e = 0; e < 8 && r + e < rows; ++e)
        finish_one<T>(p, sum + uint32_t(e * 4), token + t, row + r + e);
    }
  }
}

}  // namespace sk::cuda
