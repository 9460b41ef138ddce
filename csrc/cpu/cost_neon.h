// Cost model of the NEON kernels. No machine has been measured: these are instructions of the inner
// loops (docs/performance.md lists them), for a core like the Cortex-A78AE: four instructions a
// cycle, of them two on vectors and two loads, at 2.2 GHz. So the estimates rank the kernels of one
// machine; they promise no time.
#pragma once
#include <algorithm>

#include "core/dtype.h"
#include "dispatch/registry.h"

namespace sk {
namespace {

constexpr double kNeonCyclesPerUs = 2200;

// Reading the weight once, at 10 bytes a nanosecond and core.
inline double neon_stream_us(const Problem& p) {
  return double(p.n) * double(p.k) * p.kept_share() * (dtype_size(p.dtype) + 0.25) / 10e3;
}

// What one row does with a weight, or a pair of them, besides a multiply-add for each vector of
// tokens.
struct NeonStep {
  double columns;           // of W that it covers
  double loads_per_vector;  // of activations: less than one where rows share them
  double conversions;       // of weights to f32
  double other;             // instructions for positions, addresses, weights
  int max_vectors;
};

inline double neon_tile_cost_us(const Problem& p, const NeonStep& s) {
  const double vectors = double(ceil_div(p.m, 4)), width = std::min<double>(vectors, s.max_vectors);
  const double cycles =
      std::max((width + s.conversions) / 2, (width * (1 + s.loads_per_vector) + s.other) / 4);
  const double kept = double(p.n) * double(p.k) * p.kept_share();
  const double tile = std::max(kept / s.columns * cycles / kNeonCyclesPerUs, neon_stream_us(p));
  const double panels = vectors * 2 * (double(p.n) + double(p.k)) / kNeonCyclesPerUs;
  return (tile * vectors / std::max(width, 1.0) + panels) / p.threads + 3;
}

// For each 4 rows, weight and token `each` vector instructions, and `once` for all tokens.
inline double neon_decode_cost_us(const Problem& p, double each, double once) {
  const double kept = double(p.n) * double(p.k) * p.kept_share();
  const double cycles = kept / 4 * (each * double(p.m) + once) / 2;
  return std::max(cycles / kNeonCyclesPerUs, neon_stream_us(p)) / p.threads + 2;
}

inline double neon_converts(const Problem& p) { return p.dtype == SK_F32 ? 0 : 1; }

}  // namespace
}  // namespace sk
