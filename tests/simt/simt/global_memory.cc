#include "simt/global_memory.h"

#include <algorithm>
#include <cstdio>

#include "simt/machine.h"

namespace simt {
namespace {

// Of the closed zones before and after a buffer: a kernel that is off by a row still lands in one.
constexpr size_t kZone = 4096;
constexpr uint8_t kZoneByte = 0xa5;
constexpr size_t kAlignment = 256;

std::string bytes_text(size_t bytes) { return std::to_string(bytes) + " bytes"; }

}  // namespace

Allocation::Allocation(std::string name, size_t bytes, bool read_only)
    : name_(std::move(name)),
      bytes_(bytes),
      read_only_(read_only),
      memory_(new uint8_t[bytes + 2 * kZone + kAlignment]),
      state_(bytes) {
  const size_t start = reinterpret_cast<size_t>(memory_.get()) + kZone;
  data_ = memory_.get() + kZone + (kAlignment - start % kAlignment) % kAlignment;
  std::memset(data_ - kZone, kZoneByte, kZone);
  std::memset(data_, 0xff, bytes);
  std::memset(data_ + bytes, kZoneByte, kZone);
  GlobalMemory::instance().buffers_.push_back(this);
}

Allocation::~Allocation() {
  GlobalMemory& memory = GlobalMemory::instance();
  memory.buffers_.erase(std::find(memory.buffers_.begin(), memory.buffers_.end(), this));
  memory.last_ = nullptr;
}

bool Allocation::written(size_t offset, size_t bytes) const {
  for (size_t i = offset; i < offset + bytes; ++i) {
    if (!(state_.at(i) & kWritten)) return false;
  }
  return true;
}

GlobalMemory& GlobalMemory::instance() {
  static GlobalMemory memory;
  return memory;
}

void GlobalMemory::begin_launch() {
  for (Allocation* buffer : buffers_) {
    for (uint8_t& state : buffer->state_) state &= Allocation::kWritten;
    buffer->writer_.clear();
  }
}

void GlobalMemory::end_launch(const std::string& kernel) {
  for (const Allocation* buffer : buffers_) {
    const uint8_t* before = buffer->data_ - kZone;
    const uint8_t* after = buffer->data_ + buffer->bytes_;
    const auto intact = [](uint8_t byte) { return byte == kZoneByte; };
    if (std::all_of(before, before + kZone, intact) && std::all_of(after, after + kZone, intact)) {
      continue;
    }
    throw Error(Fault::kBypassedMemory,
                kernel + ": bytes beside buffer " + buffer->name_ +
                    " changed without an instruction; access memory through sk::ptx only");
  }
}

std::string GlobalMemory::describe(const void* address) const {
  const uint8_t* byte = static_cast<const uint8_t*>(address);
  for (const Allocation* b : buffers_) {
    if (byte < b->data_ - kZone || byte >= b->data_ + b->bytes_ + kZone) continue;
    const ptrdiff_t offset = byte - b->data_;
    return b->name_ + (offset < 0 ? " - " : " + ") +
           bytes_text(size_t(offset < 0 ? -offset : offset)) + " (" + b->name_ + " has " +
           bytes_text(b->bytes_) + ")";
  }
  char text[64];
  std::snprintf(text, sizeof text, "%p (in no buffer of the test)", address);
  return text;
}

Allocation& GlobalMemory::find(Thread& thread, const void* address, int bytes, int alignment) {
  const uint8_t* byte = static_cast<const uint8_t*>(address);
  const auto holds = [&](const Allocation* b) {
    return byte >= b->data_ && byte + bytes <= b->data_ + b->bytes_;
  };
  if (!last_ || !holds(last_)) {
    const auto found = std::find_if(buffers_.begin(), buffers_.end(), holds);
    if (found == buffers_.end()) {
      thread.fail(Fault::kOutOfBounds, "access of " + bytes_text(size_t(bytes)) +
                                           " out of bounds at " + describe(address));
    }
    last_ = *found;
  }
  if (reinterpret_cast<size_t>(address) % size_t(alignment) != 0) {
    thread.fail(Fault::kMisaligned, "access needs an address that is a multiple of " +
                                        std::to_string(alignment) + ", got " + describe(address));
  }
  return *last_;
}

void GlobalMemory::check_order(Thread& thread, const Allocation& buffer, size_t offset, int bytes,
                               bool from_l2, const char* does) {
  if (buffer.writer_.empty()) return;
  const BlockOrder& order = Machine::instance().order();
  const Allocation::Writer* writer = &buffer.writer_[offset];
  for (int i = 0; i < bytes; ++i) {
    if (writer[i].block_plus_1 == 0 || (i > 0 && writer[i] == writer[i - 1])) continue;
    const int block = int(writer[i].block_plus_1) - 1;
    if (order.ordered(block, writer[i].clock, thread.block->index, from_l2)) continue;
    const bool heard = order.ordered(block, writer[i].clock, thread.block->index, true);
    thread.fail(Fault::kRace,
                std::string(does) + " " + instance().describe(buffer.data_ + offset + i) +
                    ", which block " + std::to_string(block) + " has written; " +
                    (heard ? "load_global may find an older value in L1: use load_global_cg"
                           : "no fence_gpu and atomic_add order the two"));
  }
}

const uint8_t* GlobalMemory::read(Thread& thread, const void* address, int bytes, int alignment,
                                  Load load) {
  Allocation& buffer = find(thread, address, bytes, alignment);
  const size_t offset = size_t(static_cast<const uint8_t*>(address) - buffer.data_);
  uint8_t* state = &buffer.state_[offset];
  for (int i = 0; i < bytes; ++i) {
    if (!(state[i] & Allocation::kWritten)) {
      thread.fail(Fault::kUninitialised,
                  "reads " + describe(buffer.data_ + offset + i) + ", which nobody has written");
    }
    if (load != Load::kNonCoherent) continue;
    if (state[i] & Allocation::kWrittenNow) {
      thread.fail(Fault::kNonCoherent, "non-coherent read of " +
                                           describe(buffer.data_ + offset + i) +
                                           ", which this launch has written");
    }
    state[i] |= Allocation::kReadNonCoherent;
  }
  if (load == Load::kFromL2) Machine::instance().order().hear(thread.block->index, address);
  if (load != Load::kAtomic) {
    check_order(thread, buffer, offset, bytes, load == Load::kFromL2, "reads");
  }
  return buffer.data_ + offset;
}

uint8_t* GlobalMemory::write(Thread& thread, void* address, int bytes, Store store) {
  Allocation& buffer = find(thread, address, bytes, bytes);
  if (buffer.read_only_) {
    thread.fail(Fault::kReadOnly, "writes " + describe(address) + ", which is an input");
  }
  const size_t offset = size_t(static_cast<uint8_t*>(address) - buffer.data_);
  uint8_t* state = &buffer.state_[offset];
  for (int i = 0; i < bytes; ++i) {
    if (state[i] & Allocation::kReadNonCoherent) {
      thread.fail(Fault::kNonCoherent, "writes " + describe(buffer.data_ + offset + i) +
                                           ", which this launch reads with load_global_nc");
    }
    state[i] |= Allocation::kWritten | Allocation::kWrittenNow;
  }
  if (store == Store::kPlain) {
    check_order(thread, buffer, offset, bytes, true, "writes");
    BlockOrder& order = Machine::instance().order();
    const int block = thread.block->index;
    if (buffer.writer_.empty()) buffer.writer_.resize(buffer.bytes_);
    std::fill_n(buffer.writer_.begin() + ptrdiff_t(offset), bytes,
                Allocation::Writer{uint32_t(block) + 1, order.now(block)});
    order.wrote(block);
  }
  return buffer.data_ + offset;
}

}  // namespace simt
