// A layer's weight on a GPU: made once from the constant that TensorRT hands to enqueue, shared by all
// plugins of the process that have the same.
#pragma once
#include <array>
#include <memory>
#include <vector>

#include "tensorrt/attributes.h"
#include "tensorrt/device_memory.h"

namespace sk::tensorrt {

// Offsets of sections in `weight`, in bytes; each group's packed buffer is a section.
struct Sections {
  int64_t values = 0, indices = 0, crow_indices = 0;  // canonical
  int64_t group_bytes = 0;                            // packed; -1: the headers say
  int64_t bias = 0, end = 0;
};

// Those of a `weight` of `words` int32. Throws when it cannot have this length.
Sections sections_of(const Attributes& attributes, int64_t words);

// Packed for the kernels of one GPU. Addresses are offsets from `memory`, or where there is none from
// TensorRT's own copy of the constant.
struct GpuWeight {
  std::string format;
  std::vector<std::array<uint8_t, SK_HEADER_BYTES>> headers;  // of each group
  int64_t group_bytes = 0, bias = 0;
  int device = 0;
  DeviceMemory memory;

  bool in_place() const { return !memory.address(); }
};

// `constant`: `weight` in the memory of the current GPU, written by work of `stream` or before. Waits for
// the stream. `may_be_unwritten`: TensorRT's builder may time a layer before it has its weights, so
// bytes that are no weight are replaced by an empty one of the same size.
std::shared_ptr<const GpuWeight> prepare_weight(const Attributes& attributes, const void* constant,
                                                int64_t words, bool may_be_unwritten,
                                                cudaStream_t stream);

}  // namespace sk::tensorrt
