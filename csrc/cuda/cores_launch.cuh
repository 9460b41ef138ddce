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
  return {call.x, call.x_row_stride, int(call.k), true};
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

// The tiles of a kernel: the cheaper one is taken.
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
    const double small = cost_of<typename Tiles::Small>(p);
    return Tiles::large_rows(p.pattern, p.n) ? std::min(small, cost_of<typename Tiles::Large>(p))
                                             : small;
  }

  static void run(const MatmulCall& call) {
    const PackedHeader& h = *call.weight.header;
    Problem p;
    p.pattern = h.pattern, p.dtype = h.dtype;
    p.m = call.m, p.n = call.n, p.k = call.k;
    p.density = double(h.nnzb) * h.pattern.block_rows * h.pattern.block_cols /
                (double(call.n) * double(call.k));
    p.gpu = call.gpu;
    if (cost(p) < cost_of<typename Tiles::Small>(p)) {
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

  // A stage takes as long as its multiply-adds, as their operands from shared memory, or as memory takes to answer,
  // which the blocks beside each other on an SM hide.
  template <class Tile>
  static double cost_of(const Problem& p) {
    constexpr double kAnswer = 800, kEfficiency = 0.75;
    constexpr double kWords =
        32.0 * Tile::kThreadRows * Tile::kThreadTokens / (Tile::kThreadRows + Tile::kThreadTokens);
    const double rate = kEfficiency * std::min(fp32_rate(p.gpu->compute_capability), kWords);
    const double stages = std::ceil(Tiles::depth(p) / Tile::kDepth);
    const double of_sm = std::ceil(double(tiles<Tile>(p.pattern, p.m, p.n)) / p.gpu->sm_count);
    const double stage = std::max(double(Tile::kRows) * Tile::kTokens * Tile::kDepth / rate,
                                  kAnswer / std::min<double>(of_sm, Tile::kBlocksPerSm));
    return kLaunchUs + std::max(of_sm * stages * stage / kClocksPerUs, memory_us(p, 1));
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

constexpr double kL2BytesPerClock = 32;  // of an SM

// Tokens that a pass over W takes together, and what that costs an SM and clock: words of shared memory or of L1,
// and bytes from L2.
struct DecodePass {
  int tokens;
  double clocks;  // for each kept weight
};

inline double decode_cost(const Problem& p, const DecodePass& pass) {
  const double kept = p.kept_share() * double(p.n) * double(p.k);
  const double us = kept * double(ceil_div(p.m, int64_t{pass.tokens})) * pass.clocks /
                    p.gpu->sm_count / kClocksPerUs;
  return kLaunchUs + std::max(us, memory_us(p, 1)) + 0.1 * us;
}

template <class T>
struct NmDecodeKernel {
  // Rows that share positions make one gather serve four.
  static bool vectors(const sk_pattern& p, int64_t m) { return p.vector >= 4 && m > 4; }
  static DecodePass pass(const Problem& p) {
    const bool shared = vectors(p.pattern, p.m);
    const int tokens = p.m == 1 ? 1 : p.m <= 4 ? 4 : 8;
    const int rows = kDecodeWarps * (shared ? 4 : tokens == 8 ? 2 : 1);
    const double gather = tokens / 32.0 * (shared ? 0.5 : 1.5);  // at best 1/4 and 1
    const double size = double(dtype_size(p.dtype));
    const double bytes = size + size * tokens / (p.kept_share() * rows);
    return {tokens, std::max(gather, bytes / kL2BytesPerClock)};
  }
  static double cost(const Problem& p) { return decode_cost(p, pass(p)); }

  static void run(const MatmulCall& call) {
    if (vectors(call.weight.header->pattern, call.m)) {
      launch<8, 4, true>(call);
    } else if (call.m == 1) {
      launch<1, 1, false>(call);
    } else if (call.m <= 4) {
      launch<4, 1, false>(call);
    } else {
      launch<8, 2, false>(call);
    }
    check_cuda(cudaGetLastError(), "launching a kernel on CUDA cores");
  }
  static constexpr KernelFunctions functions(const char* about) {
    return {refusal_of_columns, cost, run, about};
  }

 private:
  template <int kTokens, int kRows, bool kVector>
  static void launch(const MatmulCall& call) {
    const auto weights = weight_params<NmParams>(call);
    const int64_t blocks =
        ceil_div(call.n, int64_t{kDecodeWarps * kRows}) * ceil_div(call.m, int64_t{kTokens});
    nm_decode<T, kTokens, kRows, kVector>
        <<<unsigned(std::min<int64_t>(blocks, 0x7fffffff)), kDecodeThreads, kDecodeSharedBytes,
           static_cast<cudaStream_t>(call.stream)>>>(weights, NmChunks(weights, kTokens),
                                                     matrix_params(call),
                                                     output_params(call, 0, call.m));
  }
};

template <class T>
struct BsrDecodeKernel {
  static int tokens(int64_t m) { return m == 1 ? 1 : m <= 4 ? 4 : 8; }
  static DecodePass pass(const Problem& p) {
    const double rows = std::min(p.pattern.block_rows, kBsrDecodeRows);
    const double words = p.pattern.block_cols % 4 == 0 ? 1 : 4;  // of L1 for a number of x
    const double gather = tokens(p.m) * (1 / 64.0 + words / 32.0 / rows);
    return {tokens(p.m), std::max(gather, double(dtype_size(p.dtype)) / kL2BytesPerClock)};
  }
  static double cost(const Problem& p) { return decode_cost(p, pass(p)); }

  static void run(const MatmulCall& call) {
    switch (tokens(call.m)) {
      case 1:
        launch<1>(call);
        break;
      case 4:
        launch<4>(call);
        break;
      default:
        launch<8>(call);
    }
    check_cuda(cudaGetLastError(), "launching a kernel on CUDA cores");
  }
  static constexpr KernelFunctions functions(const char* about) {
    return {refusal_of_columns, cost, run, about};
  }

 private:
  template <int kTokens>
  static void launch(const MatmulCall& call) {
    const sk_pattern& p = call.weight.header->pattern;
    const int64_t units = ceil_div(call.n, int64_t{p.block_rows}) *
                          ceil_div(int64_t{p.block_rows}, int64_t{kBsrDecodeRows}) *
                          ceil_div(call.m, int64_t{kTokens});
    const int64_t blocks = ceil_div(units, int64_t{kBsrDecodeWarps});
    bsr_decode<T, kTokens><<<unsigned(std::min<int64_t>(blocks, 0x7fffffff)), 32 * kBsrDecodeWarps,
                             0, static_cast<cudaStream_t>(call.stream)>>>(
        weight_params<BsrParams>(call), matrix_params(call), output_params(call, 0, call.m));
  }
};

}  // namespace sk::cuda

#define SK_CORES_KERNEL(id, ...)   \
  extern const KernelFunctions id; \
  const KernelFunctions id = cuda::__VA_ARGS__;
