// A tile kernel as the registry wants it: what it refuses, what it costs, how it is launched.
#pragma once
#include <atomic>

#include "core/cuda_check.h"
#include "core/error.h"
#include "cuda/families.h"
#include "cuda/pixels.cuh"
#include "cuda/rows.cuh"

namespace sk::cuda {

template <class Params>
Params params_of_x(const MatmulCall& call);
template <>
inline RowParams params_of_x(const MatmulCall& call) {
  return {nullptr, call.x_row_stride};
}
template <>
inline PixelParams params_of_x(const MatmulCall& call) {
  return {*call.conv, call.k, 8};
}

// Lets a launch start at a token; returns how many from there on it can take.
inline int64_t start_at(int64_t token, const MatmulCall& call, RowParams& x) {
  x.x = static_cast<const uint16_t*>(call.x) + token * call.x_row_stride;
  return call.m - token;
}
inline int64_t start_at(int64_t token, const MatmulCall& call, PixelParams& x) {
  const PixelRange range = pixels_from(*call.conv, token, 8);
  x.x = reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(call.x) + range.offset);
  x.first_pixel = range.first_pixel;
  return range.tokens;
}

template <class Tile, template <class> class WeightsOf, class Family,
          template <class> class CopierOf>
struct TileKernel {
  using Copier = CopierOf<Tile>;
  using Shared = SharedMemory<Tile, WeightsOf<Tile>, Copier>;
  static constexpr auto kKernel = matmul_mma<Tile, WeightsOf, CopierOf>;

  static constexpr TileShape kShape = {Tile::kRows,        Tile::kTokens,  Tile::kBlocksPerSm,
                                       Shared::kSlotBytes, Shared::kBytes, Family::kMacsPerClock};
  static_assert(2 * Tile::kBlocksPerSm * Tile::kRows * Tile::kTokens * 4 <= kCudaPartBytesPerSm,
                "parts of tiles fit into the workspace");

  static std::string refusal(const Problem& p) {
    const std::string why = Family::refusal(p, Tile::kRows);
    if (!why.empty()) return why;
    if (blocks_per_sm(kShape, *p.gpu) == 0) {
      return concat("needs ", kShape.shared_bytes >> 10,
                    " KiB of shared memory for a block, the GPU has ",
                    p.gpu->shared_per_block >> 10);
    }
    // Tile::kRows x 64 weights are a stage; one token tile has to fit into a launch.
    return stages(p).all < kLongestLine ? ""
                                        : "the weight has 2^31 stages or more; split it along n";
  }

  static double cost(const Problem& p) {
    // How many bytes the images of a convolution have the problem does not say; they are the same for all tiles.
    const int64_t x_columns = std::is_same_v<Copier, RowCopier<Tile>> ? p.k : 0;
    return cost_us(kShape, stages(p), p.m, Family::bytes(kept(p)), p.n, x_columns, *p.gpu);
  }

  static constexpr KernelFunctions functions(const char* about) {
    return {refusal, cost, run, about};
  }

  static void run(const MatmulCall& call) {
    const PackedHeader& h = *call.weight.header;
    allow_shared_memory(call.gpu->index);
    const double kept = double(h.nnzb) * h.pattern.block_rows * h.pattern.block_cols;
    const Stages stages = Family::stages(h.n, h.k, kept, Tile::kRows);
    const int64_t y_alignment = call.y_row_stride | (call.residual ? call.residual_row_stride : 0);
    const auto address = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
    MatmulParams p{};
    p.weight = call.weight.base;
    p.values_offset = h.values_offset, p.indices_offset = h.indices_offset,
    p.order_offset = h.order_offset;
    p.k = int(call.k);
    p.epilogue.bias = static_cast<const uint16_t*>(call.bias);
    p.epilogue.y_row_stride = call.y_row_stride;
    p.epilogue.residual_row_stride = call.residual_row_stride;
    p.epilogue.n = int(call.n);
    p.epilogue.activation = call.activation;
    p.epilogue.residual_first = call.residual_first;
    p.epilogue.aligned = y_alignment % 8 == 0 &&
                         (address(call.y) | address(call.bias) | address(call.residual)) % 16 == 0;
    p.counters = static_cast<int*>(call.counters);
    p.parts = reinterpret_cast<float*>(static_cast<uint8_t*>(call.workspace) + kCudaCounterBytes);
    auto x = params_of_x<typename Copier::Params>(call);
    for (int64_t token = 0; token < call.m;) {
      const Plan plan = cuda::plan(kShape, stages, start_at(token, call, x), *call.gpu);
      p.epilogue.y = static_cast<uint16_t*>(call.y) + token * call.y_row_stride;
      p.epilogue.residual = call.residual ? static_cast<const uint16_t*>(call.residual) +
                                                token * call.residual_row_stride
                                          : nullptr;
      p.epilogue.m = plan.tokens;
      p.token_tiles = plan.token_tiles;
      p.whole_tiles = plan.whole_tiles;
      kKernel<<<plan.blocks, Tile::kThreads, Shared::kBytes,
                static_cast<cudaStream_t>(call.stream)>>>(p, x);
      check_cuda(cudaGetLastError(), "launching a tile kernel");
      token += plan.tokens;
    }
  }

 private:
  static double kept(const Problem& p) { return p.kept_share() * double(p.n) * double(p.k); }
  static Stages stages(const Problem& p) { return Family::stages(p.n, p.k, kept(p), Tile::kRows); }

  // A block gets more than 48 KiB only where it was asked for, once on each device.
  static void allow_shared_memory(int device) {
    static std::atomic<uint64_t> allowed{0};
    const uint64_t bit = uint64_t{1} << (device % 64);
    if (device < 64 && allowed.load(std::memory_order_relaxed) & bit) return;
    check_cuda(
        cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shared::kBytes),
        "asking for shared memory");
    allowed.fetch_or(bit, std::memory_order_relaxed);
  }
};

}  // namespace sk::cuda

// A line of tiles.inc: a kernel for each dtype.
#define SK_TILE_KERNELS(id, Weights, Family, Copier, ...)                 \
  SK_TILE_KERNEL(id, f16, ptx::F16, Weights, Family, Copier, __VA_ARGS__) \
  SK_TILE_KERNEL(id, bf16, ptx::BF16, Weights, Family, Copier, __VA_ARGS__)
#define SK_TILE_KERNEL(id, dtype, T, Weights, Family, Copier, rows, tokens, warps_rows,       \
                       warps_tokens, stages, blocks, about)                                   \
  extern const KernelFunctions id##_##dtype##_sm80_##rows##x##tokens;                         \
  const KernelFunctions id##_##dtype##_sm80_##rows##x##tokens =                               \
      cuda::TileKernel<cuda::Tile<T, rows, tokens, warps_rows, warps_tokens, stages, blocks>, \
                       cuda::Weights, cuda::Family, cuda::Copier>::functions(about);
