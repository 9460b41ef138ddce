// Which writes of one block another block may rely on.
//
// Blocks run in any order. What one has written another may read only after a chain of
//   the writer: store, fence_gpu, atomic_add
//   the reader: atomic_add or load_global_cg of the same integer, then load_global_cg, or fence_gpu and any load.
// A barrier between a thread's store and the fence and atomic_add of another thread of its block carries the store.
// Block b counts its fences; clocks[b] = c means: everything that b wrote before its c-th fence.
#pragma once
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

namespace simt {

using Clocks = std::vector<uint32_t>;  // by block

struct BlockClocks {
  Clocks heard;   // through atomics: what load_global_cg may read
  Clocks fenced;  // what was heard at the last fence: what any load may read
  std::shared_ptr<const Clocks> released;  // what the last fence passes on
  uint32_t now = 1;                        // fences so far, and one
  bool wrote = false;                      // or heard something since the last fence
};

class BlockOrder {
 public:
  void reset(int blocks);
  uint32_t now(int block) const { return blocks_[size_t(block)].now; }
  void wrote(int block) { blocks_[size_t(block)].wrote = true; }

  // Everything that the block's threads have written so far can be passed on by who holds the result.
  std::shared_ptr<const Clocks> fence(int block);
  std::shared_ptr<const Clocks> released(int block) const {
    return blocks_[size_t(block)].released;
  }
  // Passes on what `release` holds, and hears what others have passed on at this address.
  void atomic(int block, const void* address, const Clocks* release);
  // A load from L2: of an integer that others use for atomics, perhaps.
  void hear(int block, const void* address);
  // May `block` read what `writer` wrote when it had made clock - 1 fences?
  bool ordered(int writer, uint32_t clock, int block, bool from_l2) const;

 private:
  std::vector<BlockClocks> blocks_;
  std::unordered_map<const void*, Clocks> atomics_;
};

}  // namespace simt
