// Between a dense weight on the device and the units of nm_mma_sp (layout/nm_mma_sp.h): packing
// writes the bytes that sk_pack writes, unpacking is its inverse. Both are bound by memory: they
// read and write each byte once, 16 bytes a thread where addresses and strides allow it.
//
// Launch both with sp_grid(n, k) blocks of kSpThreads threads and no shared memory.
#pragma once
#include "cuda/ptx/ptx.cuh"
#include "layout/nm_mma_sp.h"

namespace sk {

constexpr int kSpThreads = 256;
constexpr int kSpBlocksPerSm = 5;  // the most for which registers suffice on every GPU
constexpr int kSpBlockColumns = kSpThreads / 32 * kSpUnitColumns;  // a unit a warp, side by side

// Below 2^31, the limit of a grid, for every weight that fits into the memory of a GPU.
inline int64_t sp_grid(int64_t n, int64_t k) {
  return (n + kMmaRows - 1) / kMmaRows * ((k + kSpBlockColumns - 1) / kSpBlockColumns);
}

// Which elements are kept. sparsekit.pack(w) without a mask is kNonZero and, where that does not fit,
// kMagnitude; the two differ in the sign of zeros alone on a weight that fits.
enum class SpMask {
  kGiven,     // those where the mask is not zero
  kNonZero,   // those that are not zero; -0.0 is zero
  kMagnitude  // in each group the two largest, of equals the first: sparsekit.mask(w, "2:4")
};

struct SpPackArgs {
  const uint16_t* weight;  // [n, k], the bits of f16 or bf16; kMagnitude: no NaN
  int64_t weight_stride;   // from row to row, in elements
  const uint8_t* mask;     // [n, k], read for kGiven alone
  int64_t mask_stride;
  int64_t n, k;
  int vector;        // rows that share positions: 1, 4, 8 or 16; for kMagnitude 1
  uint8_t* units;    // section `values` of the packed buffer, on a multiple of 16
  uint64_t* misfit;  // for kGiven and kNonZero: kSpFits before the launch, see below
};

// What *misfit is after a launch whose mask fits. Else it is row << 32 | group: the lowest vector of
// rows, by its first row, that keeps more than two positions of a group, and the lowest such group
// of it. The units are then of no use.
constexpr uint64_t kSpFits = ~uint64_t{0};

struct SpUnpackArgs {
  const uint8_t* units;
  int64_t n, k;
  uint16_t* weight;  // [n, k]; what is not kept becomes zero
  int64_t weight_stride;
};

namespace sp {

// The share of a thread: rows g and g + 8 of its warp's unit and, of the 32 columns of each step, 8
// from 8q on. Groups are numbered i = 4 (row >= 8) + 2 step + (second of the two groups).
struct Share {
  SK_DEVICE explicit Share(int64_t k) {
    const int tiles = int((k + kSpUnitColumns - 1) / kSpUnitColumns);
    const int blocks_across = int((k + kSpBlockColumns - 1) / kSpBlockColumns);
    const int row_tile = ptx::block_index() / blocks_across;
    const int tile =
        ptx::block_index() % blocks_across * (kSpThreads / 32) + ptx::thread_index() / 32;
    lane = ptx::thread_index() % 32;
    g = lane / 4, q = lane % 4;
    past_k = tile >= tiles;
    row0 = int64_t(row_tile) * kMmaRows + g;
    column0 = int64_t(tile) * kSpUnitColumns + 8 * q;
    unit = (int64_t(row_tile) * tiles + tile) * kSpUnitBytes;
  }

  SK_DEVICE int64_t row(int i) const { return row0 + i / 4 * 8; }
  SK_DEVICE int64_t column(int i) const { return column0 + i / 2 % 2 * 32 + i % 2 * 4; }
  // How many of the 8 columns that start with group i lie in the matrix.
  SK_DEVICE int width(int i, int64_t n, int64_t k) const {
    if (row(i) >= n || column(i) >= k) return 0;
    return k - column(i) < 8 ? int(k - column(i)) : 8;
  }

  int lane, g, q;
  bool past_k;  // the warp has no unit
  int64_t row0, column0;
  int64_t unit;  // bytes from the first one
};

SK_DEVICE bool aligned(const void* base, int64_t stride_bytes, int bytes) {
  return (reinterpret_cast<uintptr_t>(base) | uintptr_t(stride_bytes)) % uintptr_t(bytes) == 0;
}

// Eight elements as two groups; zeros past `width`.
SK_DEVICE void load_groups(const uint16_t* from, int width, bool wide, uint64_t* groups) {
  if (wide && width == 8) {
    const uint4 bits = ptx::load_global_nc(reinterpret_cast<const uint4*>(from));
    groups[0] = bits.x | uint64_t{bits.y} << 32;
    groups[1] = bits.z | uint64_t{bits.w} << 32;
    return;
  }
  groups[0] = groups[1] = 0;
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    if (c < width) groups[c / 4] |= uint64_t{ptx::load_global_nc(from + c)} << (16 * (c % 4));
  }
}

// The inverse.
SK_DEVICE void store_groups(uint16_t* to, int width, bool wide, const uint64_t* groups) {
  if (wide && width == 8) {
    const uint4 bits = {uint32_t(groups[0]), uint32_t(groups[0] >> 32), uint32_t(groups[1]),
                        uint32_t(groups[1] >> 32)};
    ptx::store_global(reinterpret_cast<uint4*>(to), bits);
    return;
  }
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    if (c < width) ptx::store_global(to + c, uint16_t(groups[c / 4] >> (16 * (c % 4))));
  }
}

// A bit for each of eight bytes that is not zero.
SK_DEVICE uint32_t load_mask(const uint8_t* from, int width, bool wide) {
  uint64_t bytes = 0;
  if (wide && width == 8) {
    bytes = ptx::load_global_nc(reinterpret_cast<const uint64_t*>(from));
  } else {
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      if (c < width) bytes |= uint64_t{ptx::load_global_nc(from + c)} << (8 * c);
    }
  }
  uint32_t bits = 0;
#pragma unroll
  for (int c = 0; c < 8; ++c) bits |= uint32_t((bytes >> (8 * c) & 255) != 0) << c;
  return bits;
}

SK_DEVICE uint32_t magnitude(uint64_t group, int c) { return uint32_t(group >> (16 * c)) & 0x7fff; }

SK_DEVICE uint32_t non_zero(uint64_t group) {
  uint32_t bits = 0;
#pragma unroll
  for (int c = 0; c < 4; ++c) bits |= uint32_t(magnitude(group, c) != 0) << c;
  return bits;
}

// Magnitudes of one sign compare as their bits do. Columns past k are zeros after the real ones, so
// they lose every tie.
SK_DEVICE uint32_t largest_two(uint64_t group) {
  int beaten[4] = {0, 0, 0, 0};
#pragma unroll
  for (int later = 1; later < 4; ++later) {
#pragma unroll
    for (int earlier = 0; earlier < later; ++earlier) {
      const bool loses = magnitude(group, earlier) >= magnitude(group, later);
      beaten[later] += loses, beaten[earlier] += !loses;
    }
  }
  uint32_t bits = 0;
#pragma unroll
  for (int c = 0; c < 4; ++c) bits |= uint32_t(beaten[c] < 2) << c;
  return bits;
}

// For each set of columns of a group, a bit a column: four bits of metadata. Sets of fewer than two
// are filled up with their lowest free positions; those of more are no 2:4.
constexpr uint64_t kPositions = 0x444e'4dcc'4988'4444;
constexpr uint32_t kTooMany = 1 << 7 | 1 << 11 | 1 << 13 | 1 << 14 | 1 << 15;

// The kept elements of a group at its two positions; the others become zero.
SK_DEVICE uint32_t compress(uint64_t group, uint32_t kept, uint32_t positions) {
  const uint32_t first = positions & 3, second = positions >> 2;
  const uint32_t low = kept >> first & 1 ? uint32_t(group >> (16 * first)) & 0xffff : 0;
  const uint32_t high = kept >> second & 1 ? uint32_t(group >> (16 * second)) & 0xffff : 0;
  return low | high << 16;
}
SK_DEVICE uint64_t expand(uint32_t pair, uint32_t positions) {
  return uint64_t{pair & 0xffff} << (16 * (positions & 3)) | uint64_t{pair >> 16}
                                                                 << (16 * (positions >> 2));
}

// The four lanes of a row hold its groups 2q and 2q + 1 when they are next to memory, q and q + 4 in
// a tile. Twice every lane sends one of its two and receives one.
SK_DEVICE int swapped(int lane) { return (lane & ~3) | (lane & 1) << 1 | (lane >> 1 & 1); }

SK_DEVICE void to_tile(uint32_t& first, uint32_t& second, int lane) {
  const bool upper = lane & 2, odd = lane & 1;
  const uint32_t a = ptx::shuffle(upper ? second : first, swapped(lane));
  const uint32_t b = ptx::shuffle(upper ? first : second, swapped(lane) ^ 2);
  first = odd ? b : a, second = odd ? a : b;
}
SK_DEVICE void from_tile(uint32_t& first, uint32_t& second, int lane) {
  const bool upper = lane & 2, odd = lane & 1;
  const uint32_t a = ptx::shuffle(odd ? second : first, swapped(lane));
  const uint32_t b = ptx::shuffle(odd ? first : second, swapped(lane) ^ 1);
  first = upper ? b : a, second = upper ? a : b;
}

}  // namespace sp

template <SpMask kMask>
__global__ void __launch_bounds__(kSpThreads, kSpBlocksPerSm)
    sp_pack_kernel(const SpPackArgs args) {
  const sp::Share share(args.k);
  if (share.past_k) return;

  const bool wide = sp::aligned(args.weight, 2 * args.weight_stride, 16);
  uint64_t groups[8];
  uint32_t kept = 0;  // four bits a group
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    const int width = share.width(i, args.n, args.k);
    const int64_t offset = share.row(i) * args.weight_stride + share.column(i);
    sp::load_groups(args.weight + offset, width, wide, groups + i);
  }
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    uint32_t bits;
    if constexpr (kMask == SpMask::kGiven) {
      const int64_t offset = share.row(i) * args.mask_stride + share.column(i);
      bits = sp::load_mask(args.mask + offset, share.width(i, args.n, args.k),
                           sp::aligned(args.mask, args.mask_stride, 8));
    } else if constexpr (kMask == SpMask::kNonZero) {
      bits = sp::non_zero(groups[i]) | sp::non_zero(groups[i + 1]) << 4;
    } else {
      bits = sp::largest_two(groups[i]) | sp::largest_two(groups[i + 1]) << 4;
    }
    kept |= bits << (4 * i);
  }

  uint32_t together = kept;  // of all rows of a vector
  if constexpr (kMask != SpMask::kMagnitude) {
    for (int rows = 1; rows < args.vector && rows < 8; rows *= 2) {
      together |= ptx::shuffle_xor(together, 4 * rows);
    }
    if (args.vector == 16) together |= together << 16 | together >> 16;
  }

  uint32_t positions = 0;
  bool fits = true;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    // Rows past n are padding, even where the rest of their vector is not.
    const uint32_t columns = share.row(i) < args.n ? together >> (4 * i) & 15 : 0;
    positions |= uint32_t(sp::kPositions >> (4 * columns) & 15) << (4 * i);
    if constexpr (kMask != SpMask::kMagnitude) {
      if (fits && sp::kTooMany >> columns & 1) {
        fits = false;
        // All rows of a vector come here; its first one is the least.
        const uint64_t place = uint64_t(share.row(i)) << 32 | uint64_t(share.column(i) / 4);
        ptx::atomic_min(args.misfit, place);
      }
    }
  }

  uint8_t* unit = args.units + share.unit;
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    uint32_t first[2], second[2];  // of rows g and g + 8
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = 4 * half + 2 * step;
      first[half] = sp::compress(groups[i], kept >> (4 * i), positions >> (4 * i) & 15);
      second[half] =
          sp::compress(groups[i + 1], kept >> (4 * i + 4), positions >> (4 * i + 4) & 15);
      sp::to_tile(first[half], second[half], share.lane);
    }
    const uint4 registers = {first[0], first[1], second[0], second[1]};
    ptx::store_global(reinterpret_cast<uint4*>(unit + step * kMmaTileBytes + 16 * share.lane),
                      registers);
  }

  // Byte `step` of each half of `positions` is this lane's; metadata has those of two lanes of one step.
  const int source = (share.lane & ~3) | (share.q & 1) << 1, shift = share.q / 2 * 8;
  const uint32_t even = ptx::shuffle(positions, source) >> shift & 0x00ff00ff;
  const uint32_t odd = ptx::shuffle(positions, source + 1) >> shift & 0x00ff00ff;
  ptx::store_global(reinterpret_cast<uint32_t*>(unit + kSpMetadataOffset + 4 * share.lane),
                    even | odd << 8);
}

static __global__ void __launch_bounds__(kSpThreads, kSpBlocksPerSm)
    sp_unpack_kernel(const SpUnpackArgs args) {
  const sp::Share share(args.k);
  if (share.past_k) return;

  const uint8_t* unit = args.units + share.unit;
  const bool wide = sp::aligned(args.weight, 2 * args.weight_stride, 16);
  const uint32_t metadata = ptx::load_global_nc(
      reinterpret_cast<const uint32_t*>(unit + kSpMetadataOffset + 4 * share.lane));
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    const uint4 registers = ptx::load_global_nc(
        reinterpret_cast<const uint4*>(unit + step * kMmaTileBytes + 16 * share.lane));
    uint32_t first[2] = {registers.x, registers.y}, second[2] = {registers.z, registers.w};
    const int source = (share.lane & ~3) | 2 * step | share.q / 2;
    const uint32_t positions = ptx::shuffle(metadata, source) >> (8 * (share.q & 1));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = 4 * half + 2 * step;
      sp::from_tile(first[half], second[half], share.lane);
      const uint64_t groups[2] = {
          sp::expand(first[half], positions >> (16 * half) & 15),
          sp::expand(second[half], positions >> (16 * half + 4) & 15),
      };
      sp::store_groups(args.weight + share.row(i) * args.weight_stride + share.column(i),
                       share.width(i, args.n, args.k), wide, groups);
    }
  }
}

}  // namespace sk
