// Format "nm_quads": nm_rows16 for 2:4 in f32 without vectors, with other lists in the section
// `order`: in which order to multiply so that four rows share the loads of x.
//
// In each block of 64 columns the 16 rows of a panel are parted into four quads a, b, c, d. A column
// is kept by some of a quad's rows; it becomes one step that loads it for all of them, or several
// steps for fewer. Each kind of step comes a fixed number of times, the same in the whole block, so
// that a kernel has a program and four loops:
//
//   order    [panels][blocks of 64 columns][4 quads]  QuadList
//              all times     abcd
//              threes times  abc abd acd bcd
//              twos times    ab cd ac bd ad bc
//              ones times    a b c d
#pragma once
#include <cstdint>

#include "layout/nm_rows16.h"

namespace sk {

constexpr int kQuadColumns = 64, kQuadsPerPanel = kRows16 / 4;

struct QuadList {
  uint16_t rows;  // a | b << 4 | c << 8 | d << 12
  uint8_t all, threes, twos, ones;
  uint8_t zero[2];
  // all + 4 threes words:   column << 4 | slot of the step's i-th row << i
  // 6 twos + 4 ones bytes:  column << 2 | slot of the step's i-th row << i
  uint8_t entries[128];
};
static_assert(sizeof(QuadList) == 136, "the lists of a block take 544 bytes");

inline bool has_quads(const sk_pattern& p, int dtype) { return has_pairs(p, dtype); }

}  // namespace sk
