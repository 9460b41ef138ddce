// Global memory: the buffers that tests make for kernels, and the checks of every access to them.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "simt/error.h"

namespace simt {

struct Thread;

// Bytes of global memory, 256-byte aligned as cudaMalloc gives them, with closed zones around them.
class Allocation {
 public:
  Allocation(std::string name, size_t bytes, bool read_only);
  ~Allocation();
  Allocation(const Allocation&) = delete;
  Allocation& operator=(const Allocation&) = delete;

  const std::string& name() const { return name_; }
  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  bool written(size_t offset, size_t bytes) const;
  void set_written() { std::fill(state_.begin(), state_.end(), uint8_t(kWritten)); }

 private:
  friend class GlobalMemory;
  enum State : uint8_t { kWritten = 1, kWrittenNow = 2, kReadNonCoherent = 4 };

  std::string name_;
  size_t bytes_;
  bool read_only_;
  std::unique_ptr<uint8_t[]> memory_;
  uint8_t* data_;
  // Of each byte: its state, and the block that wrote it in this launch (0: none), with the block's clock.
  struct Writer {
    uint32_t block_plus_1, clock;
    bool operator==(const Writer& o) const {
      return block_plus_1 == o.block_plus_1 && clock == o.clock;
    }
  };
  std::vector<uint8_t> state_;
  std::vector<Writer> writer_;  // empty where nothing has been written
};

// An array in global memory. Outputs start uninitialised: bytes 0xff, which are NaN, and a kernel that reads
// them is stopped. Inputs may not be written.
template <class T>
class Buffer {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  static Buffer input(const std::string& name, const std::vector<T>& values) {
    return Buffer(name, values, true);
  }
  static Buffer output(const std::string& name, size_t count) { return Buffer(name, count); }
  // Initialised, and the kernel may write it: workspaces, counters, y += ...
  static Buffer in_out(const std::string& name, const std::vector<T>& values) {
    return Buffer(name, values, false);
  }

  size_t size() const { return allocation_->bytes() / sizeof(T); }
  // For kernels' parameters; a test on the host reads and writes elements with [].
  T* data() const { return reinterpret_cast<T*>(allocation_->data()); }
  const T& operator[](size_t i) const { return data()[i]; }
  T& operator[](size_t i) { return data()[i]; }
  std::vector<T> values() const { return {data(), data() + size()}; }
  // Did element i come from the host, or has a kernel stored it?
  bool written(size_t i) const { return allocation_->written(i * sizeof(T), sizeof(T)); }

 private:
  Buffer(const std::string& name, size_t count)
      : allocation_(new Allocation(name, count * sizeof(T), false)) {}
  Buffer(const std::string& name, const std::vector<T>& values, bool read_only)
      : allocation_(new Allocation(name, values.size() * sizeof(T), read_only)) {
    if (!values.empty()) std::memcpy(allocation_->data(), values.data(), allocation_->bytes());
    allocation_->set_written();
  }

  std::unique_ptr<Allocation> allocation_;
};

// All buffers there are.
class GlobalMemory {
 public:
  static GlobalMemory& instance();

  void begin_launch();
  // Throws where the zones around a buffer have changed.
  void end_launch(const std::string& kernel);

  enum class Load { kPlain, kNonCoherent, kFromL2, kAtomic };
  enum class Store { kPlain, kAtomic };
  // The access of a thread, checked: where its bytes are.
  const uint8_t* read(Thread& thread, const void* address, int bytes, int alignment, Load load);
  uint8_t* write(Thread& thread, void* address, int bytes, Store store);

  // "x + 12 bytes", or the bare address.
  std::string describe(const void* address) const;

 private:
  friend class Allocation;
  static void check_order(Thread& thread, const Allocation& buffer, size_t offset, int bytes,
                          bool from_l2, const char* does);
  Allocation& find(Thread& thread, const void* address, int bytes, int alignment);

  std::vector<Allocation*> buffers_;
  Allocation* last_ = nullptr;
};

}  // namespace simt
