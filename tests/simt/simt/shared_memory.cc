#include "simt/shared_memory.h"

#include <algorithm>
#include <cstring>

#include "simt/machine.h"

namespace simt {
namespace {

constexpr uint64_t kMaxPlace = (1 << 12) - 1;
constexpr uint8_t kPoison = 0xff;

std::string hex(uint32_t value) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%x", value);
  return text;
}

}  // namespace

void SharedMemory::reset(uint32_t base, int bytes) {
  base_ = base;
  bytes_.assign(size_t(bytes), kPoison);
  writer_.assign(size_t(bytes), Access{});
  reader_.assign(size_t(bytes), Access{});
}

SharedMemory::Access SharedMemory::access_of(const Thread& thread, Kind kind) {
  return {uint64_t(thread.index), kind, std::min(uint64_t(thread.place_id), kMaxPlace),
          thread.block->epoch, thread.warp->epoch};
}

// Does a barrier, or the thread's own order, stand between that access and what the thread does now?
bool SharedMemory::ordered(const Access& before, const Thread& thread) {
  if (before.block_epoch < thread.block->epoch) return true;
  if (before.kind == kManyWarps) return false;
  if (before.kind == kOneThread && int(before.thread) == thread.index) return true;
  return int(before.thread) / kLanes == thread.warp->index &&
         before.warp_epoch < thread.warp->epoch;
}

size_t SharedMemory::locate(Thread& thread, uint32_t address, int bytes) const {
  const uint64_t offset = uint64_t(address) - base_;
  if (address < base_ || offset + uint64_t(bytes) > bytes_.size()) {
    thread.fail(Fault::kOutOfBounds,
                "access of " + std::to_string(bytes) + " bytes out of bounds at shared_base() + " +
                    std::to_string(int64_t(address) - int64_t(base_)) + "; the block has " +
                    std::to_string(bytes_.size()) + " bytes of shared memory");
  }
  if (address % uint32_t(bytes) != 0) {
    thread.fail(Fault::kMisaligned, "access needs a shared address that is a multiple of " +
                                        std::to_string(bytes) + ", got " + hex(address) +
                                        " (shared_base() + " + std::to_string(offset) + ")");
  }
  return size_t(offset);
}

void SharedMemory::report_race(Thread& thread, size_t offset, const Access& before, const char* did,
                               const char* does) const {
  const PlaceStatistics& there = Machine::instance().places()[int(before.place)];
  const std::string where = std::string(name(there.op)) + " at " + there.place.file + ":" +
                            std::to_string(there.place.line);
  const std::string byte = "shared_base() + " + std::to_string(offset);
  if (before.kind == kPendingCopy) {
    thread.fail(Fault::kPendingCopy, std::string(does) + " " + byte + ", where thread " +
                                         std::to_string(before.thread) + " has a copy under way (" +
                                         where + "): commit it and wait for its group first");
  }
  const bool same_warp =
      int(before.thread) / kLanes == thread.warp->index && before.kind != kManyWarps;
  thread.fail(Fault::kRace, std::string(does) + " " + byte + ", which thread " +
                                std::to_string(before.thread) + " " + did + " (" + where +
                                "); no " + (same_warp ? "sync_warp" : "sync_block") +
                                " came between");
}

void SharedMemory::check_write(Thread& thread, size_t offset, int bytes, Kind kind) {
  const Access now = access_of(thread, kind);
  for (size_t i = offset; i < offset + size_t(bytes); ++i) {
    // Neighbours mostly have the same history.
    if (i == offset || !(reader_[i] == reader_[i - 1])) {
      if (!ordered(reader_[i], thread)) report_race(thread, i, reader_[i], "reads", "writes");
    }
    if (writer_[i].kind == kPendingCopy || !ordered(writer_[i], thread)) {
      report_race(thread, i, writer_[i], "writes", "writes");
    }
  }
  std::fill_n(writer_.begin() + ptrdiff_t(offset), bytes, now);
}

void SharedMemory::read(Thread& thread, uint32_t address, void* to, int bytes) {
  const size_t offset = locate(thread, address, bytes);
  const Access now = access_of(thread, kOneThread);
  for (size_t i = offset; i < offset + size_t(bytes); ++i) {
    if (i == offset || !(writer_[i] == writer_[i - 1])) {
      if (writer_[i].kind == kPendingCopy || !ordered(writer_[i], thread)) {
        report_race(thread, i, writer_[i], "writes", "reads");
      }
    }
    // Of the readers since the last sync_block keep what a later write must be compared with.
    Access& reader = reader_[i];
    if (reader.block_epoch < now.block_epoch) {
      reader = now;
    } else if (reader.kind == kManyWarps) {
      continue;
    } else if (int(reader.thread) / kLanes != thread.warp->index) {
      reader.kind = kManyWarps;
    } else if (reader.warp_epoch < now.warp_epoch) {
      reader = now;
    } else if (reader.thread != now.thread) {
      reader.kind = kOneWarp;
    }
  }
  std::memcpy(to, &bytes_[offset], size_t(bytes));
}

void SharedMemory::write(Thread& thread, uint32_t address, const void* from, int bytes) {
  const size_t offset = locate(thread, address, bytes);
  check_write(thread, offset, bytes, kOneThread);
  std::memcpy(&bytes_[offset], from, size_t(bytes));
}

void SharedMemory::issue_copy(Thread& thread, uint32_t address, int bytes) {
  const size_t offset = locate(thread, address, bytes);
  check_write(thread, offset, bytes, kPendingCopy);
  std::memset(&bytes_[offset], kPoison, size_t(bytes));
}

void SharedMemory::land_copy(Thread& thread, uint32_t address, const void* from, int bytes) {
  const size_t offset = address - base_;
  // The thread that waited sees the bytes now; the others after their next barrier with it.
  std::fill_n(writer_.begin() + ptrdiff_t(offset), bytes, access_of(thread, kOneThread));
  std::memcpy(&bytes_[offset], from, size_t(bytes));
}

}  // namespace simt
