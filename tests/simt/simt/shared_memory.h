// The shared memory of one block: bytes, and who touched each of them last.
//
// Every access is checked against the accesses before it: of two threads that touch a byte, one of them writing,
// something must come between them: a sync_block, or within one warp a sync_warp. Which of the two ran first in
// this run does not matter, so a missing barrier is found under every seed.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace simt {

struct Thread;

class SharedMemory {
 public:
  // A new block: all bytes 0xff, which are NaN, at addresses from `base`.
  void reset(uint32_t base, int bytes);
  uint32_t base() const { return base_; }

  // Are these bytes the block's, and the address a multiple of them?
  void check(Thread& thread, uint32_t address, int bytes) const { locate(thread, address, bytes); }
  void read(Thread& thread, uint32_t address, void* to, int bytes);
  void write(Thread& thread, uint32_t address, const void* from, int bytes);
  // cp.async: from issue to landing the bytes are poison, and nobody may touch them.
  void issue_copy(Thread& thread, uint32_t address, int bytes);
  void land_copy(Thread& thread, uint32_t address, const void* from, int bytes);

 private:
  enum Kind : uint64_t { kOneThread, kOneWarp, kManyWarps, kPendingCopy };
  // The last access of a kind to a byte: by which thread, when, where. Epoch 0: never.
  struct Access {
    uint64_t thread : 10, kind : 2, place : 12, block_epoch : 20, warp_epoch : 20;
    bool operator==(const Access& o) const {
      return thread == o.thread && kind == o.kind && place == o.place &&
             block_epoch == o.block_epoch && warp_epoch == o.warp_epoch;
    }
  };
  static Access access_of(const Thread& thread, Kind kind);
  static bool ordered(const Access& before, const Thread& thread);
  size_t locate(Thread& thread, uint32_t address, int bytes) const;
  void check_write(Thread& thread, size_t offset, int bytes, Kind kind);
  [[noreturn]] void report_race(Thread& thread, size_t offset, const Access& before,
                                const char* did, const char* does) const;

  uint32_t base_ = 0;
  std::vector<uint8_t> bytes_;
  std::vector<Access> writer_, reader_;
};

}  // namespace simt
