#include "layout/format.h"

#include <cstddef>
#include <cstring>

#include "layout/nm_quads.h"

namespace sk {
namespace {

const Format kFormats[kFormatCount] = {
    {"nm", SK_FAMILY_NM, layout_nm, pack_nm, unpack_nm},
    {"bsr", SK_FAMILY_BSR, layout_bsr, pack_bsr, unpack_bsr},
    {"nm_rows16", SK_FAMILY_NM, layout_nm_rows16, pack_nm_rows16, unpack_nm_rows16},
    {"bsr_rows", SK_FAMILY_BSR, layout_bsr_rows, pack_bsr_rows, unpack_bsr_rows},
    {"nm_quads", SK_FAMILY_NM, layout_nm_quads, pack_nm_quads, unpack_nm_quads, "nm_rows16",
     has_quads},
    {"nm_mma_sp", SK_FAMILY_NM, layout_nm_mma_sp, pack_nm_mma_sp, unpack_nm_mma_sp, "",
     holds_nm_mma_sp},
    {"bsr_mma", SK_FAMILY_BSR, layout_bsr_mma, pack_bsr_mma, unpack_bsr_mma, "", holds_bsr_mma},
};

// FNV-1a, a word at a time: any change of one word changes it.
uint64_t checksum(const PackedHeader& header) {
  uint64_t sum = 0xcbf29ce484222325;
  for (size_t at = 0; at < offsetof(PackedHeader, checksum); at += 8) {
    uint64_t word;
    std::memcpy(&word, reinterpret_cast<const char*>(&header) + at, 8);
    sum = (sum ^ word) * 0x100000001b3;
  }
  return sum;
}

}  // namespace

const Format& format(int id) { return kFormats[id]; }

int find_format(const char* name) {
  std::string known;
  for (int id = 0; id < kFormatCount; ++id) {
    if (name && std::strcmp(name, kFormats[id].name) == 0) return id;
    known += (id ? ", " : "") + std::string(kFormats[id].name);
  }
  throw Error(SK_INVALID_ARGUMENT,
              concat("format: expected one of ", known, ", got '", name ? name : "", "'"));
}

PackedHeader make_header(const sk_pattern& pattern, int dtype, int64_t n, int64_t k, int64_t nnzb,
                         int format_id) {
  weight_sizes(pattern, dtype, n, k, nnzb);  // checks them all
  SK_REQUIRE(format(format_id).fits(pattern, dtype), "pack: format ", format(format_id).name,
             " does not hold the pattern ", pattern_name(pattern), " in ", dtype_name(dtype));
  PackedHeader header{};
  header.magic = kPackedMagic;
  header.format = format_id;
  header.pattern = pattern;
  header.dtype = dtype;
  header.panel_rows = 1;
  header.n = n;
  header.k = k;
  header.nnzb = pattern.family == SK_FAMILY_BSR ? nnzb : 0;
  format(format_id).layout(header);
  header.checksum = checksum(header);
  return header;
}

PackedHeader make_header(const sk_weight& weight, int format_id) {
  const int64_t nnzb = check_weight_sizes(weight);
  return make_header(weight.pattern, weight.dtype, weight.n, weight.k, nnzb, format_id);
}

void pack(const sk_weight& weight, int format_id, void* buffer, int64_t bytes) {
  validate(weight);
  const PackedHeader header = make_header(weight, format_id);
  SK_REQUIRE(buffer && reinterpret_cast<uintptr_t>(buffer) % kAlignment == 0,
             "pack: expected a buffer aligned to ", kAlignment, " bytes");
  SK_REQUIRE(bytes == header.bytes, "pack: format ", format(format_id).name, " takes ",
             header.bytes, " bytes here, got ", bytes);
  std::memset(buffer, 0, size_t(bytes));
  std::memcpy(buffer, &header, sizeof header);
  format(format_id).pack(weight, header, static_cast<uint8_t*>(buffer));
}

void check_header(const PackedHeader& header, int64_t bytes) {
  SK_REQUIRE(header.magic == kPackedMagic,
             "packed weight: not a buffer written by sk_pack of this version");
  SK_REQUIRE(header.checksum == checksum(header),
             "packed weight: the header is damaged; pack the weight again");
  SK_REQUIRE(header.format >= 0 && header.format < kFormatCount, "packed weight: unknown format ",
             header.format);
  const Format& f = format(header.format);
  SK_REQUIRE(f.fits(header.pattern, header.dtype), "packed weight: format ", f.name,
             " with the wrong pattern");
  PackedHeader expected = header;
  if (f.family == SK_FAMILY_NM) expected.nnzb = 0;
  f.layout(expected);
  SK_REQUIRE(std::memcmp(&expected, &header, sizeof expected) == 0 && header.bytes <= bytes,
             "packed weight: the header's sizes do not belong together or the buffer is cut at ",
             bytes, " bytes");
}

PackedWeight open_packed(const void* buffer, int64_t bytes) {
  SK_REQUIRE(buffer && reinterpret_cast<uintptr_t>(buffer) % kAlignment == 0,
             "packed weight: expected a buffer aligned to ", kAlignment, " bytes");
  SK_REQUIRE(bytes >= kHeaderBytes, "packed weight: ", bytes, " bytes are too few for a header");
  const auto* header = static_cast<const PackedHeader*>(buffer);
  check_header(*header, bytes);
  return {header, static_cast<const uint8_t*>(buffer)};
}

void unpack(const PackedWeight& packed, sk_weight& out) {
  const PackedHeader& h = *packed.header;
  sk_weight weight = out;  // a refusal leaves `out` as it was
  weight.pattern = h.pattern;
  weight.dtype = h.dtype;
  weight.n = h.n;
  weight.k = h.k;
  const int64_t nnzb = check_weight_sizes(weight);
  SK_REQUIRE(nnzb == h.nnzb, "unpack: the packed weight has ", h.nnzb, " blocks, the arrays hold ",
             nnzb);
  out = weight;
  format(h.format).unpack(packed, out);
}

}  // namespace sk
