#include "dispatch/gpu_arguments.h"

#include <cstring>

namespace sk {

Rows make_rows(const char* op, const char* name, const void* address, int64_t rows, int64_t stride,
               int64_t width, int64_t element_size) {
  SK_REQUIRE(is_aligned(address, element_size), op, ": expected ", name, " aligned to ",
             element_size, " bytes, as its elements");
  if (rows == 1) stride = width;
  SK_REQUIRE(stride < (int64_t{1} << 60) / (rows * element_size), op, ": ", name,
             " has a row stride of ", stride, ", too large for ", rows, " rows");
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
  return {name,
          begin,
          begin + uintptr_t(((rows - 1) * stride + width) * element_size),
          rows,
          stride * element_size,
          width * element_size};
}

bool overlap(const Rows& a, const Rows& b) {
  if (a.end <= b.begin || b.end <= a.begin) return false;
  if (a.stride != b.stride || a.rows == 1 || b.rows == 1) return true;
  const int64_t difference = int64_t(b.begin - a.begin) % a.stride;
  const int64_t shift = difference < 0 ? difference + a.stride : difference;
  return shift < a.width || shift + b.width > a.stride;
}

void check_packed_address(const char* op, const void* packed) {
  SK_REQUIRE(packed && is_aligned(packed, kGpuAlignment), op,
             ": expected a packed weight aligned to ", kGpuAlignment, " bytes");
}

PackedWeight open_on_gpu(const char* op, const void* packed, int64_t bytes, const char* name,
                         const void* header, PackedHeader& copy) {
  SK_REQUIRE(header, op, ": ", name, " is NULL; pass a host copy of the first ", SK_HEADER_BYTES,
             " bytes of the packed weight");
  std::memcpy(&copy, header, sizeof copy);
  check_header(copy, bytes);
  return {&copy, static_cast<const uint8_t*>(packed)};
}

}  // namespace sk
