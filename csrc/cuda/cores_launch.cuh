// Kernels on CUDA cores as the registry wants them: what they refuse, what they cost, how they are launched.
#pragma once
#include "core/cuda_check.h"
#include "core/error.h"
#include "cuda/cores_bsr.cuh"
#include "cuda/plan.h"
#include "dispatch/registry.h"

namespace sk::cuda {

// ---- the parameters of a call --------------------------------------------------------------------

template <class Params>
Params weight_params(const MatmulCall& call);
template <>
inline NmParams weight_params(const MatmulCall& call) {
  const PackedHeader& h = *call.weight.header;
  return NmParams(call.weight.values<uint8_t>(), call.weight.indices<uint8_t>(), h.pattern.kept,
                  h.pattern.group, h.pattern.vector, call.k, int(dtype_size(call.dtype)));
}
template <>
inline BsrParams weight_params(const MatmulCall& call) {
  const PackedHeader& h = *call.weight.header;
  return BsrParams(call.weight.values<uint8_t>(), call.weight.indices<uint8_t>(),
                   call.weight.crow(), h.pattern.block_rows, h.pattern.block_cols);
}

inline const void* advance(const void* base, int64_t elements, int dtype) {
  return base ? static_cast<const uint8_t*>(base) + elements * dtype_size(dtype) : nullptr;
}

// Of the tokens from `token` on.
inline OutputParams output_params(const MatmulCall& call, int64_t token, int64_t tokens) {
  const auto address = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
  const int64_t strides = call.y_row_stride | (call.residual ? call.residual_row_stride : 0);
  const uintptr_t all = address(call.y) | address(call.bias) | address(call.residual);
  OutputParams out{};
  out.y = const_cast<void*>(advance(call.y, token * call.y_row_stride, call.dtype));
  out.bias = call.bias;
  out.residual = advance(call.residual, token * call.residual_row_stride, call.dtype);
  out.y_row_stride = call.y_row_stride, out.residual_row_stride = call.residual_row_stride;
  out.m = tokens, out.n = int(call.n);
  out.activation = call.activation;
  out.residual_first = call.residual_first;
  out.aligned = strides % 4 == 0 && all % uintptr_t(4 * dtype_size(call.dtype)) == 0;
  return out;
}

inline MatrixParams matrix_params(const MatmulCall& call) {
  return {call.x, call.x_row_stride, int(call.k)};
}

// ---- costs ---------------------------------------------------------------------------------------

// Columns are counted in int, a stage past the last one.
inline std::string refusal_of_columns(const Problem& p) {
  return p.k < (int64_t{1} << 31) - 256 ? "" : "k is 2^31 - 256 or more; split the weight along k";
}

// Multiply-adds in float32 of an SM and clock.
inline double fp32_rate(int compute_capability) { return compute_capability == 80 ? 64 : 128; }

inline double memory_us(const Problem& p, double x_reads) {
  const double kept = p.kept_share() * double(p.n) * double(p.k);
  const double index = p.pattern.family == SK_FAMILY_NM
                           ? (p.pattern.group > 4 ? 0.5 : 0.25) / p.pattern.vector
                           : 4.0 / (p.pattern.block_rows * p.pattern.block_cols);
  const double bytes =
      kept * (double(dtype_size(p.dtype)) + index) +
      double(dtype_size(p.dtype)) * double(p.m) * (double(p.n) + x_reads * double(p.k));
  return p.gpu->bandwidth ? bytes / double(p.gpu->bandwidth) * 1e6 : 0;
}

constexpr double kClocksPerUs = 1500, kLaunchUs = 3;

// ---- many tokens ---------------------------------------------------------------------------------

// Tiles of a kernel, from large to small; the first that fills the GPU is taken.
template <class T, template <class> class WeightsOf>
struct CoresTiles;
template <class T>
struct CoresTiles<T, NmCores> {
  using Large = NmLarge<T>;
  using Small = NmSmall<T>;
  static bool large_rows(const sk_pattern&, int64_t n) { return n > 64; }
  static int64_t row_tiles(const sk_pattern&, int64_t n, int rows) {
    return ceil_div(n, int64_t{rows});
  }
  // Columns that a tile multiplies.
  static double depth(const Problem& p) { return double(p.k); }
};
template <class T>
struct CoresTiles<T, BsrCores> {
  using Large = BsrLarge<T>;
  using Small = BsrSmall<T>;
  static bool large_rows(const sk_pattern& pattern, int64_t) { return pattern.block_rows > 32; }
  static int64_t row_tiles(const sk_pattern& pattern, int64_t n, int rows) {
    return ceil_div(n, int64_t{pattern.block_rows}) *
           ceil_div(int64_t{pattern.block_rows}, int64_t{rows});
  }
  static double depth(const Problem& p) { return p.kept_share() * double(p.k); }
};

template <class T, template <class> class WeightsOf, template <class> class SourceOf>
struct CoresKernel {
  using Tiles = CoresTiles<T, WeightsOf>;
  using Source = SourceOf<T>;

  static double cost(const Problem& p) {
    return large(p.pattern, p.m, p.n, *p.gpu) ? cost_of<typename Tiles::Large>(p)
                                              : cost_of<typename Tiles::Small>(p);
  }

  static void run(const MatmulCall& call) {
    const PackedHeader& h = *call.weight.header;
    if (large(h.pattern, call.m, call.n, *call.gpu)) {
      launch<typename Tiles::Large>(call);
    } else {
      launch<typename Tiles::Small>(call);
    }
  }

  static constexpr KernelFunctions functions(const char* about) {
    return {refusal_of_columns, cost, run, about};
  }

 private:
  template <class Tile>
  static int64_t tiles(const sk_pattern& pattern, int64_t m, int64_t n) {
    return Tiles::row_tiles(pattern, n, Tile::kRows) * ceil_div(m, int64_t{Tile::kTokens});
  }

  static bool large(const sk_pattern& pattern, int64_t m, int64_t n, const CudaDevice& gpu) {
    return Tiles::large_rows(pattern, n) &&
           tiles<typename Tiles::Large>(pattern, m, n) >= gpu.sm_count;
  }

  // A stage takes as long as its multiplications, or as memory answers, whichever blocks of the SM do not hide.
  template <class Tile>
  static double cost_of(const Problem& p) {
    const double answer = 800, efficiency = 0.75;
    const double stages = std::ceil(Tiles::depth(p) / Tile::kDepth);
    const double resident = Tile::kBlocksPerSm, sms = p.gpu->sm_count;
    const double stage = std::max(double(Tile::kRows) * Tile::kTokens * Tile::kDepth /
                                      (efficiency * fp32_rate(p.gpu->compute_capability)),
                                  answer / resident);
    const double rounds =
        std::ceil(double(tiles<Tile>(p.pattern, p.m, p.n)) / (sms * resident)) * resident;
    const bool alone = double(tiles<Tile>(p.pattern, p.m, p.n)) <= sms;
    const double clocks = alone ? stages * std::max(stage, answer) : rounds * stages * stage;
    return kLaunchUs + std::max(clocks / kClocksPerUs, memory_us(p, 1));
  }

  template <class Tile>
  static void launch(const MatmulCall& call) {
    using Weights = WeightsOf<Tile>;
    const auto weights = weight_params<typename Weights::Params>(call);
    for (int64_t token = 0; token < call.m;) {
      int64_t tokens = call.m - token;
      const auto x = source_params(call, token, tokens);
      const int64_t grid = tiles<Tile>(call.weight.header->pattern, tokens, call.n);
      cores<Tile, Weights, Source><<<unsigned(std::min<int64_t>(grid, 0x7fffffff)), Tile::kThreads,
                                     Tile::kSharedBytes, static_cast<cudaStream_t>(call.stream)>>>(
          weights, x, output_params(call, token, tokens));
      check_cuda(cudaGetLastError(), "launching a kernel on CUDA cores");
      token += tokens;
    }
  }

  // Of the launch that starts at `token`; `tokens` becomes how many it can take.
  static typename Source::Params source_params(const MatmulCall& call, int64_t token,
                                               int64_t& tokens) {
    if constexpr (std::is_same_v<Source, MatrixX<T>>) {
      return matrix_params(call);
    } else {
      const int elements = 16 / int(dtype_size(call.dtype));
      const PixelRange range = pixels_from(*call.conv, token, elements);
      typename Source::Params p{PixelParams(*call.conv, call.k, elements), int(call.k)};
      p.pixels.x = static_cast<const uint4*>(advance(call.x, range.offset, call.dtype));
      p.pixels.first_pixel = range.first_pixel;
      tokens = range.tokens;
      return p;
    }
  }
};

// ---- few tokens ----------------------------------------------------------------------------------

// Tokens that a launch takes together: W is read once for so many.
inline int decode_tokens(int64_t m) { return m == 1 ? 1 : m <= 4 ? 4 : 8; }

template <class T>
struct NmDecodeLaunch {
  template <int kTokens>
  static void launch(const MatmulCall& call) {
    constexpr int kRows = kTokens == 8 ? 2 : 1;
    const auto weights = weight_params<NmParams>(call);
    const int64_t blocks =
        ceil_div(call.n, int64_t{kDecodeWarps * kRows}) * ceil_div(call.m, int64_t{kTokens});
    nm_decode<T, kTokens, kRows><<<unsigned(std::min<int64_t>(blocks, 0x7fffffff)), kDecodeThreads,
                                   kDecodeSharedBytes, static_cast<cudaStream_t>(call.stream)>>>(
        weights, NmChunks(weights, kTokens), matrix_params(call), output_params(call, 0, call.m));
  }
  // Words of shared memory, 32 a clock, for each multiply-add.
  static double clocks(const Problem& p) {
    const double kept = p.kept_share() * double(p.n) * double(p.k);
    return kept * double(ceil_div(p.m, int64_t{8})) * decode_tokens(p.m) / 32 * 1.3;
  }
};

template <class T>
struct BsrDecodeLaunch {
  template <int kTokens>
  static void launch(const MatmulCall& call) {
    const sk_pattern& p = call.weight.header->pattern;
    const int64_t units = ceil_div(call.n, int64_t{p.block_rows}) *
                          ceil_div(int64_t{p.block_rows}, int64_t{kBsrDecodeRows}) *
                          ceil_div(call.m, int64_t{kTokens});
    bsr_decode<T, kTokens>
        <<<unsigned(std::min<int64_t>(ceil_div(units, int64_t{kDecodeWarps}), 0x7fffffff)),
           kDecodeThreads, 0, static_cast<cudaStream_t>(call.stream)>>>(
            weight_params<BsrParams>(call), matrix_params(call), output_params(call, 0, call.m));
  }
  // Multiply-adds, and loads from L1 that serve kBsrDecodeRows rows, or what a block has.
  static double clocks(const Problem& p) {
    const double rows = std::min(p.pattern.block_rows, kBsrDecodeRows);
    const double kept = p.kept_share() * double(p.n) * double(p.k);
    return kept * double(ceil_div(p.m, int64_t{8})) * decode_tokens(p.m) *
           (1 / 64.0 + (p.pattern.block_cols % 4 == 0 ? 1 : 4) / 32.0 / rows);
  }
};

template <class Launch>
struct DecodeKernel {
  static double cost(const Problem& p) {
    const double us = Launch::clocks(p) / p.gpu->sm_count / kClocksPerUs;
    return kLaunchUs + std::max(us, memory_us(p, 1)) + 0.1 * us;
  }
  static void run(const MatmulCall& call) {
    switch (decode_tokens(call.m)) {
      case 1:
        Launch::template launch<1>(call);
        break;
      case 4:
        Launch::template launch<4>(call);
        break;
      default:
        Launch::template launch<8>(call);
    }
    check_cuda(cudaGetLastError(), "launching a kernel on CUDA cores");
  }
  static constexpr KernelFunctions functions(const char* about) {
    return {refusal_of_columns, cost, run, about};
  }
};

}  // namespace sk::cuda

#define SK_CORES_KERNEL(id, ...)   \
  extern const KernelFunctions id; \
  const KernelFunctions id = cuda::__VA_ARGS__;
