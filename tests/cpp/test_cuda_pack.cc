// What packing and unpacking on a GPU check before one is asked for: host memory serves here. Where
// there is a GPU, also that it takes no host memory. The kernels are run by tests/simt/test_pack.cc.
#include "core/cuda_info.h"
#include "support.h"

using namespace test;

namespace {

constexpr sk_status kInvalid = SK_INVALID_ARGUMENT;
constexpr int64_t kN = 24, kK = 70, kStride = 72;

uint8_t* up(uint8_t* address) { return address + (128 - uintptr_t(address) % 128) % 128; }

// What is left to refuse when every argument is right: there is no GPU, or the memory is the host's.
void check_last(sk_status status, const char* op, const char* name) {
  const std::string text = sk_last_error();
  if (sk::cuda_devices().empty()) {
    CHECK(status == SK_UNSUPPORTED && text == "CUDA: " + sk::cuda_unavailable_reason());
  } else {
    CHECK(status == kInvalid);
    CHECK(text == std::string(op) + ": expected " + name +
                      " in the memory of device 0, got host memory; copy it there");
  }
}

void test_pack() {
  context = "pack";
  int64_t bytes = -1;
  const sk_pattern pattern = nm(2, 4);
  CHECK_OK(sk_format_bytes(&pattern, SK_BF16, kN, kK, 0, "nm_mma_sp", &bytes));
  CHECK(bytes == 128 + 2 * 2 * 1152);
  Buffer memory(1 << 15), header(SK_HEADER_BYTES);
  uint8_t* const at = up(memory.data());
  std::memset(memory.data(), 0x5a, size_t(memory.bytes()));
  std::memset(header.data(), 0x5a, SK_HEADER_BYTES);
  sk_pack_cuda_args good{};
  good.pattern = pattern;
  good.dtype = SK_BF16;
  good.n = kN, good.k = kK;
  good.weight = at, good.weight_row_stride = kStride;
  good.keep = SK_KEEP_MASK;
  good.mask = at + 4096, good.mask_row_stride = kK;
  good.packed = at + 8192, good.packed_bytes = bytes;
  good.header = header.data();
  good.misfit = at + 16384;

  const auto refuse = [&](auto change, const std::string& expected) {
    sk_pack_cuda_args bad = good;
    change(bad);
    CHECK_FAILS(sk_pack_cuda(&bad), kInvalid, expected);
  };
  const auto pass = [&](auto change) {
    sk_pack_cuda_args fine = good;
    change(fine);
    check_last(sk_pack_cuda(&fine), "pack", "weight");
  };
  using Args = sk_pack_cuda_args&;
  const auto without_mask = [](Args a, int32_t keep) { a.mask = nullptr, a.keep = keep; };
  CHECK_FAILS(sk_pack_cuda(nullptr), kInvalid, "args is NULL");
  pass([](Args) {});
  for (int32_t keep : {SK_KEEP_NONZERO, SK_KEEP_MAGNITUDE}) {
    pass([&](Args a) { without_mask(a, keep); });
    refuse([&](Args a) { a.keep = keep; }, "pack: keep=" + std::to_string(keep) +
                                               " takes no mask, got one; pass keep=0 or no mask");
    refuse([&](Args a) { without_mask(a, keep), a.pattern = nm(2, 4, 8); },
           "pack: without a mask a GPU packs 2:4, got 2:4v8; pass a mask");
  }
  for (int vector : {4, 8, 16}) pass([&](Args a) { a.pattern = nm(2, 4, vector); });
  for (int32_t keep : {-1, 3})
    refuse(
        [&](Args a) { without_mask(a, keep); },
        "pack: expected keep mask (0), nonzero (1) or magnitude (2), got " + std::to_string(keep));
  refuse([](Args a) { a.mask = nullptr; },
         "pack: keep=0 takes a mask, got NULL; pass one or another keep");

  refuse([](Args a) { a.pattern = nm(4, 8); },
         "pack: format nm_mma_sp does not hold the pattern 4:8 in bf16");
  refuse([](Args a) { a.pattern = bsr(16, 16); },
         "pack: format nm_mma_sp does not hold the pattern bsr16x16 in bf16");
  refuse([](Args a) { a.pattern = nm(2, 4, 3); }, "expected a vector of 1, 4, 8 or 16 rows, got 3");
  refuse([](Args a) { a.dtype = SK_F32; },
         "pack: format nm_mma_sp does not hold the pattern 2:4 in f32");
  refuse([](Args a) { a.dtype = 9; }, "dtype: expected f32 (0), bf16 (1) or f16 (2), got 9");
  refuse([](Args a) { a.n = 0; }, "weight: expected n and k from 1 to 2^31 - 1, got n=0, k=70");
  refuse([](Args a) { a.k = int64_t{1} << 31; }, "weight: expected n and k from 1 to 2^31 - 1");
  refuse([&](Args a) { a.packed_bytes = bytes - 1; },
         "pack: format nm_mma_sp takes 4736 bytes here, got 4735");
  refuse([](Args a) { a.n = 33; }, "pack: format nm_mma_sp takes 7040 bytes here, got 4736");

  refuse([](Args a) { a.packed = nullptr; }, "pack: expected a packed weight aligned to 128 bytes");
  refuse([&](Args a) { a.packed = at + 8192 + 64; },
         "pack: expected a packed weight aligned to 128 bytes");
  refuse([](Args a) { a.header = nullptr; }, "pack: header is NULL; pass 128 bytes of host memory");
  const std::string misfit =
      "pack: expected misfit, 8 bytes for the call's own use, aligned to 8 bytes";
  refuse([](Args a) { a.misfit = nullptr; }, misfit);
  refuse([&](Args a) { a.misfit = at + 16388; }, misfit);
  refuse([](Args a) { a.weight = nullptr; }, "pack: weight is NULL");
  refuse([&](Args a) { a.weight = at + 1; },
         "pack: expected weight aligned to 2 bytes, as its elements");
  pass([&](Args a) { a.weight = at + 2; });
  pass([&](Args a) { a.mask = at + 4097; });
  refuse([](Args a) { a.weight_row_stride = kK - 1; },
         "pack: weight has a row stride of 69, less than k=70");
  refuse([](Args a) { a.mask_row_stride = -kK; },
         "pack: mask has a row stride of -70, less than k=70");
  refuse([](Args a) { a.weight_row_stride = INT64_MAX; },
         "pack: weight has a row stride of 9223372036854775807, too large for 24 rows");
  refuse([](Args a) { a.mask_row_stride = INT64_MAX; },
         "pack: mask has a row stride of 9223372036854775807, too large for 24 rows");
  pass([](Args a) {  // no next row
    a.n = 1, a.packed_bytes = 128 + 2 * 1152;
    a.weight_row_stride = a.mask_row_stride = 0;
  });

  const int64_t weight_bytes = 2 * ((kN - 1) * kStride + kK), mask_bytes = kN * kK;
  CHECK(weight_bytes % 4 == 0 && mask_bytes % 8 == 0);
  refuse([&](Args a) { a.packed = at + (weight_bytes - 1) / 128 * 128; },
         "pack: packed overlaps weight; pass a packed of its own");
  refuse([&](Args a) { a.weight = at + 8192 + bytes - 2; }, "pack: packed overlaps weight");
  pass([&](Args a) { a.weight = at + 8192 + bytes, a.misfit = at; });
  refuse([&](Args a) { a.mask = at + 8192 + bytes - 1; },
         "pack: packed overlaps mask; pass a packed of its own");
  refuse([&](Args a) { a.misfit = at + (weight_bytes - 1) / 8 * 8; },
         "pack: misfit overlaps weight; pass a misfit of its own");
  refuse([&](Args a) { a.misfit = at + 8192 + bytes - 8; }, "pack: misfit overlaps packed");
  refuse([&](Args a) { a.misfit = at + 4096 + mask_bytes - 8; }, "pack: misfit overlaps mask");
  pass([&](Args a) { a.misfit = at + 4096 + mask_bytes; });

  if (!sk::cuda_devices().empty()) {
    refuse([](Args a) { a.device_index = 999; }, "CUDA: expected a device from 0 to ");
  }
  for (int64_t i = 0; i < memory.bytes(); ++i) CHECK(memory.data()[i] == 0x5a);
  for (int64_t i = 0; i < SK_HEADER_BYTES; ++i) CHECK(header.data()[i] == 0x5a);
}

void test_unpack() {
  context = "unpack";
  Random random(1);
  const Weight w(nm(2, 4), SK_F16, kN, kK, Fill::kIntegers, random);
  const Canonical canonical = compress(w.dense, w.mask, w.pattern, w.dtype);
  const Buffer packed = pack(canonical, "nm_mma_sp"), other = pack(canonical, "nm_rows16");
  Buffer memory(1 << 15);
  std::memset(memory.data(), 0x5a, size_t(memory.bytes()));
  uint8_t* const at = up(memory.data());
  sk_unpack_cuda_args good{};
  good.packed = at, good.packed_bytes = packed.bytes();
  good.header = packed.data();
  good.n = kN, good.k = kK;
  good.dtype = SK_F16;
  good.dense = at + 8192, good.dense_row_stride = kStride;

  using Args = sk_unpack_cuda_args&;
  const auto fails = [&](sk_status status, auto change, const std::string& expected) {
    sk_unpack_cuda_args bad = good;
    change(bad);
    CHECK_FAILS(sk_unpack_cuda(&bad), status, expected);
  };
  const auto refuse = [&](auto change, const std::string& expected) {
    fails(kInvalid, change, expected);
  };
  const auto pass = [&](auto change) {
    sk_unpack_cuda_args fine = good;
    change(fine);
    check_last(sk_unpack_cuda(&fine), "unpack", "packed");
  };
  CHECK_FAILS(sk_unpack_cuda(nullptr), kInvalid, "args is NULL");
  pass([](Args) {});
  refuse([](Args a) { a.header = nullptr; },
         "unpack: header is NULL; pass a host copy of the first 128 bytes of the packed weight");
  Buffer damaged(SK_HEADER_BYTES);
  std::memcpy(damaged.data(), packed.data(), SK_HEADER_BYTES);
  damaged.data()[40] ^= 1;
  refuse([&](Args a) { a.header = damaged.data(); }, "packed weight: the header is damaged");
  refuse([](Args a) { a.packed_bytes -= 1; }, "packed weight: the header's sizes do not belong");
  fails(
      SK_UNSUPPORTED, [&](Args a) { a.header = other.data(), a.packed_bytes = other.bytes(); },
      "unpack: a GPU unpacks format nm_mma_sp, got nm_rows16; copy the packed weight to the host "
      "and use sk_unpack");
  const std::string has = ", the packed weight n=24, k=70 in f16; pass a dense matrix like it";
  refuse([](Args a) { a.n = 25; }, "unpack: dense has n=25, k=70 in f16" + has);
  refuse([](Args a) { a.k = 69; }, "unpack: dense has n=24, k=69 in f16" + has);
  refuse([](Args a) { a.dtype = SK_BF16; }, "unpack: dense has n=24, k=70 in bf16" + has);

  for (int64_t offset : {-1, 64})
    refuse([&](Args a) { a.packed = offset < 0 ? nullptr : at + offset; },
           "unpack: expected a packed weight aligned to 128 bytes");
  refuse([](Args a) { a.dense = nullptr; }, "unpack: dense is NULL");
  refuse([&](Args a) { a.dense = at + 8193; },
         "unpack: expected dense aligned to 2 bytes, as its elements");
  refuse([](Args a) { a.dense_row_stride = kK - 1; },
         "unpack: dense has a row stride of 69, less than k=70");
  refuse([](Args a) { a.dense_row_stride = INT64_MAX; },
         "unpack: dense has a row stride of 9223372036854775807, too large for 24 rows");
  refuse([&](Args a) { a.dense = at + packed.bytes() - 2; },
         "unpack: dense overlaps packed; pass a dense of its own");
  pass([&](Args a) { a.dense = at + packed.bytes(); });
  if (!sk::cuda_devices().empty()) {
    refuse([](Args a) { a.device_index = 999; }, "CUDA: expected a device from 0 to ");
  }
  for (int64_t i = 0; i < memory.bytes(); ++i) CHECK(memory.data()[i] == 0x5a);
}

}  // namespace

int main() {
  test_pack();
  test_unpack();
}
