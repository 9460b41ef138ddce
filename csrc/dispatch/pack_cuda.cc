#include "dispatch/pack_cuda.h"

#include <cstring>

#include "dispatch/gpu_arguments.h"
#include "dispatch/registry.h"
#if SK_HAVE_CUDA
#include "core/cuda_check.h"
#endif

namespace sk {
namespace {

Rows make_matrix(const char* op, const char* name, const void* address, int64_t n, int64_t stride,
                 int64_t k, int64_t element_size) {
  SK_REQUIRE(address, op, ": ", name, " is NULL");
  SK_REQUIRE(n == 1 || stride >= k, op, ": ", name, " has a row stride of ", stride,
             ", less than k=", k);
  return make_rows(op, name, address, n, stride, k, element_size);
}

Rows make_bytes(const char* op, const char* name, const void* address, int64_t bytes) {
  return make_rows(op, name, address, 1, bytes, bytes, 1);
}

void check_gpu(const char* op, const CudaDevice& gpu) {
  const std::string why_not = Arch("sm80").why_not_on(gpu);
  SK_CHECK(why_not.empty(), SK_UNSUPPORTED, op, ": ", why_not);
}

void check_pack_addresses(const sk_pack_cuda_args& a, int64_t bytes) {
  check_packed_address("pack", a.packed);
  SK_REQUIRE(a.packed_bytes == bytes, "pack: format ", format(kNmMmaSp).name, " takes ", bytes,
             " bytes here, got ", a.packed_bytes);
  SK_REQUIRE(a.header, "pack: header is NULL; pass ", SK_HEADER_BYTES, " bytes of host memory");
  SK_REQUIRE(a.misfit && is_aligned(a.misfit, 8),
             "pack: expected misfit, 8 bytes for the call's own use, aligned to 8 bytes");
  const Rows weight =
      make_matrix("pack", "weight", a.weight, a.n, a.weight_row_stride, a.k, dtype_size(a.dtype));
  const Rows packed = make_bytes("pack", "packed", a.packed, bytes);
  const Rows misfit = make_bytes("pack", "misfit", a.misfit, 8);
  const auto check = [](const Rows& to, const Rows& other) {
    SK_REQUIRE(!overlap(to, other), "pack: ", to.name, " overlaps ", other.name, "; pass a ",
               to.name, " of its own");
  };
  check(packed, weight);
  check(misfit, weight);
  check(misfit, packed);
  if (!a.mask) return;
  const Rows mask = make_matrix("pack", "mask", a.mask, a.n, a.mask_row_stride, a.k, 1);
  check(packed, mask);
  check(misfit, mask);
}

PackedHeader open_for_unpacking(const sk_unpack_cuda_args& a) {
  PackedHeader copy;
  open_on_gpu("unpack", a.packed, a.packed_bytes, "header", a.header, copy);
  SK_CHECK(copy.format == kNmMmaSp, SK_UNSUPPORTED, "unpack: a GPU unpacks format ",
           format(kNmMmaSp).name, ", got ", format(copy.format).name,
           "; copy the packed weight to the host and use sk_unpack");
  SK_REQUIRE(a.n == copy.n && a.k == copy.k && a.dtype == copy.dtype, "unpack: dense has n=", a.n,
             ", k=", a.k, " in ", dtype_name(a.dtype), ", the packed weight n=", copy.n,
             ", k=", copy.k, " in ", dtype_name(copy.dtype), "; pass a dense matrix like it");
  return copy;
}

void check_unpack_addresses(const sk_unpack_cuda_args& a) {
  check_packed_address("unpack", a.packed);
  const Rows dense =
      make_matrix("unpack", "dense", a.dense, a.n, a.dense_row_stride, a.k, dtype_size(a.dtype));
  SK_REQUIRE(!overlap(dense, make_bytes("unpack", "packed", a.packed, a.packed_bytes)),
             "unpack: dense overlaps packed; pass a dense of its own");
}

#if SK_HAVE_CUDA
void run(const sk_pack_cuda_args& a, const PackedHeader& header) {
  const int device = a.device_index;
  const CurrentDevice current(device);
  check_memory("pack", "weight", a.weight, device);
  check_memory("pack", "mask", a.mask, device);
  check_memory("pack", "packed", a.packed, device);
  check_memory("pack", "misfit", a.misfit, device);
  launch_pack_nm_mma_sp(a, header);
}
void run(const sk_unpack_cuda_args& a, const PackedHeader& header) {
  const int device = a.device_index;
  const CurrentDevice current(device);
  check_memory("unpack", "packed", a.packed, device);
  check_memory("unpack", "dense", a.dense, device);
  launch_unpack_nm_mma_sp(a, header);
}
#else
template <class Args>
void run(const Args&, const PackedHeader&) {
  throw Error(SK_UNSUPPORTED, cuda_unavailable_reason());
}
#endif

}  // namespace

void pack_on_gpu(const sk_pack_cuda_args& a) {
  SK_REQUIRE(a.keep == SK_KEEP_MASK || a.keep == SK_KEEP_NONZERO || a.keep == SK_KEEP_MAGNITUDE,
             "pack: expected keep mask (0), nonzero (1) or magnitude (2), got ", a.keep);
  SK_REQUIRE((a.keep == SK_KEEP_MASK) == (a.mask != nullptr), "pack: keep=", a.keep,
             a.mask ? " takes no mask, got one; pass keep=0 or no mask"
                    : " takes a mask, got NULL; pass one or another keep");
  const PackedHeader header = make_header(a.pattern, a.dtype, a.n, a.k, 0, kNmMmaSp);
  SK_REQUIRE(a.mask || a.pattern.vector == 1, "pack: without a mask a GPU packs 2:4, got ",
             pattern_name(a.pattern), "; pass a mask");
  check_pack_addresses(a, header.bytes);
  check_gpu("pack", cuda_device(a.device_index));
  run(a, header);
  std::memset(a.header, 0, SK_HEADER_BYTES);
  std::memcpy(a.header, &header, sizeof header);
}

void unpack_on_gpu(const sk_unpack_cuda_args& a) {
  const PackedHeader header = open_for_unpacking(a);
  check_unpack_addresses(a);
  check_gpu("unpack", cuda_device(a.device_index));
  run(a, header);
}

}  // namespace sk
