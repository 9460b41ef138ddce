// Packed formats: the header every packed buffer starts with, and the table of formats.
// layout/README.md shows the bytes.
#pragma once
#include <cstdint>

#include "layout/weight.h"

namespace sk {

constexpr uint32_t kPackedMagic = 0x31504b53;  // "SKP1" in memory
constexpr int64_t kAlignment = 64;             // of the buffer and of each section: a cache line
constexpr int64_t kGpuLine = 128;              // of the values that GPUs read: their cache line

struct PackedHeader {
  uint32_t magic;
  int32_t format;  // index into formats()
  sk_pattern pattern;
  int32_t dtype;
  int32_t panel_rows;  // rows that are stored interleaved; 1 for canonical formats
  int64_t n, k;
  int64_t nnzb;                                         // BSR
  int64_t order_offset, indices_offset, values_offset;  // bytes from the header; crow: BSR only
  int64_t bytes;                                        // the whole buffer
  uint64_t checksum;                                    // of all before it
};
static_assert(sizeof(PackedHeader) == 104, "no padding: headers are compared and summed as bytes");
constexpr int64_t kHeaderBytes = SK_HEADER_BYTES;

// A packed buffer whose header has been checked.
struct PackedWeight {
  const PackedHeader* header;
  const uint8_t* base;  // CUDA: on the device, while the header is a copy on the host

  template <class T>
  const T* section(int64_t offset) const {
    return reinterpret_cast<const T*>(base + offset);
  }
  template <class T>
  const T* values() const {
    return section<T>(header->values_offset);
  }
  template <class T>
  const T* indices() const {
    return section<T>(header->indices_offset);
  }
  const int32_t* crow() const { return section<int32_t>(header->order_offset); }
};

// One format: how large, how to write, how to read back.
struct Format {
  const char* name;
  sk_family family;
  // Completes panel_rows, the offsets and `bytes` from pattern, dtype, n, k and nnzb.
  void (*layout)(PackedHeader& header);
  // The buffer is zeroed and its header complete.
  void (*pack)(const sk_weight& weight, const PackedHeader& header, uint8_t* base);
  void (*unpack)(const PackedWeight& packed, sk_weight& out);
  // The format whose kernels can read this one too, where it only adds a section; else "".
  const char* extends = "";
  // Which patterns of the family it holds; null for all.
  bool (*holds)(const sk_pattern& pattern, int dtype) = nullptr;

  bool fits(const sk_pattern& pattern, int dtype) const {
    return pattern.family == family && (!holds || holds(pattern, dtype));
  }
};

enum FormatId { kNm = 0, kBsr, kNmRows16, kBsrRows, kNmQuads, kNmMmaSp, kBsrMma, kFormatCount };

// One line per format, at the end of format.cc.
const Format& format(int id);
int find_format(const char* name);  // throws ValueError naming the known ones

PackedHeader make_header(const sk_pattern& pattern, int dtype, int64_t n, int64_t k, int64_t nnzb,
                         int format_id);
PackedHeader make_header(const sk_weight& weight, int format_id);
void pack(const sk_weight& weight, int format_id, void* buffer, int64_t bytes);
void unpack(const PackedWeight& packed, sk_weight& out);
// Checks size, alignment, magic, checksum and that the header's numbers belong together. The
// sections are trusted: packed buffers never leave the process, files hold the canonical form.
PackedWeight open_packed(const void* buffer, int64_t bytes);
// The checks of the header alone, for a buffer of `bytes` that lies elsewhere.
void check_header(const PackedHeader& header, int64_t bytes);

// The formats' own functions, defined in the file of each.
void layout_nm(PackedHeader&);
void pack_nm(const sk_weight&, const PackedHeader&, uint8_t*);
void unpack_nm(const PackedWeight&, sk_weight&);
void layout_bsr(PackedHeader&);
void pack_bsr(const sk_weight&, const PackedHeader&, uint8_t*);
void unpack_bsr(const PackedWeight&, sk_weight&);
void layout_nm_rows16(PackedHeader&);
void pack_nm_rows16(const sk_weight&, const PackedHeader&, uint8_t*);
void unpack_nm_rows16(const PackedWeight&, sk_weight&);
void layout_nm_quads(PackedHeader&);
void pack_nm_quads(const sk_weight&, const PackedHeader&, uint8_t*);
void unpack_nm_quads(const PackedWeight&, sk_weight&);
void layout_bsr_rows(PackedHeader&);
void pack_bsr_rows(const sk_weight&, const PackedHeader&, uint8_t*);
void unpack_bsr_rows(const PackedWeight&, sk_weight&);
bool holds_nm_mma_sp(const sk_pattern&, int dtype);
void layout_nm_mma_sp(PackedHeader&);
void pack_nm_mma_sp(const sk_weight&, const PackedHeader&, uint8_t*);
void unpack_nm_mma_sp(const PackedWeight&, sk_weight&);
bool holds_bsr_mma(const sk_pattern&, int dtype);
void layout_bsr_mma(PackedHeader&);
void pack_bsr_mma(const sk_weight&, const PackedHeader&, uint8_t*);
void unpack_bsr_mma(const PackedWeight&, sk_weight&);

// Places sections one after the other, each on a cache line of its own.
class SectionCursor {
 public:
  int64_t take(int64_t bytes, int64_t alignment = kAlignment) {
    const int64_t offset = round_up(at_, alignment);
    at_ = round_up(offset + bytes, kAlignment);
    return offset;
  }
  int64_t end() const { return at_; }

 private:
  int64_t at_ = kHeaderBytes;
};

}  // namespace sk
