// What a launch did, per line of the kernel: instructions, bank conflicts, sectors of global memory.
#pragma once
#include <cstddef>
#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "simt/error.h"

namespace simt {

enum class Op : uint8_t {
  kSyncBlock,
  kSyncWarp,
  kFence,
  kAtomicAdd,
  kAtomicMin,
  kShuffle,
  kLoadGlobal,
  kStoreGlobal,
  kLoadShared,
  kStoreShared,
  kCpAsync,
  kCpAsyncCommit,
  kCpAsyncWait,
  kLdmatrix,
  kMma,
  kMmaSp,
};
const char* name(Op op);

// A warp's 32 lanes executing one line once count as one instruction. For loads, stores and cp.async these are
// found by order: the n-th time that each lane comes to the line, counted from the warp's last collective.
struct PlaceStatistics {
  Place place;
  Op op;
  uint64_t instructions = 0;    // of a warp
  uint64_t lanes = 0;           // that took part, over all of them
  uint64_t bank_conflicts = 0;  // cycles beyond those of an access without conflicts
  uint64_t global_bytes = 0;    // that lanes asked for
  uint64_t sectors =
      0;  // of 32 bytes, that those lie in: global_bytes / 32 where perfectly coalesced
};

struct Statistics {
  std::vector<PlaceStatistics> places;

  uint64_t instructions() const;
  uint64_t instructions(Op op) const;
  uint64_t bank_conflicts() const;
  uint64_t bank_conflicts(Op op) const;
  uint64_t global_bytes_read() const;
  uint64_t global_bytes_written() const;
  uint64_t sectors(Op op) const;
  // A table for people, most conflicts first.
  std::string report() const;
};

// ---- how the emulator collects them ------------------------------------------------------------

enum class Space : uint8_t { kNone, kShared, kGlobal };

// The places of a launch by number.
class PlaceTable {
 public:
  PlaceTable();
  int find(Place place, Op op);
  PlaceStatistics& operator[](int id) { return places_[size_t(id)]; }
  std::vector<PlaceStatistics> take() const;

 private:
  struct Slot {
    const char* file;
    int line;
    Op op;
    int id;
  };
  void grow();
  std::vector<Slot> slots_;
  std::deque<PlaceStatistics> places_;
};

// The accesses of one warp since its last collective, put together into instructions of the warp.
class AccessLog {
 public:
  void add(PlaceTable& places, int id, Space space, int lane, uint64_t address, int bytes);
  void flush(PlaceTable& places);

 private:
  struct Group {
    uint32_t lanes = 0;
    int bytes = 0;  // of a lane
    uint64_t total_bytes = 0;
    uint64_t address[32];
  };
  struct PerPlace {
    uint32_t count[32] = {};
    uint32_t done = 0;  // groups that are complete and gone
    std::deque<Group> groups;
    bool dirty = false;
  };
  static void account(PlaceStatistics& place, Space space, const Group& group);

  std::vector<PerPlace> per_place_;  // by id, twice: shared and global
  std::vector<int> dirty_;
};

// Extra cycles of one access of shared memory: lane i of `lanes` touches `bytes` at address[i].
int bank_conflicts(uint32_t lanes, const uint64_t (&address)[32], int bytes);

}  // namespace simt
