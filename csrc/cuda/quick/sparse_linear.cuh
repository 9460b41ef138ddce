// SparseLinear of docs/onnx.md with an N:M weight as one kernel, for TensorRT's ahead-of-time plugins in Python
// (python/sparsekit/export/quick.py): the engine holds its PTX, and needs no library of ours.
//
// Such a plugin is a pointer to each input, 32-bit integers, a pointer to each output, and a grid that follows
// from the shapes; no workspace and no more than 48 KiB of shared memory. The weight is read as the node has it: sections
// on multiples of 16 bytes, and where they are is counted in these.
#pragma once
#include "cuda/cores_nm.cuh"

namespace sk::cuda {

// The integers, in the order of the kernels' parameters.
struct QuickLinear {
  int m, n, k;
  int kept, group, vector;
  int indices, bias;  // in 16 bytes from the start of the weight; bias 0: none
  int activation;
};

template <class T>
class QuickCall {
  using Bits = typename Element<T>::Bits;

 public:
  // x and y are dense: their rows start on four elements only where k and n allow it.
  SK_DEVICE QuickCall(const void* x, const void* weight, const QuickLinear& q, void* y)
      : weights(weight, static_cast<const uint4*>(weight) + q.indices, q.kept, q.group, q.vector,
                q.k, int(sizeof(Bits))),
        columns{x, q.k, q.k, q.k % 4 == 0},
        out{y,       q.bias ? static_cast<const uint4*>(weight) + q.bias : nullptr,
            nullptr, q.n,
            0,       q.m,
            q.n,     q.activation,
            false,   q.n % 4 == 0} {}

  const NmParams weights;
  const MatrixParams columns;
  const OutputParams out;
};

constexpr int kQuickSharedBytes = 32 << 10;  // for every kernel

// Grid: any; a block for NmDecode::kBlockRows rows and 8 tokens is the most that works at once.
constexpr int kQuickDecodeTokens = 8;
constexpr int kQuickDecodeRows = 1;  // of a warp: parameters take registers here

template <class T>
SK_DEVICE void quick_decode(const void* x, const void* weight, const QuickLinear& q, void* y) {
  static_assert(kDecodeSharedBytes <= kQuickSharedBytes, "no more is asked for");
  const QuickCall<T> call(x, weight, q, y);
  const NmChunks chunks(call.weights, kQuickDecodeTokens);
  NmDecode<T, kQuickDecodeTokens, kQuickDecodeRows, false>::run_all(call.weights, chunks,
                                                                    call.columns, call.out);
}

template <class T>
SK_DEVICE void quick_tiles(const void* x, const void* weight, const QuickLinear& q, void* y) {
  const QuickCall<T> call(x, weight, q, y);
  using Tile = NmSmall<T>;
  static_assert(Tile::kSharedBytes <= kQuickSharedBytes, "no more is asked for");
  compute_tiles<Tile, NmCores<Tile>, MatrixX<T>>(call.weights, call.columns, call.out);
}

}  // namespace sk::cuda

// The kernels by name: sparsekit_linear_nm_<dtype>_decode for few tokens, _tiles for many; TensorRT's tactics 1 and 2.
namespace sk::quick_types {
using f32 = cuda::F32;
using f16 = ptx::F16;
using bf16 = ptx::BF16;
}  // namespace sk::quick_types

#define SK_QUICK_KERNEL(dtype, kind, threads)                                                  \
  extern "C" __global__ void __launch_bounds__(threads) sparsekit_linear_nm_##dtype##_##kind(  \
      const void* x, const void* weight, int m, int n, int k, int kept, int group, int vector, \
      int indices, int bias, int activation, void* y) {                                        \
    sk::cuda::quick_##kind<sk::quick_types::dtype>(                                            \
        x, weight, {m, n, k, kept, group, vector, indices, bias, activation}, y);              \
  }
#define SK_QUICK_decode(dtype) SK_QUICK_KERNEL(dtype, decode, sk::cuda::kDecodeThreads)
#define SK_QUICK_tiles(dtype) \
  SK_QUICK_KERNEL(dtype, tiles, sk::cuda::NmSmall<sk::quick_types::dtype>::kThreads)
