// What a launch throws when a kernel breaks a rule.
#pragma once
#include <cstring>
#include <stdexcept>
#include <string>

namespace simt {

// The line of a kernel that called an instruction. As a default argument it names the caller.
struct Place {
  const char* file = "";
  int line = 0;
  static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  bool operator==(const Place& other) const {
    return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
  }
};

enum class Fault {
  kOutOfBounds,     // outside every buffer, or outside the block's shared memory
  kMisaligned,      // the address is no multiple of the access
  kReadOnly,        // a write to a buffer that the kernel may only read
  kUninitialised,   // a read of global bytes that nobody has written
  kNonCoherent,     // load_global_nc of bytes that this launch writes
  kPendingCopy,     // an access to bytes that a cp.async has under way
  kRace,            // two threads, one of them writing, no barrier between
  kDivergence,      // the threads of a barrier or a warp's instruction do not all come to it
  kBadOperand,      // an operand that the instruction does not take
  kNoProgress,      // more instructions than the launch allows
  kBypassedMemory,  // bytes beside a buffer changed: something wrote without store_global
};
const char* name(Fault fault);

class Error : public std::runtime_error {
 public:
  Error(Fault fault, const std::string& message, Place place = {}, int block = -1, int thread = -1)
      : std::runtime_error(message), fault(fault), place(place), block(block), thread(thread) {}
  Fault fault;
  Place place;
  int block, thread;
};

}  // namespace simt
