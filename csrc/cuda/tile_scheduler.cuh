// Which block works on which part of which output tile.
//
// The output is cut into tiles, a tile's sum over k into stages (64 columns of W). All stages of all tiles stand
// in one line; tiles of a band of kBandRows row tiles share their part of W in L2:
//
//     for each band of row tiles: for each token tile: for each row tile of the band: its stages
//
// The first `whole_tiles` tiles go round the blocks, one whole tile at a time. The stages of the others are
// dealt out evenly, wherever that cuts a tile ("stream-K", Osama et al., arXiv 2301.03598): a block then sums up
// a part of its first and of its last tile, and of the blocks that share a tile the last one to arrive adds up
// the parts, in the order of k, so that the result does not depend on who was last.
#pragma once
#include "cuda/plan.h"
#include "cuda/ptx/ptx.cuh"

namespace sk::cuda {

constexpr int kBandRows = 16;

// A part of a tile: stages begin to end of `stages`.
struct Work {
  int row_tile;
  int token_tile;
  int begin, end, stages;
  int line_begin;  // where the tile's first stage stands in the line

  SK_DEVICE bool whole() const { return begin == 0 && end == stages; }
};

// The line has less than 2^31 stages: the host cuts m where there would be more.
//
// Rows: row_tiles(), stage_start(row tile) for 0 to row_tiles() and row_of(stage), its inverse.
template <class Rows>
class TileScheduler {
 public:
  SK_DEVICE TileScheduler(const Rows& rows, int token_tiles, int whole_tiles)
      : rows_(rows), token_tiles_(token_tiles), whole_tiles_(whole_tiles) {
    // Tiles that go round are all of one size: the caller allows them only then.
    shared_begin_ = whole_tiles * rows.stage_start(1);
    shared_ = rows.stage_start(rows.row_tiles()) * token_tiles - shared_begin_;
    sharers_ = shared_ / kMinStages < 1 ? 1 : shared_ / kMinStages;
    if (sharers_ > ptx::block_count()) sharers_ = ptx::block_count();
    next_tile_ = ptx::block_index();
    at_ = share_begin(ptx::block_index());
    end_ = share_begin(ptx::block_index() + 1);
  }

  SK_DEVICE bool next(Work& work) {
    if (next_tile_ < whole_tiles_) {
      locate(next_tile_ * rows_.stage_start(1), work);
      work.end = work.stages;
      next_tile_ += ptx::block_count();
      return true;
    }
    if (at_ >= end_) return false;
    locate(at_, work);
    const int tile_end = work.line_begin + work.stages;
    work.end = (end_ < tile_end ? end_ : tile_end) - work.line_begin;
    at_ = work.line_begin + work.end;
    return true;
  }

  // The blocks that share the tile of a part: first to last.
  SK_DEVICE int first_sharer(const Work& work) const { return sharer(work.line_begin); }
  SK_DEVICE int last_sharer(const Work& work) const {
    return sharer(work.line_begin + work.stages - 1);
  }
  // A block's part of a shared tile: 0 if the tile is the first of its share, 1 if it is the last only.
  SK_DEVICE int slot(const Work& work, int block) const {
    return share_begin(block) > work.line_begin ? 0 : 1;
  }

 private:
  SK_DEVICE int share_begin(int block) const {
    return shared_begin_ + (block < sharers_ ? int(int64_t(block) * shared_ / sharers_) : shared_);
  }
  // The block whose share holds a place: the last one that begins at or before it.
  SK_DEVICE int sharer(int place) const {
    return int((int64_t(place - shared_begin_ + 1) * sharers_ - 1) / shared_);
  }

  SK_DEVICE void locate(int place, Work& work) const {
    const int first = rows_.row_of(place / token_tiles_) / kBandRows * kBandRows;
    const int last = first + kBandRows < rows_.row_tiles() ? first + kBandRows : rows_.row_tiles();
    const int band = rows_.stage_start(first), width = rows_.stage_start(last) - band;
    const int in_band = place - band * token_tiles_;
    work.token_tile = in_band / width;
    const int stage = band + in_band % width;
    work.row_tile = rows_.row_of(stage);
    const int start = rows_.stage_start(work.row_tile);
    work.begin = stage - start;
    work.stages = rows_.stage_start(work.row_tile + 1) - start;
    work.line_begin = place - work.begin;
  }

  const Rows& rows_;
  const int token_tiles_, whole_tiles_;
  int shared_begin_, shared_, sharers_;
  int next_tile_, at_, end_;
};

}  // namespace sk::cuda
