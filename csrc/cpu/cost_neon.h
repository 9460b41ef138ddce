#pragma once
#include "dispatch/registry.h"
namespace sk {
namespace {
enum Kind { kNmShared, kNmAlone, kNmPairs };
inline double neon_tile_cost_us(const Problem& p, Kind) {
  return double(p.m) * double(p.n) * double(p.k) * 1e-4;
}
inline double neon_bsr_cost_us(const Problem& p) {
  return double(p.m) * double(p.n) * double(p.k) * 1e-4;
}
inline double neon_decode_cost_us(const Problem& p) {
  return double(p.m) * double(p.n) * double(p.k) * 1e-5;
}
}  // namespace
}  // namespace sk
