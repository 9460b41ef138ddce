// How a problem is cut up for a tile kernel, and what that costs: plain arithmetic, for the launch and for the
// choice among the kernels. tile_scheduler.cuh is the device's side.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "core/cuda_info.h"
#include "core/dtype.h"

namespace sk::cuda {

constexpr int kStageColumns = 64;
constexpr int kMinStages =
    8;  // fewer of them for a block do not pay for adding up the parts of a tile

// The line of stages of a launch (tile_scheduler.cuh) is counted in int32.
constexpr int64_t kLongestLine = (int64_t{1} << 31) - 1;

// The host's view of a Tile and its Weights.
struct TileShape {
  int rows, tokens;
  int blocks_per_sm;   // that the registers are cut for
  int64_t slot_bytes;  // copied to shared memory for one stage
  int64_t shared_bytes;
  int macs_per_clock;  // of an SM of compute capability 8.0: dense 1024, 2:4 2048
};

// The stages of one token tile, all row tiles together.
struct Stages {
  int64_t row_tiles;
  int64_t all;  // an upper bound where row tiles differ
  bool even;    // every row tile has as many
};

struct Plan {
  int64_t tokens;  // of one launch: the line of its stages is shorter than 2^31
  int token_tiles, whole_tiles, blocks;
};

// Blocks that run on an SM at once; 0: not even one.
inline int blocks_per_sm(const TileShape& tile, const CudaDevice& device) {
  if (tile.shared_bytes > device.shared_per_block) return 0;
  const int64_t reserved = 1024;  // by the system, in every block
  return int(
      std::min<int64_t>(tile.blocks_per_sm, device.shared_per_sm / (tile.shared_bytes + reserved)));
}

inline Plan plan(const TileShape& tile, const Stages& stages, int64_t m, const CudaDevice& device) {
  Plan p{};
  p.token_tiles = int(
      std::min(ceil_div(m, int64_t{tile.tokens}), std::max<int64_t>(1, kLongestLine / stages.all)));
  p.tokens = std::min(m, p.token_tiles * int64_t{tile.tokens});
  const int64_t tiles = stages.row_tiles * p.token_tiles;
  const int64_t blocks = int64_t{std::max(1, blocks_per_sm(tile, device))} * device.sm_count;
  // Full rounds of whole tiles; the rest is shared out, unless it nearly fills a round by itself.
  const int64_t rest = tiles % blocks;
  const int64_t shared = !stages.even ? tiles : rest * 10 < blocks * 9 ? rest : 0;
  p.whole_tiles = int(tiles - shared);
  const int64_t shares =
      std::max<int64_t>(1, shared * (stages.all / stages.row_tiles) / kMinStages);
  p.blocks = int(std::min(blocks, std::max<int64_t>(p.whole_tiles, shares)));
  return p;
}

// Where a launch for a convolution may start, and how far it reaches: offsets in x are counted from its first
// image, in 2^32 chunks of 16 bytes.
struct PixelRange {
  int64_t offset;   // of the image, in elements
  int first_pixel;  // in it
  int64_t tokens;
};

// An image is smaller than that (dispatch/matmul_cuda.cc), and images do not overlap.
inline PixelRange pixels_from(const sk_conv2d_shape& s, int64_t token, int elements_of_chunk) {
  const int64_t reach = int64_t{elements_of_chunk} << 32, pixels = s.out_height * s.out_width;
  const int64_t image = token / pixels, left = s.batch - image;
  const int64_t images =
      left > 1 ? std::min(left, std::max<int64_t>(1, reach / s.x_image_stride)) : 1;
  const int first_pixel = int(token % pixels);
  return {image ? image * s.x_image_stride : 0, first_pixel, images * pixels - first_pixel};
}

// Of the tensor cores with float32 sums, per SM and clock: half on GeForce and its kin; what Hopper gives to mma.
inline double tensor_rate(int compute_capability) {
  if (compute_capability == 86 || compute_capability == 89 || compute_capability / 10 == 12)
    return 0.5;
  return compute_capability == 90 ? 1.25 : 1;
}

// Microseconds, roughly. A stage takes as long as the slowest of multiplying, of filling shared memory from L2
// and of the waits that co-resident blocks hide from each other; the whole at least as long as memory.
inline double cost_us(const TileShape& tile, const Stages& stages, int64_t m, int64_t weight_bytes,
                      int64_t n, int64_t k, const CudaDevice& device) {
  const double clocks_per_us = 1500, l2_bytes_per_clock = 32, wait = 500, launch_us = 3,
               part_clocks = 3000;
  const Plan p = plan(tile, stages, m, device);
  const double tiles = double(stages.row_tiles) * p.token_tiles;
  const double stages_of_tile = double(stages.all) / double(stages.row_tiles);
  const double resident = std::max(1, blocks_per_sm(tile, device));
  const double stage = std::max({double(tile.rows) * tile.tokens * kStageColumns /
                                     (tile.macs_per_clock * tensor_rate(device.compute_capability)),
                                 double(tile.slot_bytes) / l2_bytes_per_clock, wait / resident});
  const double whole =
      std::ceil(double(p.whole_tiles) / p.blocks) * p.blocks;  // idle blocks count, too
  const double shared = tiles - p.whole_tiles;
  const double sms = std::min<double>(device.sm_count, p.blocks);
  const double part =
      tile.rows * tile.tokens * 4.0;  // written and read again, on every SM by each block
  const double parts = shared > 0 ? part_clocks + 4 * resident * part / l2_bytes_per_clock : 0;
  const double clocks = (whole + shared) * stages_of_tile * stage / sms + parts;
  const double launches = std::ceil(double(m) / double(p.tokens));
  const double bytes = double(weight_bytes) + 2.0 * double(m) * double(n + k);
  const double memory_us = device.bandwidth ? bytes / double(device.bandwidth) * 1e6 : 0;
  const double work_us = launches * clocks / clocks_per_us;
  // What takes less time still disturbs the other a little; it decides between equals.
  return launches * launch_us + std::max(work_us, memory_us) + 0.1 * std::min(work_us, memory_us);
}

}  // namespace sk::cuda
