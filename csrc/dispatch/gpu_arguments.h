// What calls on a GPU check of their arguments before they look at a GPU. `op` begins each message.
#pragma once
#include <cstdint>

#include "layout/format.h"

namespace sk {

constexpr int64_t kGpuAlignment = kGpuLine;  // of packed weights and workspaces in a GPU's memory

inline bool is_aligned(const void* address, int64_t alignment) {
  return reinterpret_cast<uintptr_t>(address) % uintptr_t(alignment) == 0;
}

// Rows of a matrix in memory, in bytes.
struct Rows {
  const char* name;
  uintptr_t begin, end;
  int64_t rows, stride, width;
};

// From sizes in elements. Refuses an address that is not aligned to its elements, and a stride that
// leaves the address space.
Rows make_rows(const char* op, const char* name, const void* address, int64_t rows, int64_t stride,
               int64_t width, int64_t element_size);

// Different columns of one matrix share no element, though their addresses interleave.
bool overlap(const Rows& a, const Rows& b);

void check_packed_address(const char* op, const void* packed);

// The packed weight whose bytes are on a GPU, with its header, from the argument `name`, in `copy`.
PackedWeight open_on_gpu(const char* op, const void* packed, int64_t bytes, const char* name,
                         const void* header, PackedHeader& copy);

}  // namespace sk
