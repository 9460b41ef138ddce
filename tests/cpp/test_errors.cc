// Every refusal of the C interface: its status, its message, and that no output was touched.
#include "support.h"

using namespace test;

namespace {

constexpr sk_status kInvalid = SK_INVALID_ARGUMENT;

// Fields of the header of a packed buffer, as layout/README.md gives them.
enum HeaderOffset {
  kMagic = 0,
  kFormat = 4,
  kFamily = 8,
  kN = 40,
  kValuesOffset = 80,
  kBytes = 88,
  kChecksum = 96
};

template <class T>
void poke(Buffer& buffer, int64_t offset, T value) {
  std::memcpy(buffer.data() + offset, &value, sizeof value);
}

// Gives a changed header the checksum that belongs to it.
void seal(Buffer& buffer) {
  uint64_t sum = 0xcbf29ce484222325;
  for (int at = 0; at < kChecksum; at += 8) {
    uint64_t word;
    std::memcpy(&word, buffer.data() + at, 8);
    sum = (sum ^ word) * 0x100000001b3;
  }
  poke(buffer, kChecksum, sum);
}

Buffer copy(const Buffer& buffer) {
  Buffer other(buffer.bytes());
  std::memcpy(other.data(), buffer.data(), size_t(buffer.bytes()));
  return other;
}

void test_patterns() {
  context = "patterns";
  int64_t values = -1, indices = -1, crow = -1;
  const auto sizes = [&](sk_pattern p, int32_t dtype, int64_t n, int64_t k, int64_t nnzb = 0) {
    return sk_weight_sizes(&p, dtype, n, k, nnzb, &values, &indices, &crow);
  };
  sk_pattern strange = nm(2, 4);
  strange.family = 7;
  CHECK_FAILS(sizes(strange, SK_F32, 4, 4), kInvalid,
              "pattern: expected family nm (0) or bsr (1), got 7");
  for (int group : {-4, 0, 1, 3, 5, 32}) {
    CHECK_FAILS(sizes(nm(1, group), SK_F32, 4, 4), kInvalid, "expected M in 2, 4, 8, 16, got");
  }
  for (int kept : {-1, 0, 4, 5}) {
    CHECK_FAILS(sizes(nm(kept, 4), SK_F32, 4, 4), kInvalid, "expected 1 <= N < M, got");
  }
  for (int vector : {-1, 0, 2, 3, 5, 32}) {
    CHECK_FAILS(sizes(nm(2, 4, vector), SK_F32, 4, 4), kInvalid,
                "expected a vector of 1, 4, 8 or 16 rows");
  }
  for (auto [rows, cols] : {std::pair{0, 4}, {4, 0}, {-1, 4}, {129, 1}, {1, 129}}) {
    CHECK_FAILS(sizes(bsr(rows, cols), SK_F32, 4, 4), kInvalid,
                "expected block sides from 1 to 128, got");
  }
  for (int32_t dtype : {-1, 3, 99}) {
    CHECK_FAILS(sizes(nm(2, 4), dtype, 4, 4), kInvalid,
                "dtype: expected f32 (0), bf16 (1) or f16 (2), got");
  }
  const int64_t huge = int64_t{1} << 31;
  for (auto [n, k] : {std::pair<int64_t, int64_t>{0, 4},
                      {4, 0},
                      {-1, 4},
                      {4, huge},
                      {huge, 4},
                      {INT64_MIN, 4},
                      {4, INT64_MAX}}) {
    CHECK_FAILS(sizes(nm(2, 4), SK_F32, n, k), kInvalid, "expected n and k from 1 to 2^31 - 1");
  }
  CHECK_FAILS(sizes(nm(15, 16), SK_F32, huge - 1, huge - 1), kInvalid,
              "expected at most 2^48 elements");
  for (int64_t nnzb : {int64_t{-1}, int64_t{13}, INT64_MAX}) {
    CHECK_FAILS(sizes(bsr(2, 2), SK_F32, 5, 8, nnzb), kInvalid,
                "bsr: expected 0 to 12 blocks, got ");
  }
  CHECK(values == -1 && indices == -1 && crow == -1);
  CHECK_OK(sizes(bsr(2, 2), SK_BF16, 5, 8, 12));
  CHECK(values == 12 * 4 * 2 && indices == 12 * 4 && crow == 4 * 4);
  CHECK_OK(sizes(nm(3, 8, 4), SK_F16, 5, 9));
  CHECK(values == 5 * 6 * 2 && indices == 2 * 3 && crow == 0);

  const sk_pattern p = nm(2, 4);
  CHECK_FAILS(sk_weight_sizes(nullptr, SK_F32, 4, 4, 0, &values, &indices, &crow), kInvalid,
              "pattern is NULL");
  CHECK_FAILS(sk_weight_sizes(&p, SK_F32, 4, 4, 0, nullptr, &indices, &crow), kInvalid,
              "values_bytes is NULL");
  CHECK_FAILS(sk_weight_sizes(&p, SK_F32, 4, 4, 0, &values, nullptr, &crow), kInvalid,
              "indices_bytes is NULL");
  CHECK_FAILS(sk_weight_sizes(&p, SK_F32, 4, 4, 0, &values, &indices, nullptr), kInvalid,
              "crow_indices_bytes is NULL");

  const uint8_t mask[4] = {1, 0, 0, 1};
  int64_t nnzb = -1;
  CHECK_FAILS(sk_count_blocks(&p, mask, 2, 2, &nnzb), kInvalid,
              "expected a block-sparse pattern, got 2:4");
  const sk_pattern blocks = bsr(1, 1);
  CHECK_FAILS(sk_count_blocks(nullptr, mask, 2, 2, &nnzb), kInvalid, "pattern is NULL");
  CHECK_FAILS(sk_count_blocks(&blocks, nullptr, 2, 2, &nnzb), kInvalid, "mask is NULL");
  CHECK(nnzb == -1);
  CHECK_FAILS(sk_count_blocks(&blocks, mask, 2, 2, nullptr), kInvalid, "nnzb is NULL");
}

void test_compress() {
  context = "compress";
  Matrix dense(SK_F32, 6, 10);
  Random random(1);
  fill(dense, Fill::kIntegers, random);
  std::vector<uint8_t> mask(60, 0);
  // Rows 4 and 5 belong to the second vector; together they keep columns 4, 5 and 7.
  mask[4 * 10 + 4] = mask[4 * 10 + 5] = mask[5 * 10 + 7] = 1;
  Canonical plain(nm(2, 4), SK_F32, 6, 10, 0), vectors(nm(2, 4, 4), SK_F32, 6, 10, 0);
  CHECK_OK(sk_compress(dense.data(), 10, mask.data(), &plain.weight));
  CHECK_FAILS(sk_compress(dense.data(), 10, mask.data(), &vectors.weight), kInvalid,
              "mask: does not fit 2:4v4: rows 4 to 5, columns 4 to 7 keep 3 positions, at most 2 "
              "are allowed");
  mask.assign(60, 0);
  mask[2 * 10 + 8] = mask[2 * 10 + 9] = 1;
  Canonical one(nm(1, 4), SK_F32, 6, 10, 0);
  CHECK_FAILS(sk_compress(dense.data(), 10, mask.data(), &one.weight), kInvalid,
              "mask: does not fit 1:4: rows 2 to 2, columns 8 to 9 keep 2 positions, at most 1 are "
              "allowed");

  CHECK_FAILS(sk_compress(dense.data(), 10, mask.data(), nullptr), kInvalid, "out is NULL");
  CHECK_FAILS(sk_compress(nullptr, 10, mask.data(), &plain.weight), kInvalid,
              "dense and mask may not be NULL");
  CHECK_FAILS(sk_compress(dense.data(), 10, nullptr, &plain.weight), kInvalid,
              "dense and mask may not be NULL");
  CHECK_FAILS(sk_compress(dense.data(), 9, mask.data(), &plain.weight), kInvalid,
              "a row stride of 9 is less than k=10");

  Canonical few(bsr(2, 2), SK_F32, 6, 10, 1), many(bsr(2, 2), SK_F32, 6, 10, 3);
  mask.assign(60, 0);
  mask[0] = mask[59] = 1;
  CHECK_FAILS(
      sk_compress(dense.data(), 10, mask.data(), &few.weight), kInvalid,
      "the mask keeps more blocks than the 1 that the arrays hold; size them with sk_count_blocks");
  CHECK_FAILS(sk_compress(dense.data(), 10, mask.data(), &many.weight), kInvalid,
              "the mask keeps 2 blocks, the arrays hold 3");
}

// Arrays of another size, NULL arrays, and indices that point anywhere: from validate, decompress
// and pack.
void refuse(const Canonical& canonical, const sk_weight& bad, const std::string& text) {
  const sk_weight& w = canonical.weight;
  Matrix dense(w.dtype, w.n, w.k);
  const Matrix before(w.dtype, w.n, w.k);
  CHECK_FAILS(sk_validate(&bad), kInvalid, text);
  CHECK_FAILS(sk_decompress(&bad, dense.data(), w.k), kInvalid, text);
  CHECK(dense.same_bytes(before));
  const char* format = w.pattern.family == SK_FAMILY_NM ? "nm_rows16" : "bsr_rows";
  int64_t bytes = 0;
  CHECK_OK(sk_packed_bytes(&w, format, &bytes));
  Buffer packed(bytes), untouched(bytes);
  std::memset(packed.data(), 0xa5, size_t(bytes));
  std::memset(untouched.data(), 0xa5, size_t(bytes));
  CHECK_FAILS(sk_pack(&bad, format, packed.data(), bytes), kInvalid, text);
  CHECK(!std::memcmp(packed.data(), untouched.data(), size_t(bytes)));
}

void test_canonical() {
  Random random(2);
  for (const sk_pattern& pattern : {nm(2, 4), bsr(2, 4)}) {
    context = "canonical " + name(pattern);
    const Weight w(pattern, SK_BF16, 6, 10, Fill::kIntegers, random);
    Canonical c = compress(w.dense, w.mask, pattern, SK_BF16);
    sk_weight bad = c.weight;
    bad.values_bytes -= 2;
    refuse(c, bad, "weight: values of a ");
    bad = c.weight;
    bad.values_bytes = -bad.values_bytes;
    refuse(c, bad, "weight: values of a ");
    bad = c.weight;
    bad.values = nullptr;
    refuse(c, bad, "weight: values is NULL");
    bad = c.weight;
    bad.indices = nullptr;
    refuse(c, bad, "weight: indices is NULL");
    bad = c.weight;
    bad.crow_indices_bytes += 4;
    refuse(c, bad, "weight: crow_indices of a ");
    bad = c.weight;
    bad.k += pattern.family == SK_FAMILY_NM ? 4 : 0;
    bad.n += 2;
    refuse(c, bad, "n=8, k=");
    bad = c.weight;
    bad.dtype = 5;
    refuse(c, bad, "dtype: expected f32");
    bad = c.weight;
    bad.pattern.family = 2;
    refuse(c, bad, "pattern: expected family");
    CHECK_FAILS(sk_validate(nullptr), kInvalid, "weight is NULL");
    CHECK_FAILS(sk_decompress(nullptr, c.weight.values, 10), kInvalid, "weight is NULL");
    CHECK_FAILS(sk_decompress(&c.weight, nullptr, 10), kInvalid, "decompress: dense is NULL");
    Matrix dense(SK_BF16, 6, 10);
    CHECK_FAILS(sk_decompress(&c.weight, dense.data(), 9), kInvalid,
                "a row stride of 9 is less than k=10");
  }

  context = "N:M indices";
  Matrix dense(SK_F32, 1, 4);
  for (int i = 0; i < 4; ++i) dense.set(0, i, i + 1);
  Canonical half = compress(dense, {1, 0, 1, 0}, nm(1, 2), SK_F32);
  half.indices[0] = 3 << 2;  // the second group's position: 3 of 2
  refuse(half, half.weight, "indices: position 3 in row 0, slot 1 is outside its group of 2");
  Canonical pair = compress(dense, {1, 0, 1, 0}, nm(2, 4), SK_F32);
  pair.indices[0] = 2 | 2 << 2;
  refuse(pair, pair.weight, "indices: positions in row 0, group 0 are not ascending");
  pair.indices[0] = 3 | 1 << 2;
  refuse(pair, pair.weight, "indices: positions in row 0, group 0 are not ascending");
  Canonical eighth = compress(dense, {1, 0, 1, 0}, nm(2, 8), SK_F32);
  eighth.indices[0] = 1 | 8 << 4;
  refuse(eighth, eighth.weight, "indices: position 8 in row 0, slot 1 is outside its group of 8");

  context = "block indices";
  Matrix square(SK_F32, 4, 4);
  fill(square, Fill::kIntegers, random);
  const auto blocks = [&] {
    return compress(square, std::vector<uint8_t>(16, 1), bsr(2, 2), SK_F32);
  };
  struct Case {
    bool crow;
    int at;
    int32_t value;
    const char* text;
  };
  const Case cases[] = {
      {true, 0, 1, "crow_indices: expected 0 first, got 1"},
      {true, 2, 3, "crow_indices: expected the number of blocks, 4, last, got 3"},
      {true, 1, 5, "crow_indices: block row 0 runs from 0 to 5 of 4 blocks"},
      {true, 1, -1, "crow_indices: block row 0 runs from 0 to -1 of 4 blocks"},
      {false, 1, 2, "col_indices: block column 2 in block row 0 is outside 0 to 1"},
      {false, 0, -1, "col_indices: block column -1 in block row 0 is outside 0 to 1"},
      {false, 3, INT32_MAX,
       "col_indices: block column 2147483647 in block row 1 is outside 0 to 1"},
      {false, 2, 1, "col_indices: block row 1 is not ascending"},
  };
  for (const Case& bad : cases) {
    Canonical c = blocks();
    std::memcpy((bad.crow ? c.crow : c.indices).get() + 4 * bad.at, &bad.value, 4);
    refuse(c, c.weight, bad.text);
  }
  Canonical c = blocks();
  sk_weight odd = c.weight;
  odd.indices_bytes -= 1;
  refuse(c, odd, "bsr: expected int32 col_indices, got 15 bytes");
}

void test_pack() {
  context = "pack";
  Random random(3);
  const Weight w(nm(2, 4), SK_F32, 5, 9, Fill::kIntegers, random);
  const Canonical c = compress(w.dense, w.mask, w.pattern, w.dtype);
  int64_t bytes = -1;
  std::string known;
  for (const char* format : kFormats) known += (known.empty() ? "" : ", ") + std::string(format);
  CHECK_FAILS(sk_packed_bytes(&c.weight, "nm_rows32", &bytes), kInvalid,
              "format: expected one of " + known + ", got 'nm_rows32'");
  CHECK_FAILS(sk_packed_bytes(&c.weight, nullptr, &bytes), kInvalid, "got ''");
  CHECK_FAILS(sk_packed_bytes(&c.weight, "bsr_rows", &bytes), kInvalid,
              "pack: format bsr_rows does not hold the pattern 2:4");
  const auto refuse_pattern = [&](const char* format, const sk_pattern& pattern, int32_t dtype,
                                  const std::string& what) {
    const Weight w(pattern, dtype, 5, 8, Fill::kIntegers, random);
    const Canonical canonical = compress(w.dense, w.mask, pattern, dtype);
    CHECK_FAILS(sk_packed_bytes(&canonical.weight, format, &bytes), kInvalid,
                std::string("pack: format ") + format + " does not hold the pattern " + what);
  };
  refuse_pattern("nm_quads", nm(1, 4), SK_F32, "1:4 in f32");
  refuse_pattern("nm_quads", nm(2, 4, 4), SK_F32, "2:4v4 in f32");
  refuse_pattern("nm_mma_sp", nm(2, 4), SK_F32, "2:4 in f32");
  refuse_pattern("nm_mma_sp", nm(1, 4), SK_BF16, "1:4 in bf16");
  refuse_pattern("nm_mma_sp", nm(4, 8, 16), SK_F16, "4:8v16 in f16");
  refuse_pattern("bsr_mma", bsr(16, 16), SK_F32, "bsr16x16 in f32");
  for (auto [rows, cols] : {std::pair{8, 16}, {16, 8}, {48, 16}, {16, 112}, {1, 1}}) {
    refuse_pattern("bsr_mma", bsr(rows, cols), SK_BF16,
                   "bsr" + std::to_string(rows) + "x" + std::to_string(cols) + " in bf16");
  }
  // More slices than an int32 counts: refused by its sizes, no array is there to be read.
  sk_weight wide{};
  wide.pattern = bsr(16, 128);
  wide.dtype = SK_BF16;
  wide.n = int64_t{1} << 30, wide.k = int64_t{1} << 18;
  wide.values = wide.indices = wide.crow_indices = reinterpret_cast<void*>(uintptr_t{64});
  const auto ask_bytes = [&](int64_t nnzb) {
    CHECK_OK(sk_weight_sizes(&wide.pattern, wide.dtype, wide.n, wide.k, nnzb, &wide.values_bytes,
                             &wide.indices_bytes, &wide.crow_indices_bytes));
    return sk_packed_bytes(&wide, "bsr_mma", &bytes);
  };
  CHECK_FAILS(ask_bytes(1 << 28), kInvalid,
              "pack: format bsr_mma holds at most 2^31 - 1 slices of 16 columns, 268435456 blocks "
              "of 128 columns are 2147483648; split the weight along n");
  CHECK(bytes == -1);
  CHECK_OK(ask_bytes((1 << 28) - 1));
  CHECK(bytes > int64_t{1} << 40);
  bytes = -1;
  CHECK_FAILS(sk_packed_bytes(nullptr, "nm", &bytes), kInvalid, "weight is NULL");
  CHECK(bytes == -1);
  CHECK_FAILS(sk_packed_bytes(&c.weight, "nm", nullptr), kInvalid, "bytes is NULL");

  // The same sizes and refusals without a weight.
  const auto ask_format = [&](const sk_pattern& pattern, int64_t nnzb, const char* format) {
    return sk_format_bytes(&pattern, SK_BF16, 33, 70, nnzb, format, &bytes);
  };
  CHECK_FAILS(sk_format_bytes(nullptr, SK_F32, 5, 9, 0, "nm", &bytes), kInvalid, "pattern is NULL");
  CHECK_FAILS(sk_format_bytes(&w.pattern, SK_F32, 5, 9, 0, "nm", nullptr), kInvalid,
              "bytes is NULL");
  CHECK_FAILS(ask_format(nm(2, 4), 0, "nm_rows32"), kInvalid, "format: expected one of " + known);
  CHECK_FAILS(ask_format(nm(4, 8), 0, "nm_mma_sp"), kInvalid,
              "pack: format nm_mma_sp does not hold the pattern 4:8 in bf16");
  for (int64_t nnzb : {-1, 16}) {
    CHECK_FAILS(ask_format(bsr(16, 16), nnzb, "bsr"), kInvalid, "bsr: expected 0 to 15 blocks");
  }
  CHECK(bytes == -1);
  for (const sk_pattern& pattern : all_patterns()) {
    for (const char* format : kFormats) {
      const Weight sample(pattern, SK_BF16, 33, 70, Fill::kIntegers, random);
      if (!holds(format, pattern, SK_BF16)) continue;
      const Canonical whole = compress(sample.dense, sample.mask, pattern, SK_BF16);
      const bool is_nm = pattern.family == SK_FAMILY_NM;
      CHECK_OK(ask_format(pattern, is_nm ? 7 : whole.weight.indices_bytes / 4, format));
      CHECK(bytes == pack(whole, format).bytes());
    }
  }

  CHECK_OK(sk_packed_bytes(&c.weight, "nm_rows16", &bytes));
  Buffer packed(bytes + 64), before(bytes + 64);
  std::memset(packed.data(), 0xa5, size_t(packed.bytes()));
  std::memset(before.data(), 0xa5, size_t(before.bytes()));
  CHECK_FAILS(sk_pack(&c.weight, "nm_rows16", nullptr, bytes), kInvalid,
              "pack: expected a buffer aligned to 64 bytes");
  CHECK_FAILS(sk_pack(&c.weight, "nm_rows16", packed.data() + 16, bytes), kInvalid,
              "pack: expected a buffer aligned to 64 bytes");
  for (int64_t wrong : {bytes - 64, bytes + 64, int64_t{0}, int64_t{-1}}) {
    CHECK_FAILS(sk_pack(&c.weight, "nm_rows16", packed.data(), wrong), kInvalid,
                "pack: format nm_rows16 takes " + std::to_string(bytes) + " bytes here, got " +
                    std::to_string(wrong));
  }
  CHECK_FAILS(sk_pack(&c.weight, "nothing", packed.data(), bytes), kInvalid,
              "format: expected one of");
  CHECK_FAILS(sk_pack(nullptr, "nm", packed.data(), bytes), kInvalid, "weight is NULL");
  CHECK(!std::memcmp(packed.data(), before.data(), size_t(packed.bytes())));

  char format[32] = "as before";
  const auto ask = [&](const sk_pattern& p, int32_t dtype, const char* target) {
    return sk_default_format(&p, dtype, target, format);
  };
  CHECK_FAILS(ask(nm(2, 4), SK_F32, "gpu"), kInvalid,
              "target: expected 'auto', 'cpu', 'cuda', 'cuda:<device>' or 'reference', got 'gpu'");
  CHECK_FAILS(ask(nm(2, 4), SK_F32, nullptr), kInvalid, "target is NULL");
  CHECK_FAILS(ask(nm(2, 3), SK_F32, "auto"), kInvalid, "expected M in 2, 4, 8, 16");
  CHECK_FAILS(ask(nm(2, 4), 3, "auto"), kInvalid, "dtype: expected");
  CHECK_FAILS(sk_default_format(nullptr, SK_F32, "auto", format), kInvalid, "pattern is NULL");
  CHECK(!std::strcmp(format, "as before"));
  CHECK_FAILS(sk_default_format(&w.pattern, SK_F32, "auto", nullptr), kInvalid, "format is NULL");
}

// A packed buffer that no call may accept.
void refuse_packed(const Weight& w, const uint8_t* data, int64_t bytes, const std::string& text) {
  sk_packed_info info;
  std::memset(&info, 0x5a, sizeof info);
  const sk_packed_info info_before = info;
  CHECK_FAILS(sk_read_packed_info(data, bytes, &info), kInvalid, text);
  CHECK(!std::memcmp(&info, &info_before, sizeof info));

  Canonical out = compress(w.dense, w.mask, w.pattern, w.dtype);
  const Canonical out_before = compress(w.dense, w.mask, w.pattern, w.dtype);
  CHECK_FAILS(sk_unpack(data, bytes, &out.weight), kInvalid, text);
  CHECK(out == out_before);

  Random random(4);
  const Inputs in(w, 3, Fill::kIntegers, random);
  Matrix y(w.dtype, 3, w.n);
  const Matrix y_before(w.dtype, 3, w.n);
  const Buffer nothing(64);
  sk_matmul_args args = arguments(w, nothing, in, {}, y.data(), w.n, 1);
  args.weight = data;
  args.weight_bytes = bytes;
  CHECK_FAILS(sk_matmul(&args, nullptr), kInvalid, text);
  CHECK(y.same_bytes(y_before));
}

void test_packed() {
  Random random(5);
  for (const char* format : kFormats) {
    context = std::string("packed as ") + format;
    const bool is_nm = format[0] == 'n';
    const sk_pattern pattern = is_nm ? nm(2, 4) : bsr(16, 16);
    const int32_t dtype = holds(format, pattern, SK_F32) ? SK_F32 : SK_BF16;
    const Weight w(pattern, dtype, 21, 75, Fill::kIntegers, random);
    const Buffer good = pack(compress(w.dense, w.mask, w.pattern, w.dtype), format);

    refuse_packed(w, nullptr, good.bytes(), "packed weight: expected a buffer aligned to 64 bytes");
    Buffer moved(good.bytes() + 64);
    std::memcpy(moved.data() + 8, good.data(), size_t(good.bytes()));
    refuse_packed(w, moved.data() + 8, good.bytes(),
                  "packed weight: expected a buffer aligned to 64 bytes");
    for (int64_t cut = 0; cut < good.bytes(); cut += cut < 160 ? 1 : 61) {
      Buffer part(cut);  // of exactly this size: a read past the cut is an error of its own
      std::memcpy(part.data(), good.data(), size_t(cut));
      const std::string text = cut < 128 ? std::to_string(cut) + " bytes are too few for a header"
                                         : "the buffer is cut at " + std::to_string(cut) + " bytes";
      refuse_packed(w, part.data(), cut, "packed weight: ");
      refuse_packed(w, part.data(), cut, text);
    }
    refuse_packed(w, good.data(), -1, "too few for a header");

    Buffer bad = copy(good);
    poke(bad, kMagic, uint32_t{0x32504b53});
    refuse_packed(w, bad.data(), bad.bytes(),
                  "packed weight: not a buffer written by sk_pack of this version");
    for (int at = 4; at < kChecksum + 8; ++at) {
      bad = copy(good);
      bad.data()[at] ^= 1 << at % 8;
      refuse_packed(w, bad.data(), bad.bytes(), "packed weight: the header is damaged");
    }
    for (int32_t unknown : {-1, int(std::size(kFormats)), INT32_MAX}) {
      bad = copy(good);
      poke(bad, kFormat, unknown);
      seal(bad);
      refuse_packed(w, bad.data(), bad.bytes(),
                    "packed weight: unknown format " + std::to_string(unknown));
    }
    bad = copy(good);
    poke(bad, kFamily, int32_t{is_nm});
    seal(bad);
    refuse_packed(w, bad.data(), bad.bytes(),
                  std::string("packed weight: format ") + format + " with the wrong pattern");
    for (int offset : {int(kN), int(kValuesOffset), int(kBytes)}) {
      bad = copy(good);
      bad.data()[offset + 1] += 64;  // 16384 more
      seal(bad);
      refuse_packed(w, bad.data(), bad.bytes(),
                    "packed weight: the header's sizes do not belong together");
    }

    sk_packed_info info;
    CHECK_FAILS(sk_read_packed_info(good.data(), good.bytes(), nullptr), kInvalid, "info is NULL");
    CHECK_OK(sk_read_packed_info(good.data(), good.bytes(), &info));
    CHECK(!std::strcmp(info.format, format) && info.n == 21 && info.k == 75 &&
          info.bytes == good.bytes());
    CHECK_FAILS(sk_unpack(good.data(), good.bytes(), nullptr), kInvalid, "out is NULL");
    Canonical out(w.pattern, w.dtype, w.n, w.k, info.nnzb);
    sk_weight small = out.weight;
    small.values_bytes -= 4;
    CHECK_FAILS(sk_unpack(good.data(), good.bytes(), &small), kInvalid, "weight: values of a ");
    if (!is_nm) {
      Canonical fewer(w.pattern, w.dtype, w.n, w.k, info.nnzb - 1);
      CHECK_FAILS(sk_unpack(good.data(), good.bytes(), &fewer.weight), kInvalid,
                  "unpack: the packed weight has " + std::to_string(info.nnzb) +
                      " blocks, the arrays hold " + std::to_string(info.nnzb - 1));
    }
  }
}

void test_matmul() {
  context = "matmul";
  Random random(6);
  const Weight w(nm(2, 4), SK_F32, 21, 11, Fill::kIntegers, random);
  const Canonical canonical = compress(w.dense, w.mask, w.pattern, w.dtype);
  const Buffer packed = pack(canonical, "nm");
  const Inputs in(w, 3, Fill::kIntegers, random, 2);
  Matrix y(w.dtype, 3, w.n);
  const Matrix before(w.dtype, 3, w.n);
  const sk_matmul_args good =
      arguments(w, packed, in, {true, true, SK_ACTIVATION_NONE}, y.data(), w.n, 1);
  const auto refuse = [&](auto change, sk_status status, const std::string& text,
                          const char* kernel = nullptr) {
    sk_matmul_args bad = good;
    change(bad);
    CHECK_FAILS(sk_matmul(&bad, kernel), status, text);
    CHECK(y.same_bytes(before));
  };
  using Args = sk_matmul_args&;
  refuse([](Args a) { a.n = 20; }, kInvalid, "matmul: y has n=20, the packed weight has n=21");
  refuse([](Args a) { a.k = 12; }, kInvalid,
         "matmul: x has k=12, the packed weight has k=11; pass x[..., :11] or repack");
  refuse([](Args a) { a.dtype = SK_BF16; }, kInvalid,
         "matmul: x is bf16, the packed weight is f32; cast x or repack");
  refuse([](Args a) { a.dtype = 9; }, kInvalid, "matmul: x is ?, the packed weight is f32");
  refuse([](Args a) { a.m = -1; }, kInvalid, "matmul: expected m from 0 to 2^31 - 1, got -1");
  refuse([](Args a) { a.m = int64_t{1} << 31; }, kInvalid,
         "matmul: expected m from 0 to 2^31 - 1, got 2147483648");
  refuse([](Args a) { a.activation = -1; }, kInvalid, "matmul: unknown activation -1");
  refuse([](Args a) { a.activation = 6; }, kInvalid, "matmul: unknown activation 6");
  refuse([](Args a) { a.residual_order = 2; }, kInvalid, "matmul: unknown residual_order 2");
  refuse([](Args a) { a.x = nullptr; }, kInvalid, "matmul: x or y is NULL");
  refuse([](Args a) { a.y = nullptr; }, kInvalid, "matmul: x or y is NULL");
  refuse([](Args a) { a.x_row_stride = 10; }, kInvalid,
         "matmul: x has a row stride of 10, less than its width 11");
  refuse([](Args a) { a.y_row_stride = 20; }, kInvalid,
         "matmul: y has a row stride of 20, less than its width 21");
  refuse([](Args a) { a.residual_row_stride = -21; }, kInvalid,
         "matmul: residual has a row stride of -21, less than its width 21");
  refuse([](Args) {}, kInvalid, "kernel: no kernel is called 'matmul_nm'", "matmul_nm");
  refuse([](Args) {}, SK_UNSUPPORTED,
         "kernel matmul_bsr_f32_scalar cannot run matmul 2:4 f32 m=3 n=21 k=11 packed as nm: reads "
         "format bsr, "
         "the weight is packed as nm",
         "matmul_bsr_f32_scalar");
  refuse([](Args) {}, SK_UNSUPPORTED, "computes f16, the problem is f32", "matmul_nm_f16_scalar");
  CHECK_FAILS(sk_matmul(nullptr, nullptr), kInvalid, "args is NULL");

  // One row has no next one, whatever the strides say; nothing is read for none.
  sk_matmul_args one = good;
  one.m = 1;
  one.x_row_stride = one.y_row_stride = one.residual_row_stride = 0;
  CHECK_OK(sk_matmul(&one, nullptr));
  sk_matmul_args none = good;
  none.m = 0;
  none.x = nullptr;
  none.y = nullptr;
  CHECK_OK(sk_matmul(&none, nullptr));

  context = "no kernel";  // the scalar ones read no other format
  const char* const set = std::getenv("SPARSEKIT_ISA");
  const std::string isa = set ? set : "";
  setenv("SPARSEKIT_ISA", "scalar", 1);
  CHECK_OK(sk_reload_environment());
  const Weight half(nm(2, 4), SK_F16, 21, 11, Fill::kIntegers, random);
  const Buffer rows16 =
      pack(compress(half.dense, half.mask, half.pattern, half.dtype), "nm_rows16");
  const Inputs half_in(half, 3, Fill::kIntegers, random);
  Matrix half_y(SK_F16, 3, half.n);
  const Matrix half_before(SK_F16, 3, half.n);
  const sk_matmul_args args = arguments(half, rows16, half_in, {}, half_y.data(), half.n, 1);
  CHECK_FAILS(sk_matmul(&args, nullptr), SK_UNSUPPORTED,
              "no kernel can run matmul 2:4 f16 m=3 n=21 k=11 packed as nm_rows16 here:");
  const std::string refusals = sk_last_error();
  for (const sk_kernel_info& kernel : kernels()) {  // each candidate's refusal
    if (kernel.device_type != SK_CPU) continue;
    CHECK(refusals.find(std::string("\n  ") + kernel.name + ": ") != std::string::npos);
  }
  setenv("SPARSEKIT_ISA", isa.c_str(), 1);  // empty is the same as not set
  CHECK_OK(sk_reload_environment());
  CHECK(half_y.same_bytes(half_before));
}

void test_registry() {
  context = "registry";
  sk_kernel_info info;
  std::memset(&info, 0x5a, sizeof info);
  const sk_kernel_info before = info;
  for (int32_t index : {-1, sk_kernel_count(), INT32_MAX}) {
    CHECK_FAILS(sk_get_kernel(index, &info), kInvalid,
                "kernel: expected an index from 0 to " + std::to_string(sk_kernel_count() - 1));
  }
  CHECK(!std::memcmp(&info, &before, sizeof info));
  CHECK_FAILS(sk_get_kernel(0, nullptr), kInvalid, "info is NULL");
  CHECK_FAILS(sk_get_cpu_info(nullptr), kInvalid, "info is NULL");

  const sk_pattern p = nm(2, 4), bad = nm(4, 4);
  std::vector<sk_candidate> out(static_cast<size_t>(sk_kernel_count()));
  const auto explain = [&](const char* op, const char* format, const sk_pattern* pattern, int64_t m,
                           int64_t n) {
    return sk_explain(op, format, pattern, SK_F32, m, n, 64, 1, out.data());
  };
  CHECK_FAILS(explain(nullptr, "nm", &p, 1, 64), kInvalid, "op is NULL");
  CHECK_FAILS(explain("matmul", "csr", &p, 1, 64), kInvalid, "format: expected one of");
  CHECK_FAILS(explain("matmul", "nm", nullptr, 1, 64), kInvalid, "pattern is NULL");
  CHECK_FAILS(explain("matmul", "nm", &bad, 1, 64), kInvalid, "expected 1 <= N < M, got 4:4");
  CHECK_FAILS(explain("matmul", "nm", &p, -1, 64), kInvalid, "explain: expected m >= 0, got -1");
  CHECK_FAILS(explain("matmul", "nm", &p, 1, 0), kInvalid, "expected n and k from 1");
  for (const sk_candidate& c : out) CHECK(c.name == nullptr);
  CHECK_FAILS(sk_explain("matmul", "nm", &p, SK_F32, 1, 64, 64, 1, nullptr), kInvalid,
              "out is NULL");
  CHECK_OK(explain("attention", "nm", &p, 1, 64));
  for (size_t i = 0; i < out.size(); ++i) {
    CHECK(!out[i].ok && !out[i].chosen && out[i].cost_us == 0 && out[i].reason[0]);
    if (kernels()[i].available && kernels()[i].device_type == SK_CPU)
      CHECK(out[i].reason == std::string("does ") + kernels()[i].op + ", not attention");
  }
}

}  // namespace

int main() {
  CHECK(std::strlen(sk_last_error()) == 0);  // never NULL
  test_patterns();
  test_compress();
  test_canonical();
  test_pack();
  test_packed();
  test_matmul();
  test_registry();
}
