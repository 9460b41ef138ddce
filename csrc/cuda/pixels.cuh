// x of a convolution: a token is an output pixel, and its row is gathered from an image (windows.cuh).
//
// A chunk of 8 columns lies in one tap, and is copied whole or comes as zeros. What a token needs for that does
// not depend on the column: where its window starts. A thread works that out for one token when a tile begins and
// leaves it in shared memory, since eight tokens a thread would take the registers that the sums have. What a
// column adds is the same for every token.
#pragma once
#include "cuda/matmul_mma.cuh"
#include "cuda/windows.cuh"

namespace sk::cuda {

template <class Tile>
class PixelCopier : ChunkCopier<Tile> {
  using Base = ChunkCopier<Tile>;
  using Base::each_token;

  static constexpr int kWindowBytes = 16;

 public:
  using Params = PixelParams;
  static constexpr int kSharedBytes = Tile::kTokens * kWindowBytes;
  using Base::chunk;

  SK_DEVICE PixelCopier(const MatmulParams& p, const PixelParams& x, uint32_t shared)
      : p_(p), x_(x), windows_(shared) {}

  // The windows are there for all after the next sync_block.
  SK_DEVICE void start_tile(int64_t token) {
#pragma unroll 1
    for (int t = ptx::thread_index(); t < Tile::kTokens; t += Tile::kThreads) {
      const Window w = window_of(x_, token, t, p_.epilogue.m);
      ptx::store_shared(windows_ + uint32_t(t * kWindowBytes), uint4{w.offset, w.line, w.place, 0});
    }
  }

  // `column`: of W, where this thread's chunk starts. Outside the image, behind its last channel, past k and past
  // m zeros come.
  SK_DEVICE void copy(uint32_t slot, int column) const {
    uint4 windows[Base::kCopies];  // all on their way before the first is needed
    each_token(0, [&](int i, int token, uint32_t) {
      windows[i] = ptx::load_shared<uint4>(windows_ + uint32_t(token * kWindowBytes));
    });
    const Tap tap = tap_of<8>(x_, column);
    int bytes = (x_.in_channels - tap.channel) * 2;
    bytes = bytes < 0 || column >= p_.k ? 0 : bytes > 16 ? 16 : bytes;
    each_token(slot, [&](int i, int, uint32_t to) {
      const Window window{windows[i].x, windows[i].y, windows[i].z};
      // Without branches. Of no bytes the address does not matter.
      ptx::cp_async_16(to, x_.x + int64_t{window.offset + tap.offset},
                       tap.inside(x_, window) ? bytes : 0);
    });
  }

 private:
  const MatmulParams& p_;
  const PixelParams& x_;
  const uint32_t windows_;
};

}  // namespace sk::cuda
